"""`tune-style compare`: the table from which a team chooses among adapted models: what each gained and forgot."""

import argparse
import base64
import contextlib
import html
import io
import itertools
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchrecipes.cli.plot import read_metrics
from torchrecipes.errors import UserError

GAINS = (0, 10, 20, 30)  # per cent, the columns of the decision matrix
VERDICTS = ("kept", "drifting", "forgetting")
COLUMNS = (
    "run", "start", "lr", "replay", "steps", "at step", "domain loss", "general loss", "domain change",
    "general change", "domain ppl", "general ppl", "verdict",
)  # fmt: skip


@dataclass
class Row:
    """A run of the table. Losses are in nats per token, changes are against the base.

    Attributes:
        name, start, lr, replay: as the table shows them.
        steps: trained so far.
        at: the step whose checkpoint is compared: the best one by `keep_best`, or the last evaluated.
        is_best: whether that is the best one.
        base: (domain, general) loss before the first adaptation.
        losses: (domain, general) loss at every evaluated step.
        verdict: `kept`, `drifting` or `forgetting`, at `at`.
        end_verdict: the same at the last evaluation.
        on_front: no other run has a larger domain gain and a smaller general change.
        bands: the run's `forgetting`.
    """

    name: str
    start: str
    lr: str
    replay: str
    steps: int
    at: int
    is_best: bool
    base: tuple[float, float]
    losses: dict[int, tuple[float, float]]
    verdict: str
    end_verdict: str
    bands: Any
    on_front: bool = False

    @property
    def gain(self) -> float:
        """By how many per cent the domain loss fell."""
        return -_percent(self.losses[self.at][0], self.base[0])

    @property
    def forgotten(self) -> float:
        """By how many per cent the general loss rose."""
        return _percent(self.losses[self.at][1], self.base[1])


