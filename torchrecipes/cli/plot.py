"""`tune-style plot`: plots loss, evaluation, learning rate and throughput of one or more runs."""

import argparse
import itertools
import json
import re
from pathlib import Path

from torchrecipes.errors import UserError

GREY = "0.6"
RANGE = re.compile(r"eval/([^/]+)/loss/(\d+)-(\d+)")  # of positions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `plot`."""
    parser.epilog = "example: tune-style plot runs/quickstart\n         tune-style plot runs/a runs/b -o compared.png"
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or its metrics.jsonl")
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="the picture (default: loss.png in the first run's folder)"
    )


def main(args: argparse.Namespace) -> None:
    """Write the picture and print its path."""
    runs = {name: read_metrics(path) for name, path in _named(args.runs).items()}
    first = Path(args.runs[0])
    output = Path(args.output) if args.output else (first if first.is_dir() else first.parent) / "loss.png"
    output = output if output.suffix else output.with_suffix(".png")  # as matplotlib does it
    draw(runs, output)
    print(f"saved {output}")


def read_metrics(path: Path) -> list[dict]:
    """Return the lines of a run's metrics.jsonl; lines that are not valid, as after a crash, are skipped and reported.

    Raises:
        UserError: no such file (code `not_found`), or no metrics in it (`no_metrics`).
    """
    file = path / "metrics.jsonl" if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        hint = "Give a run's folder, as in: tune-style plot runs/small"
        raise UserError(f"{file}: {error.strerror}", hint=hint, code="not_found") from None
    lines = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            values = json.loads(line)
            lines.append(values | {"step": values["step"]})
        except (ValueError, TypeError, KeyError):
            print(f"{file}:{number}: skipping a line that is not valid JSON with a step")
    drawn = ("loss", "lr", "tokens_per_second")
    if not any(key in drawn or key.startswith("eval/") for line in lines for key in line):
        hint = "Wait for the run's first log line."
        raise UserError(f"{file} has no metrics yet", hint=hint, code="no_metrics")
    return lines


