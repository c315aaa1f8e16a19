"""Logs metrics: a line of JSON per log step, a bar or a line on the terminal, and loggers."""

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from torchrecipes.atomic_write import write_atomically
from torchrecipes.config import Component, MayChange, Steps, build, component
from torchrecipes.config.metadata import Evaluations
from torchrecipes.distributed import collectives
from torchrecipes.training.baseline_check import baseline_warning, kinds_at_baseline
from torchrecipes.training.run import Run

T = TypeVar("T")
SHOW_PROGRESS_AFTER = 30  # seconds into a step without a line


@dataclass
class LogConfig:
    """The config group `log`."""

    log_every: MayChange[Steps] = 10  # steps
    baseline_evaluations: MayChange[Evaluations | None] = 3  # in a row at the unigram baseline: a warning; None: never
    loggers: MayChange[list[Component]] = component([], injected=("output_dir",))  # beside metrics.jsonl


def sum_over_ranks(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Adds up the values of micro-batches by name, over this rank's and then over all ranks'.

    Args:
        parts: of every micro-batch, the same names: detached tensors without dimensions. Nothing waits for the device.
    """
    names = list(parts[0])
    sums = torch.stack([torch.stack([part[name].float() for part in parts]).sum() for name in names])
    return dict(zip(names, collectives.all_reduce_sum_(sums), strict=True))


class MetricLogger:
    """Writes `<output_dir>/metrics.jsonl`, shows progress, and feeds the loggers.

    Sums and gradient norms stay on the device until `log`, which fetches them in one transfer. In a process group all
    ranks call it alike, and only rank 0 writes and shows anything.

    Args:
        run: has `output_dir` and `device`. Lines of steps from `first_step` on, left by a run that got further than its
            last checkpoint, are removed.
        options: the config group; its loggers are built on rank 0: objects with `log(values, step)` and `close()`.
        max_steps: the last step.
        tokens_per_step: tokens of an optimizer step that are not padding.
        flops_per_token, peak_flops: for MFU, the peak of one device; None: not reported.
        first_step: the step to begin with.
    """

    def __init__(
        self,
        run: Run,
        options: LogConfig | None = None,
        *,
        max_steps: int,
        tokens_per_step: float,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        first_step: int = 1,
    ):
        self.is_main = collectives.rank() == 0
        loggers = options.loggers if options and self.is_main else []
        self.loggers = [build(logger, output_dir=str(run.output_dir)) for logger in loggers]
        self.baseline_evaluations = options and options.baseline_evaluations
        self.max_steps, self.device, self._peak = max_steps, run.device, 0
        self.tokens_per_step, self.flops_per_token = tokens_per_step, flops_per_token
        self.peak_flops = peak_flops and peak_flops * collectives.world_size()
        self.path = Path(run.output_dir) / "metrics.jsonl"
        self._open_file(first_step)
        self._evaluations = dict(collectives.run_on_rank0_and_broadcast(lambda: _evaluations(self.path)))
        self.sums: dict[str, Tensor] = {}
        self.targets = torch.zeros((), device=run.device)
        self.first_step, self.begun = first_step, 0
        self.finished = first_step - 2  # `begin_step` counts one
        self._begin_interval(first_step - 1)
        self.bar = None
        if self.is_main and sys.stderr.isatty():
            layout = "{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}{postfix}"
            self.bar = tqdm(total=max_steps, initial=first_step - 1, bar_format=layout)

    def __enter__(self) -> "MetricLogger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, sums: Mapping[str, Tensor], num_targets: int, skipped: Tensor | None = None) -> None:
        """Counts a step, without waiting for the device.

        Args:
            sums: name -> the sum over the step's targets, of all ranks; `loss` is among them. `<name>` or `loss/<name>`
                with `targets/<name>` beside it is a sum over that many (see `document_class_loss`, `by_source`).
            num_targets: how many targets.
            skipped: not 0 where the step was skipped; if its loss is not finite, either, it is not in the mean.
        """
        skipped = torch.zeros_like(self.targets) if skipped is None else skipped * ~sums["loss"].isfinite()
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0) + torch.where(skipped > 0, 0, value)
        self.targets += torch.where(skipped > 0, 0, num_targets)

    def track(self, batches: Sequence[T]) -> Iterator[T]:
        """Yields the micro-batches of a step, and shows how far a step is that takes long."""
        shown = time.perf_counter()
        for number, batch in enumerate(batches, 1):
            yield batch
            if (now := time.perf_counter()) - shown > SHOW_PROGRESS_AFTER and number < len(batches):
                shown = now
                self.print(f"step {self.finished + 1}: micro-batch {number:,} of {len(batches):,}")

    @contextmanager
    def begin_step(self) -> Iterator[None]:
        """Counts the time in this context as waiting for data. Open it once, at the beginning of every step."""
        if self.begun == 1:
            self._report_first_step()
        self.begun, self.finished = self.begun + 1, self.finished + 1
        if self.bar is not None:
            self.bar.update(self.finished - self.bar.n)
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextmanager
    def exclude_time(self) -> Iterator[None]:
        """Leaves the time in this context, for evaluation or saving, out of the training time."""
        start = time.perf_counter()
        yield
        self.paused += time.perf_counter() - start

    def truncate_after(self, step: int) -> None:
        """Removes the lines after `step`, to which the run has rolled back."""
        self.sums = {}
        self.targets.zero_()
        if self.is_main:
            self.file.close()
        self._open_file(step + 1)
        self._evaluations = {past: values for past, values in self._evaluations.items() if past <= step}
        self.finished = step - 1
        self._begin_interval(step)

    def log(self, step: int, *, lr: float, grad_norm: Tensor, **more: float | list[float]) -> dict[str, float]:
        """Logs the steps since the last call: losses and other sums become means over their targets.

        A sum with `targets/<name>` beside it becomes a mean over these, and is left out where there was no target.

        Args:
            step: the last step done.
            lr: its learning rate.
            grad_norm: the norm of its gradient, before clipping.
            more: other numbers for the line; lists of numbers are kept in the file only.

        Returns:
            The line. Numbers that are not finite are in it as they are, in the file they are null.
        """
        values = [*self.sums.values(), self.targets, grad_norm.to(self.targets.dtype)]
        *sums, num_targets, norm = torch.stack(values).tolist()
        means = _means(dict(zip(self.sums, sums, strict=True)), num_targets)
        loss = means.pop("loss")
        seconds = max(time.perf_counter() - self.start - self.paused, 1e-9)
        steps = max(1, step - self.interval_start)
        rate = steps * self.tokens_per_step / seconds
        line: dict[str, float] = {
            "step": step,
            "tokens": round(step * self.tokens_per_step),
            "loss": loss,
            "perplexity": math.exp(min(loss, 700)),
            "lr": float(lr),
            "grad_norm": norm,
            "tokens_per_second": rate,
            "data_wait_fraction": self.waited / seconds,
            "peak_memory_gib": self._memory(),
            "eta_s": (self.max_steps - step) * seconds / steps,
        }
        if self.flops_per_token and self.peak_flops:
            line["mfu"] = rate * self.flops_per_token / self.peak_flops
        line |= means | more
        self.sums = {}
        self.targets.zero_()
        self._begin_interval(step)
        self._record(line, step)
        text = f"loss {loss:.3f}, lr {line['lr']:.1e}, grad_norm {norm:.2f}, {rate:,.0f} tokens/s"
        if self.bar is not None:
            self.bar.set_postfix_str(f"{text}, {_clock(line['eta_s'])} left", refresh=False)
            self.bar.update(step - self.bar.n)
        else:
            self.print(f"step {step}/{self.max_steps}: {text}, {_clock(line['eta_s'])} left")
        return line

    def log_eval(self, step: int, results: dict[str, dict[str, float]], suffix: str = "") -> dict[str, float]:
        """Logs evaluations, by set, as `eval/<set><suffix>/<metric>`, and returns them under these names.

        With `log.baseline_evaluations` it adds `at_baseline`, the number of evaluations in a row, up to this one, whose
        accuracy was no better than the unigram baseline's (see `kinds_at_baseline`; the one before the first step does
        not count), and prints a warning whenever that is a multiple of `log.baseline_evaluations`.
        """
        if not results:
            return {}
        warnings = []
        if self.baseline_evaluations:
            results = dict(results)
            for name, values in results.items():
                kinds = kinds_at_baseline(values)
                if kinds is not None:
                    count = self._previous(f"eval/{name}{suffix}/at_baseline", step) + 1 if kinds and step else 0
                    results[name] = values | {"at_baseline": count}
                    if count and count % self.baseline_evaluations == 0:
                        warnings.append(baseline_warning(name + suffix, values, kinds, count))
        named = {f"eval/{name}{suffix}/{key}": results[name][key] for name in results for key in results[name]}
        self._evaluations[step] = self.evaluation(step) | named
        self._record({"step": step} | named, step)  # one line: all sets or none, whenever the run is interrupted
        for name, values in results.items():
            for scores in _describe(values):
                self.print(f"step {step}: {name}{suffix} {scores}")
        for warning in warnings:
            self.print(f"step {step}: {warning}")
        return named

    def is_evaluated(self, step: int, suffix: str = "") -> bool:
        """Whether a run before this one has logged evaluations with `suffix` at `step`; the same on all ranks."""
        return any(name.split("/")[1].endswith(suffix) for name in self.evaluation(step))

    def evaluation(self, step: int) -> dict[str, float]:
        """What `log_eval` has logged at `step`, also in a run before this one; {}: nothing. The same on all ranks."""
        return self._evaluations.get(step, {})

    def _previous(self, name: str, step: int) -> int:
        """The last value of an integer in evaluations before `step`; 0: none."""
        found = [past for past in self._evaluations if past < step and name in self._evaluations[past]]
        return int(self._evaluations[max(found)][name]) if found else 0

    def log_samples(self, step: int, samples: Sequence[Any]) -> None:
        """Shows generated text (objects with `prompt` and `text`) and appends it to `<output_dir>/samples.jsonl`."""
        if not self.is_main:
            return
        with self.path.with_name("samples.jsonl").open("a", encoding="utf-8") as file:
            for sample in samples:
                prompt, text = sample.prompt, sample.text
                file.write(json.dumps({"step": step, "prompt": prompt, "text": text}, ensure_ascii=False) + "\n")
                self.print(f"step {step}: sample: {prompt}{text}")

    def close(self) -> None:
        """Closes the file, the bar and the loggers."""
        if self.is_main:
            self.file.close()
        if self.bar is not None:
            self.bar.close()
        for logger in self.loggers:
            logger.close()

    def _begin_interval(self, step: int) -> None:
        """Rates are over the steps after `step`, from now on."""
        self.interval_start = step
        self.start, self.paused, self.waited = time.perf_counter(), 0.0, 0.0

    def _report_first_step(self) -> None:
        """Reports the first step by itself, which compiles and allocates, and leaves it out of the rates."""
        torch.get_device_module(self.device).synchronize()
        if self.interval_start < self.first_step:
            seconds = time.perf_counter() - self.start - self.paused
            self.print(f"first step: {seconds:.1f} s, peak memory {self._memory():.2f} GiB")
            self._begin_interval(self.first_step)

    def _open_file(self, first_step: int) -> None:
        if self.is_main:
            _drop_lines_from(self.path, first_step)
            _drop_lines_from(self.path.with_name("samples.jsonl"), first_step)
            self.file = self.path.open("a", encoding="utf-8")

    def _record(self, line: dict[str, float], step: int) -> None:
        if not self.is_main:
            return
        lists = {key: value for key, value in line.items() if isinstance(value, list)}
        line = {key: value for key, value in line.items() if key not in lists}
        finite = {key: value if math.isfinite(value) else None for key, value in line.items()} | lists
        finite |= {f"{key}_nonfinite": str(value) for key, value in line.items() if not math.isfinite(value)}
        self.file.write(json.dumps(finite, allow_nan=False) + "\n")
        self.file.flush()
        for logger in self.loggers:
            logger.log(line, step)

    def print(self, text: str) -> None:
        """Prints a line, above the bar where there is one; on rank 0 only."""
        if not self.is_main:
            return
        if self.bar is not None:
            self.bar.write(text)
        else:
            with contextlib.suppress(BrokenPipeError):  # `| tee` dies of the Ctrl+C that this run saves after
                print(text, flush=True)

    def _memory(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        if self.device.type == "mps":  # what the driver holds, which falls for `empty_cache` only
            self._peak = max(self._peak, torch.mps.driver_allocated_memory())
            return self._peak / 2**30
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _means(sums: dict[str, float], num_targets: float) -> dict[str, float]:
    """Sums divided by the targets, `<name>` and `loss/<name>` by `targets/<name>` where there are any."""
    targets_of = {}
    for name in sums:
        own = f"targets/{name.removeprefix('loss/')}"
        if own in sums and (name.startswith("loss/") or f"loss/{name}" not in sums):
            targets_of[name] = own
    means = {}
    for name, value in sums.items():
        if name in targets_of.values():
            continue
        count = sums[targets_of[name]] if name in targets_of else num_targets
        if count:
            means[name] = value / count
        elif name not in targets_of:
            means[name] = math.nan
    return means


def _drop_lines_from(path: Path, first_step: int) -> None:
    """Keeps the lines of earlier steps; a last line that a crash cut off goes, too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            if json.loads(line)["step"] < first_step and first_step > 1:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_atomically(path, kept)


