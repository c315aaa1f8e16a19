"""Cases, shares of time, timing and the JSON file of `benchmarks/gpu.py`."""

import gc
import os
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_supervise import DEVICE_LOST, write_json

GIB = 2**30


class Bench:
    """Runs cases one after the other and keeps their rows.

    A row is a dict of JSON values with `part` and `case`; that of a case that failed has `error`. The file is written
    again after every row, so that a process that is killed leaves what it has measured, and one that is started with
    such a file continues with the next case.

    Attributes:
        device, tiny: where, and whether shapes are small enough for a CPU.
        folder: for corpora and the folders of runs.
        content: what the JSON file holds; `rows` among it.
    """

    def __init__(self, device: torch.device, tiny: bool, path: Path, folder: Path, content: dict[str, Any]):
        self.device, self.tiny, self.path, self.folder, self.content = device, tiny, path, folder, content
        self.done = {(row["part"], row["case"]) for row in self.rows} | {tuple(x) for x in self.content["left_out"]}
        self.limit = 60 * content["minutes"]
        self.part, self.case, self.deadline, self.expected = "", "", float("inf"), 0.0

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.content["rows"]

    def elapsed(self) -> float:
        return time.time() - self.content["started"]

    def begin(self, part: str, share_before: float, share: float) -> None:
        """Starts a part: its time ends when the shares of all parts up to it are over, but not before half its own."""
        now = self.elapsed()
        self.part, self.expected = part, 0.0
        self.deadline = max((share_before + share) * self.limit, now + 0.5 * share * self.limit)
        print(f"\n== {part}: until {self.deadline / 60:.1f} of {self.limit / 60:g} minutes ==", flush=True)

    def run(self, case: str, function: Callable[..., None], *args: Any) -> None:
        """Runs a case, which calls `add`, unless it was run before or would end long after the part's time."""
        if (self.part, case) in self.done:
            return
        self.done.add((self.part, case))
        if self.elapsed() + self.expected > self.deadline:
            self.content["left_out"].append([self.part, case])
            print(f"{self.part} | {case}: left out, the time of this part is over", flush=True)
            self._write()
            return
        self.case, begun, failure = case, time.time(), None
        self.content["running"] = {"part": self.part, "case": case, "since": begun}
        self._write()
        try:
            function(self, *args)
        except Exception as error:
            failure = {"error": describe(error), "traceback": traceback.format_exc()[-3000:]}
        if failure is not None:
            self.add(**failure)
        self.content["running"] = None
        self.content["seconds"][f"{self.part} | {case}"] = round(time.time() - begun, 1)
        self.expected = 0.5 * (time.time() - begun)  # the next one may be shorter, and some time over is no harm
        self._write()
        clean_up(self.device)
        if failure is not None:
            self._check_device()

    def add(self, **figures: Any) -> None:
        """Adds a row of the running case, prints it and writes the file."""
        self.rows.append({"part": self.part, "case": self.case})
        self.extend(**figures)

    def extend(self, **figures: Any) -> None:
        """Adds figures to the last row."""
        self.rows[-1] |= figures
        hidden = ("traceback", "kernels", "losses")
        shown = ", ".join(f"{key} {_short(value)}" for key, value in figures.items() if key not in hidden)
        print(f"{self.part} | {self.case}: {shown}", flush=True)
        self._write()

    def note(self, text: str) -> None:
        """Adds a remark that the report ends with."""
        if text not in self.content["notes"]:
            self.content["notes"].append(text)
            print(f"{self.part}: {text}", flush=True)
            self._write()

    def _write(self) -> None:
        write_json(self.path, self.content)

    def _check_device(self) -> None:
        """After an illegal access every call fails: the process ends, and the next one continues."""
        if self.device.type != "cuda":
            return
        try:
            torch.zeros(8, device=self.device).sum().item()
        except Exception as error:
            print(f"the GPU does not answer any more: {describe(error)}", flush=True)
            os._exit(DEVICE_LOST)


def describe(error: BaseException) -> str:
    """An error's type and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
    return f"{kind}: {lines[0][:400]}" if lines else kind


def time_ms(device: torch.device, *steps: Callable[[], None], seconds: float = 0.25, most: int = 30) -> list[float]:
    """Median milliseconds of each of several functions that are called one after the other, again and again.

    On a GPU by events. The GPU sleeps at first while the host fills its queue, so that a function whose kernels are
    shorter than their launches is measured by its kernels, as in training, where the host runs ahead.

    Args:
        steps: for example a forward pass that keeps its output and a backward pass that takes it.
        seconds: about how long to measure.
        most: rounds at most; at least 3.
    """
    if device.type != "cuda":
        for step in steps:
            step()
        return [_seconds(step) * 1e3 for step in steps]
    for _ in range(3):
        for step in steps:
            step()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for step in steps:
        step()
    host = time.perf_counter() - begun
    torch.cuda.synchronize()
    rounds = int(min(most, max(3, seconds / (time.perf_counter() - begun))))
    at_once = max(1, int(0.05 / host))  # rounds for which the GPU waits
    measured = []
    for number in range(rounds):
        if number % at_once == 0:
            torch.cuda.synchronize()
            torch.cuda._sleep(int(2e9 * min(0.1, 1.2 * host * min(at_once, rounds) + 1e-3)))  # cycles, 2 GHz at most
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
        events[0].record()
        for step, event in zip(steps, events[1:], strict=True):
            step()
            event.record()
        measured.append(events)
    torch.cuda.synchronize()
    return [statistics.median(events[i].elapsed_time(events[i + 1]) for events in measured) for i in range(len(steps))]


def peak_bytes(device: torch.device, function: Callable[[], object]) -> int:
    """Bytes that a call takes at its peak beyond those that were taken before and what it returns; 0 on a CPU."""
    if device.type != "cuda":
        function()
        return 0
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = function()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    after = torch.cuda.memory_allocated() - before
    del kept
    return peak - after


def clean_up(device: torch.device) -> None:
    """Frees what the last case held: compiled code keeps tensors alive, too."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:  # a lost device, as the next check will see
            print(describe(error), flush=True)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """`|actual - expected| / |expected|` of two tensors taken as vectors, in float64."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def _seconds(function: Callable[[], object]) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, dict):
        return " ".join(f"{key} {_short(part)}" for key, part in value.items())
    return str(value)