def draw(runs: dict[str, list[dict]], output: Path) -> None:
    """Write four panels with a line per run, in the format of the suffix of `output`.

    Raises:
        UserError: matplotlib is missing (code `missing_package`), or the picture cannot be written (`not_writable`).
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError(
            "plot needs matplotlib", hint="Install it: pip install matplotlib", code="missing_package"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter, MaxNLocator

    by_position = {name: found for name, lines in runs.items() if (found := _by_position(lines))}
    keys = {key for lines in runs.values() for line in lines for key in line if key.startswith("eval/")}
    kinds = sorted({key.split("/")[3] for key in keys if key.count("/") == 3 and key.split("/")[2] == "accuracy"})
    names = [["loss", "accuracy"], ["lr", "speed"]]
    names += [["kinds"] * 2] * bool(kinds) + [["positions"] * 2] * bool(by_position)
    figure, panels = pyplot.subplot_mosaic(names, figsize=(11, 3.5 * len(names)), layout="constrained")
    loss, accuracy, rate, speed = (panels[name] for name in ("loss", "accuracy", "lr", "speed"))
    for panel in (accuracy, rate, speed):
        panel.sharex(loss)
    for panel in (loss, accuracy):
        panel.tick_params(labelbottom=False)
    markers = dict(zip(sorted({key.split("/")[1] for key in keys}), itertools.cycle("os^Dv")))
    for number, (name, lines) in enumerate(runs.items()):
        color = f"C{number}"
        loss.plot(*_series(lines, "loss"), color=color, alpha=0.45, linewidth=1.2, label=f"{name}, training")
        for key in sorted({key for line in lines for key in line if key.startswith("eval/") and key.count("/") == 2}):
            _, split, metric = key.split("/")
            panel = {"loss": loss, "accuracy": accuracy}.get(metric)
            if panel is not None:
                panel.plot(
                    *_series(lines, key), color=color, marker=markers[split], markersize=4, label=f"{name}, {split}"
                )
                baseline = f"eval/{split}/unigram_{metric}"
                if any(baseline in line for line in lines):
                    panel.plot(*_series(lines, baseline), color=GREY if len(runs) == 1 else color, linestyle=":")
        for split, (before, after) in by_position.get(name, {}).items():
            label, panel = f"{name}, {split}", panels["positions"]
            style = {"color": color, "marker": markers[split], "markersize": 4}
            panel.plot(*before, linestyle="--", label=f"{label}, before", **style)
            panel.plot(*after, label=f"{label}, after", **style)
        for kind, split in itertools.product(kinds, markers):
            style = {"color": f"C{kinds.index(kind)}", "linewidth": 1.2 / (1 + number)}
            label = f"{name}, {split}, {kind}"
            panel, key = panels["kinds"], f"eval/{split}/{{}}accuracy/{kind}"
            if any(key.format("") in line for line in lines):
                panel.plot(*_series(lines, key.format("")), marker=markers[split], markersize=4, label=label, **style)
            panel.plot(*_series(lines, key.format("trigram_")), linestyle=":", **style)
        rate.plot(*_series(lines, "lr"), color=color)
        speed.plot(*_series(lines, "tokens_per_second"), color=color)
    titles = {"loss": "loss (nats per token)", "accuracy": "accuracy", "lr": "learning rate"}
    titles |= {"speed": "tokens per second", "positions": "loss by position in the document"}
    titles["kinds"] = "accuracy by kind of character (dotted: trigrams)"
    for name, panel in panels.items():
        panel.set_title(titles[name], loc="left", fontsize=10)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        if panel.has_data() and panel.get_legend_handles_labels()[0]:
            panel.legend(frameon=False, fontsize=8)
    for panel in (loss, accuracy):
        if panel.get_lines() and any(line.get_linestyle() == ":" for line in panel.get_lines()):
            panel.plot([], [], color=GREY, linestyle=":", label="unigram baseline")
            panel.legend(frameon=False, fontsize=8)
    if not accuracy.has_data():
        accuracy.text(0.5, 0.5, "no evaluation", transform=accuracy.transAxes, ha="center", color=GREY)
    for name in ("lr", "speed", *["kinds"] * bool(kinds)):
        panels[name].set_xlabel("step")
    for panel in (rate, speed):
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_ylim(bottom=0)
    if by_position:
        panels["positions"].set_xlabel("position")
        panels["positions"].set_xscale("log", base=2)
    speed.yaxis.set_major_formatter(EngFormatter())
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot write {output}: {error}", hint="Give another file, as in -o loss.png", code="not_writable"
        ) from None
    finally:
        pyplot.close(figure)


def _series(lines: list[dict], key: str) -> tuple[list[int], list[float]]:
    points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _by_position(lines: list[dict]) -> dict[str, tuple[tuple[list[float], list[float]], ...]]:
    """Split -> the losses for ranges of positions in its first evaluation and in its last: (middles, losses) each."""
    found: dict[str, list] = {}
    for line in lines:
        curves: dict[str, list] = {}
        for key, value in line.items():
            if (found_range := RANGE.fullmatch(key)) and value is not None:
                split, first, last = found_range.groups()
                curves.setdefault(split, []).append(((int(first) + int(last)) / 2, value))
        for split, points in curves.items():
            found.setdefault(split, []).append(tuple(zip(*sorted(points), strict=True)))
    return {split: (curves[0], curves[-1]) for split, curves in found.items()}


def _named(paths: list[str]) -> dict[str, Path]:
    """Return the runs by folder name, or by path where two folders have the same name."""
    found = [Path(path) for path in paths]
    names = [(path if path.is_dir() else path.parent).resolve().name for path in found]
    return {name if names.count(name) == 1 else str(path): path for name, path in zip(names, found, strict=True)}