def _evaluations(path: Path) -> list[tuple[int, dict[str, float]]]:
    """(Step, metrics by name) of the evaluations in the file."""
    found: dict[int, dict[str, float]] = {}
    for line in map(json.loads, path.read_bytes().splitlines()):
        # A number that is not finite is null, beside its text.
        values = {key: float(line.get(f"{key}_nonfinite", "nan")) if line[key] is None else line[key] for key in line}
        named = {key: values[key] for key in values if key.startswith("eval/") and not key.endswith("_nonfinite")}
        if named:
            found.setdefault(line["step"], {}).update(named)
    return list(found.items())


def _describe(values: Mapping[str, float]) -> list[str]:
    """The metrics of an evaluation as text, those by kind of target (`accuracy/letter`) on a line of their own."""
    kinds = [name.removeprefix("accuracy/") for name in values if name.startswith("accuracy/")]
    overall = {name: value for name, value in values.items() if name.partition("/")[2] not in kinds}
    lines = [", ".join(f"{name} {overall[name]:.3f}" for name in overall if name not in ("targets", "at_baseline"))]
    by_kind = []
    for kind in kinds:
        baselines = [name for name in values if name.endswith(f"_accuracy/{kind}")]  # and of the hidden ones
        shown = ", ".join(f"{name.partition('_accuracy')[0]} {values[name]:.3f}" for name in baselines)
        by_kind.append(f"{kind} {values[f'accuracy/{kind}']:.3f}" + (f" ({shown})" if shown else ""))
    return lines + [f"accuracy by kind: {', '.join(by_kind)}"] * bool(kinds)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