@dataclass
class _Run:
    """What is read of a run's folder."""

    folder: Path
    config: dict[str, Any]
    lines: list[dict]
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)  # step -> set -> loss


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `compare`."""
    parser.epilog = (
        "example: tune-style compare runs/security\n"
        "         tune-style compare runs/replay_0 runs/replay_20 -o report\n"
        "A run shows its best checkpoint by checkpoint.keep_best, or else its last."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or one that holds those of its stages")
    help_output = "where to write compare.md, .html and .png (default: the folder that holds the runs)"
    parser.add_argument("-o", "--output", metavar="FOLDER", help=help_output)
    parser.add_argument("--domain", metavar="SET", help="the evaluation set to improve (default: the other one of two)")
    parser.add_argument("--general", metavar="SET", help="the set not to forget (default: the config's forgetting.set)")


def main(args: argparse.Namespace) -> None:
    """Print the table and write it as Markdown, HTML and a picture."""
    folders = [Path(path) for path in args.runs]
    compare_runs(folders, args.output and Path(args.output), args.domain, args.general)


def compare_runs(
    folders: list[Path], output: Path | None, domain: str | None = None, general: str | None = None
) -> list[Row]:
    """Print the comparison of some runs, and write it into a folder.

    Args:
        folders: of runs, or folders that hold runs, of which those without the evaluations are left out.
        output: the folder to write into; None: the one that holds the runs.
        domain, general: the evaluation sets; None: as the runs' configs say.

    Raises:
        UserError: a folder is no run (code `not_found`), or a run has no evaluations of these sets
            (`no_named_evaluations`).
    """
    runs, notes = _read_all(folders, domain, general)
    rows = [_row(run, *sets) for run, sets in runs]
    mark_pareto_front(rows)
    names = [_relative(row.name, rows) for row in rows]
    for row, name in zip(rows, names, strict=True):
        row.name = name
    report = "\n\n".join([table(rows), matrix(rows), recommendation(rows), *notes])
    print(report)
    if output is None:
        output = Path(os.path.commonpath([run.folder.resolve().parent for run, _ in runs]))
    sets = " / ".join(dict.fromkeys(f"domain: {domain}, general: {general}" for _, (domain, general) in runs))
    picture = draw(rows)
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "compare.md").write_text(f"# Comparison ({sets})\n\n{report}\n", encoding="utf-8")
        (output / "compare.html").write_text(to_html(rows, f"Comparison ({sets})", notes, picture), encoding="utf-8")
        if picture:
            (output / "compare.png").write_bytes(picture)
    except OSError as error:
        problem = f"cannot write {output}: {error.strerror}"
        raise UserError(problem, key="--output", hint="Give another folder with -o", code="not_writable") from None
    print(f"\nsaved {output}/compare.md, compare.html" + (", compare.png" if picture else ""))
    if not picture:
        print("without the picture, which needs matplotlib: pip install 'torchrecipes[plot]'")
    return rows


def table(rows: list[Row]) -> str:
    """The comparison as a Markdown table, the base first."""
    cells = [COLUMNS]
    bases: dict[tuple[float, float], list[str]] = {}
    for row in rows:
        bases.setdefault(row.base, []).append(row.name)
    for base, names in bases.items():
        name = "base" if len(bases) == 1 else f"base of {', '.join(names)}"
        losses = [f"{loss:.3f}" for loss in base]
        cells.append((name, *[""] * 4, "0", *losses, "", "", *map(_perplexity, base), ""))
    for row in rows:
        losses = row.losses[row.at]
        verdict = row.verdict + (f", then {row.end_verdict}" if row.end_verdict != row.verdict else "")
        changes = [
            f"{_percent(loss, base):+.1f} % ({loss - base:+.3f})" for loss, base in zip(losses, row.base, strict=True)
        ]
        at = f"{row.at:,}{' (best)' if row.is_best else ''}"
        shown = [f"{loss:.3f}" for loss in losses]
        start = (row.name, row.start, row.lr, row.replay, f"{row.steps:,}", at)
        cells.append((*start, *shown, *changes, *map(_perplexity, losses), verdict))
    return _markdown(cells, numbers=range(2, 12))


def matrix(rows: list[Row]) -> str:
    """The decision matrix: domain gain against verdict, with * at those on the Pareto front."""
    head = [f"{low}-{high} %" for low, high in itertools.pairwise(GAINS)]
    cells: list[tuple[str, ...]] = [("general \\ domain gain", "none", *head, f"over {GAINS[-1]} %")]
    for verdict in VERDICTS:
        columns: list[list[str]] = [[] for _ in range(len(GAINS) + 1)]
        for row in rows:
            if row.verdict == verdict:
                columns[sum(row.gain > bound for bound in GAINS)].append(f"{row.name}{'*' if row.on_front else ''}")
        cells.append((verdict, *(", ".join(names) for names in columns)))
    return _markdown(cells) + "\n\n\\* on the Pareto front: no other run gained more and forgot less."


def recommendation(rows: list[Row]) -> str:
    """One sentence: the run with the largest gain among those that kept the general loss."""
    kept = [row for row in rows if row.verdict == "kept"]
    if not kept:
        least = min(rows, key=lambda row: row.forgotten)
        return f"No run kept the general loss; {least.name} forgot least ({least.forgotten:+.1f} %)."
    best = max(kept, key=lambda row: row.gain)
    return (
        f"Largest domain gain with the general loss kept: {best.name} at step {best.at:,} "
        f"({-best.gain:+.1f} % domain, {best.forgotten:+.1f} % general)."
    )


def mark_pareto_front(rows: list[Row]) -> None:
    """Set `on_front` of every row that no other one beats in both changes."""
    for row in rows:
        row.on_front = not any(
            other.gain >= row.gain
            and other.forgotten <= row.forgotten
            and (other.gain, other.forgotten) != (row.gain, row.forgotten)
            for other in rows
        )


def draw(rows: list[Row]) -> bytes | None:
    """A PNG of domain gain over general change, with the way that each run took; None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    for number, row in enumerate(rows):
        ways = [
            (_percent(general, row.base[1]), -_percent(domain, row.base[0])) for domain, general in row.losses.values()
        ]
        axes.plot(*zip(*ways, strict=True), color=f"C{number}", alpha=0.35, marker=".", markersize=4)
        marker = {"marker": "*", "markersize": 14} if row.on_front else {"marker": "o", "markersize": 8}
        axes.plot(
            [row.forgotten], [row.gain], color=f"C{number}", linestyle="", label=f"{row.name}: {row.verdict}", **marker
        )
    front = sorted((row.forgotten, row.gain) for row in rows if row.on_front)
    axes.step(*zip(*front, strict=True), where="post", color="0.6", linestyle=":", label="Pareto front (*)")
    for name, color in (("warn", "tab:orange"), ("stop", "tab:red")):
        limits = {getattr(row.bands, name) for row in rows if row.bands}
        for limit in limits:
            if isinstance(limit, str) and limit.strip().endswith("%"):
                axes.axvline(float(limit.strip().rstrip("%")), color=color, linewidth=1, label=f"{name} ({limit})")
    axes.set_xlabel("general loss against the base (%)")
    axes.set_ylabel("gain of the domain loss (%)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    pyplot.close(figure)
    return picture.getvalue()


def to_html(rows: list[Row], title: str, notes: list[str], picture: bytes | None) -> str:
    """The comparison as one HTML file that needs no other."""
    parts = [f"<h1>{html.escape(title)}</h1>", _html_table(table(rows)), f"<p>{html.escape(recommendation(rows))}</p>"]
    parts += ["<h2>Decision matrix</h2>", _html_table(matrix(rows).split("\n\n")[0])]
    parts.append("<p>* on the Pareto front: no other run gained more and forgot less.</p>")
    parts += [f"<p>{html.escape(note)}</p>" for note in notes]
    if picture:
        parts.append(f'<img alt="domain gain over general change" src="data:image/png;base64,{_base64(picture)}">')
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:75em;padding:0 1em;color:#222}"
        "table{border-collapse:collapse;margin:1em 0}"
        "th,td{padding:.3em .8em;border-bottom:1px solid #ddd;text-align:left}"
        "th{border-bottom:2px solid #888}img{max-width:100%}"
    )
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _read_all(
    folders: list[Path], domain: str | None, general: str | None
) -> tuple[list[tuple[_Run, tuple[str, str]]], list[str]]:
    """The runs with their (domain, general) sets, ancestors first within a folder, and what was left out."""
    found, notes = [], []
    for folder in folders:
        if (folder / "metrics.jsonl").is_file() or not folder.is_dir():
            run = _read(folder)
            found.append((run, _sets(run, domain, general)))
            continue
        inside, problem = [], None
        for path in sorted(file.parent for file in folder.glob("*/metrics.jsonl")):
            try:
                run = _read(path)
                inside.append((run, _sets(run, domain, general)))
            except UserError as error:
                problem = error
                notes.append(f"Left out, since {error.problem}.")
        if not inside:
            hint = "Give the folder of a run, or one that holds those of its stages"
            raise problem or UserError(f"{folder} holds no run", hint=hint, code="not_found")
        found += sorted(inside, key=lambda item: len(_ancestors(item[0])))
    return found, notes


