"""A dry run: five steps of a run in a folder of their own, the last of which is repeated.

1. `steps` runs the recipe's own command, with its processes, for five steps; a checkpoint is saved after the fourth
   and the fifth.
2. `repeat` removes the fifth checkpoint and runs the command again: it has to resume from the fourth and repeat the
   fifth bit for bit. That checks saving, loading and resuming at once, and that a checkpoint is complete.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from safetensors import safe_open

from torchrecipes.errors import UserError

STEPS = 5  # the first is slow, the next three are timed while nothing is saved, the last is repeated
GRACE_PERIOD = 10  # seconds that a dry run has to end after a signal: it has nothing to keep
_SHOWN = 12  # lines of an error, at most


@dataclass(frozen=True)
class DryRun:
    """A command that starts a run, and the folder it is tried in.

    Attributes:
        command: starts the run, settings included.
        folder: its output_dir; made by the run.
        corpus_dir: the run's own, which is not made again.
        resume: the checkpoint to start from; None: from the first step.
        past: the step of that checkpoint.
        deterministic: also where the run itself is not.
    """

    command: list[str]
    folder: Path
    corpus_dir: Path
    resume: Path | None = None
    past: int = 0
    deterministic: bool = False

    def steps(self) -> list[dict]:
        """Runs the steps. Returns the line of metrics.jsonl of each.

        Raises:
            UserError: the run ended in an error; has its message (code `dry_run_failed`).
        """
        run([*self.command, *self._settings(self.resume or "auto")])
        return self._lines()

    def repeat(self) -> list[str]:
        """Repeats the last step. Returns the names of what differs then, tensors above all.

        Raises:
            UserError: as `steps`, or there is no checkpoint (code `no_checkpoint`).
        """
        last = self._checkpoint(STEPS)
        if not last.is_dir():
            raise UserError(f"there is no checkpoint {last.name}", code="no_checkpoint")
        before, line = contents(last), self._lines()[-1]
        shutil.rmtree(last)  # its digests are kept: this takes no more disk than the run itself
        run([*self.command, *self._settings("auto")])
        after, again = contents(last), self._lines()[-1]
        numbers = [name for name in ("loss", "grad_norm") if line[name] != again[name]]
        return numbers + differing(before, after)

    def checkpoint_bytes(self) -> int:
        """The size of one checkpoint on the disk."""
        return size(self._checkpoint(STEPS))

    def _checkpoint(self, number: int) -> Path:
        return self.folder / "checkpoints" / f"step-{self.past + number:08d}"

    def _lines(self) -> list[dict]:
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [line for line in map(json.loads, lines) if "loss" in line]

    def _settings(self, resume: str | Path) -> list[str]:
        end = self.past + STEPS
        return [
            f"output_dir={self.folder}",
            f"data.corpus_dir={self.corpus_dir}",
            f"checkpoint.resume={resume}",
            *(f"max_steps={end}", "total_tokens=null", "epochs=null", "eval_every=null"),
            # The last step is saved anyway.
            *(f"checkpoint.save_every={end - 1}", "checkpoint.keep_last=2", "checkpoint.keep_best=null"),
            *("log.log_every=1", "log.loggers=[]"),
            # A warm-up of more steps than there are is refused. The null is for a scheduler that is this one already.
            *("lr_scheduler._component_=torchrecipes.optim.constant", "lr_scheduler.warmup_steps=null"),
            *(["compute.deterministic=true"] if self.deterministic else []),
        ]


def contents(checkpoint: Path) -> dict[str, list[str]]:
    """The contents of a checkpoint: tensor or JSON file -> dtype, shape and checksum of each of its pieces.

    The rank that wrote a piece, and its file, do not matter.
    """
    found: dict[str, list[str]] = {}
    for file in checkpoint.rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names = tensors.keys()
            for name in names:
                tensor = tensors.get_tensor(name)
                bits = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()  # -0.0 is not 0.0, and NaN is NaN
                digest = xxhash.xxh3_128_hexdigest(bits)
                found.setdefault(name, []).append(f"{tensor.dtype} {list(tensor.shape)} {digest}")
    for name in ("state.json", "config.json"):
        if (checkpoint / name).exists():
            found[name] = [xxhash.xxh3_128_hexdigest((checkpoint / name).read_bytes())]
    return {name: sorted(pieces) for name, pieces in found.items()}


def differing(first: dict[str, list[str]], second: dict[str, list[str]]) -> list[str]:
    """The names of what differs between the `contents` of two checkpoints, sorted."""
    return [name for name in sorted(first.keys() | second.keys()) if first.get(name) != second.get(name)]


def size(folder: Path) -> int:
    """The bytes of all files in a folder; 0 where there is none."""
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a run removes old checkpoints meanwhile
            total += file.stat().st_size if file.is_file() else 0
    return total


def run(command: list[str]) -> None:
    """Runs a command to its end, and ends it, with all its processes, when this one is interrupted.

    Raises:
        UserError: it ended in an error; has its message (code `dry_run_failed`).
    """
    with tempfile.TemporaryFile() as stderr:
        # A session of its own: Ctrl+C on the terminal reaches this process alone, which ends the other in order.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True
        )
        try:
            code = process.wait()
        except BaseException:
            _end(process)
            raise
        if code:
            stderr.seek(0)
            raise UserError(message_of(code, stderr.read().decode(errors="replace")), code="dry_run_failed")


def message_of(code: int, stderr: str) -> str:
    """The error message of a command that failed: without warnings, and without the rest of a traceback.

    Args:
        code: its exit code, or minus the signal that ended it.
        stderr: all of its output there.
    """
    if code < 0:
        name = signal.Signals(-code).name
        hint = " Out of memory on the host? Try micro_batch_size=auto." if name == "SIGKILL" else ""
        return f"it was ended by {name}.{hint}"
    lines = [line.rstrip() for line in stderr.splitlines() if line.strip()]
    headers = [number for number, line in enumerate(lines) if "Traceback (most recent call last)" in line]
    if headers:
        after = lines[headers[-1] + 1 :]
        start = next((number for number, line in enumerate(after) if not line.startswith((" ", "\t"))), 0)
        shown = after[start : start + _SHOWN]
        return "\n".join([*shown, "This is a bug of the recipe or a component: tune-style run shows where."])
    kept: list[str] = []
    warned = False
    for line in lines:
        warned = bool(re.match(r"\S+:\d+: \w*Warning: ", line)) or (warned and line.startswith("  "))
        if not warned:
            kept.append(line)
    return "\n".join(kept[-_SHOWN:]) or f"it ended with exit code {code} and without a message"


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(2 * GRACE_PERIOD)
    with contextlib.suppress(ProcessLookupError):  # also what it has started, such as loader workers
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