def _read(folder: Path) -> _Run:
    import yaml

    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        problem = f"{folder} is no run: {getattr(error, 'strerror', 'config.yaml is not valid')}"
        raise UserError(problem, hint="Give the folder that output_dir named", code="not_found") from None
    lines = read_metrics(folder)
    run = _Run(folder, config if isinstance(config, dict) else {}, lines)
    for line in lines:
        losses = {
            key.split("/")[1]: value if value is not None else math.nan
            for key, value in line.items()
            if key.startswith("eval/") and key.endswith("/loss") and key.count("/") == 2
        }
        if losses:
            run.evaluations.setdefault(line["step"], {}).update(losses)
    return run


def _sets(run: _Run, domain: str | None, general: str | None) -> tuple[str, str]:
    """The names of the domain's and the general set."""
    names = list(dict.fromkeys(name for losses in run.evaluations.values() for name in losses))
    general = general or (run.config.get("forgetting") or {}).get("set") or "general"
    if domain is None:
        others = [name for name in names if name != general]
        best = ((run.config.get("checkpoint") or {}).get("keep_best") or {}).get("metric", "").split("/")
        domain = others[0] if len(others) == 1 else best[1] if len(best) == 3 else "domain"
    missing = [name for name in (domain, general) if name not in names]
    if missing or 0 not in run.evaluations:
        has = f"no evaluation set {' or '.join(missing)} (it has {', '.join(names)})"
        what = has if names else "no evaluation sets"
        if not missing:
            what = "no evaluation at step 0"
        raise UserError(
            f"{run.folder} has {what}",
            hint="Name the sets with --domain and --general, and compare runs whose config has eval_every",
            code="no_named_evaluations",
        )
    return domain, general


def _parent(run: _Run) -> _Run | None:
    """The run from whose checkpoint this one started, if its folder is still there."""
    start = run.config.get("init_from")
    if not start:
        return None
    path = Path(start)
    folder = path.parent.parent if path.parent.name == "checkpoints" else path
    with contextlib.suppress(UserError):
        return _read(folder)
    return None


def _ancestors(run: _Run) -> list[_Run]:
    found: list[_Run] = []
    seen = {run.folder.resolve()}
    while (parent := _parent(found[-1] if found else run)) and parent.folder.resolve() not in seen:
        seen.add(parent.folder.resolve())
        found.append(parent)
    return found


def _row(run: _Run, domain: str, general: str) -> Row:
    from torchrecipes.training.forgetting import ForgettingConfig, loss_change, verdict

    losses = {
        step: (values[domain], values[general])
        for step, values in sorted(run.evaluations.items())
        if domain in values and general in values
    }
    base = losses[0]
    for ancestor in _ancestors(run):  # the first one that was evaluated on both sets is where the adaptation began
        first = ancestor.evaluations.get(0, {})
        if domain not in first or general not in first:
            break
        base = first[domain], first[general]
    best = _best_step(run.folder)
    at = best if best in losses else max(losses)
    settings = run.config.get("forgetting") or {}
    bands = ForgettingConfig(**{key: settings[key] for key in settings if key in ForgettingConfig.__dataclass_fields__})
    verdicts = [verdict(loss_change(losses[step][1], base[1]), bands) for step in (at, max(losses))]
    return Row(
        name=str(run.folder),
        start=_start(run),
        lr=_number((run.config.get("optimizer") or {}).get("lr")),
        replay=_replay(run, general),
        steps=max(line["step"] for line in run.lines),
        at=at,
        is_best=best in losses,
        base=base,
        losses=losses,
        verdict=verdicts[0],
        end_verdict=verdicts[1],
        bands=bands,
    )


def _best_step(folder: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads((folder / "checkpoints" / "best.json").read_bytes())["checkpoint"].split("-")[-1])
    return None


def _start(run: _Run) -> str:
    path = Path(run.config.get("init_from") or "nothing")
    return path.parent.parent.name if path.parent.name == "checkpoints" else path.name


def _replay(run: _Run, general: str) -> str:
    """The share of the general text in the mixture, at the start and at the end."""
    source = (run.config.get("data") or {}).get("source") or {}
    weights = source.get("weights")
    if isinstance(weights, list) and weights:
        weights = weights[0][1]
    share = source.get("replay_ratio")
    if share is None and isinstance(weights, dict) and sum(weights.values()):
        share = weights.get(general, 0) / sum(weights.values())
    logged = [line["replay_share"] for line in run.lines if "replay_share" in line]
    shares = [
        value for value in (share if share is not None else (logged or [None])[0], *logged[-1:]) if value is not None
    ]
    shown = list(dict.fromkeys(f"{100 * value:.0f} %" for value in shares))
    return " -> ".join(shown) or "none"


def _relative(name: str, rows: list[Row]) -> str:
    short = Path(name).name
    return short if sum(Path(row.name).name == short for row in rows) == 1 else name


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value or "")


def _percent(loss: float, base: float) -> float:
    return 100 * (loss / base - 1)


def _perplexity(loss: float) -> str:
    return f"{math.exp(min(loss, 700)):,.4g}"


def _markdown(cells: list[tuple[str, ...]], numbers: Any = ()) -> str:
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = []
    for row in cells:
        padded = [
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(padded)} |")
    rule = [f"{'-' * (width - 1)}:" if column in numbers else "-" * width for column, width in enumerate(widths)]
    lines.insert(1, f"| {' | '.join(rule)} |")
    return "\n".join(lines)


def _html_table(markdown: str) -> str:
    head, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()]

    def row(cells: list[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    return "\n".join(["<table>", row(head, "th"), *(row(cells, "td") for cells in body), "</table>"])


def _base64(picture: bytes) -> str:
    return base64.b64encode(picture).decode()
