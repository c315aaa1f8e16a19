"""Everything that can be known to go wrong in a long run, tried in minutes before it is started.

A run is tried by running it: two steps with the real model, data, batch and processes, a checkpoint after each; then
the second checkpoint is taken away, and the same command has to resume from the first and make the second once more, to
the last bit. That shows at once that a step works on every rank, that a checkpoint is saved, loaded and complete, and
that the run can be repeated.
"""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open

from torchrecipes.config import build
from torchrecipes.data.corpus import open_corpus
from torchrecipes.errors import UserError, explain
from torchrecipes.training.estimate_run import estimate_run
from torchrecipes.training.manifest import verify

GIB = 2**30
MANY_EPOCHS = 4  # repeating text more often than this helps little (Muennighoff et al. 2023, 2305.16264)
TRY = ".preflight"  # the folder inside output_dir that is used, and removed


@dataclass(frozen=True)
class Check:
    """A row of the table: `status` is `passed`, `failed` or `skipped`, `reason` is one line or more."""

    name: str
    status: str
    reason: str


def preflight(config: Any, command: list[str], *, world_size: int = 1) -> Iterator[Check]:
    """Checks a run, one thing after another.

    Args:
        config: the recipe's config, checked.
        command: what starts the run, without settings of its own for what is tried here.
        world_size: the processes that the command starts.

    Yields:
        A check as soon as it is done. What could not be tried because of an earlier failure is skipped.
    """
    output_dir = Path(config.output_dir)
    corpus_dir = Path(config.data.corpus_dir or output_dir / "corpus")
    try:
        found = estimate_run(config, world_size=world_size)
    except UserError as error:
        found = None
        yield Check("estimate", "failed", str(error))
    yield (folder := _folder(output_dir, found))
    for number, writer in enumerate(config.metrics):
        yield _writer(number, writer)
    if not config.metrics:
        yield Check("metrics writers", "skipped", "metrics names none; metrics.jsonl is always written")
    if folder.status == "failed":
        yield Check("a real step", "skipped", "because of output_dir")
        return

    trial = output_dir / TRY
    shutil.rmtree(trial, ignore_errors=True)
    try:
        yield from _try(config, command, trial, corpus_dir, found)
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def differing_tensors(first: Path, second: Path) -> list[str]:
    """The names of the tensors that differ between two checkpoints, bit by bit; empty when none does.

    It does not matter which rank has written a tensor, or its shards.
    """
    ours, theirs = _digests(first), _digests(second)
    return [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]


def _digests(folder: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names = tensors.keys()
            for name in names:
                tensor = tensors.get_tensor(name)
                content = xxhash.xxh3_128_hexdigest(tensor.contiguous().view(torch.uint8).numpy())
                found.setdefault(name, []).append(f"{tensor.dtype} {list(tensor.shape)} {content}")
    return {name: sorted(digests) for name, digests in found.items()}


def _folder(output_dir: Path, found: dict[str, Any] | None) -> Check:
    """Whether the folder can be written, and has room for the checkpoints."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir) as file:
            file.write(b"x")
        free = shutil.disk_usage(output_dir).free
    except OSError as error:
        return Check("output_dir", "failed", f"{output_dir}: {error.strerror}. Give another output_dir=...")
    if found is None:
        return Check("output_dir", "passed", f"{output_dir} can be written; {free / GIB:,.1f} GiB are free")
    needed = found["kept_bytes"]
    room = f"{needed / GIB:,.2f} GiB for keep_last checkpoints and one being written, {free / GIB:,.1f} GiB are free"
    if free < needed:
        return Check("output_dir", "failed", f"{room}: make room, lower keep_last, or give another output_dir=...")
    return Check("output_dir", "passed", room)


def _writer(number: int, writer: Any) -> Check:
    """Whether a metrics writer can be built, and takes a value."""
    name = f"metrics.{number}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            built = build(writer, output_dir=folder)
            built.log({"step": 0, "preflight": 1.0}, 0)
            built.close()
        except Exception as error:  # whatever a logger's package raises when it cannot reach its server
            return Check(name, "failed", f"{writer.path}: {explain(error) or repr(error)}")
    return Check(name, "passed", f"{writer.path} has taken a value")


def _try(
    config: Any, command: list[str], trial: Path, corpus_dir: Path, found: dict[str, Any] | None
) -> Iterator[Check]:
    settings = [
        f"output_dir={trial}",
        f"data.corpus_dir={corpus_dir}",
        *("max_steps=2", "total_tokens=null", "epochs=null", "save_every=1", "log_every=1", "eval_every=null"),
        *("keep_last=2", "resume=auto", "metrics=[]"),
        # A warm-up of more steps than there are is refused.
        *("schedule._component_=torchrecipes.optim.constant", "schedule.warmup_steps=null"),
    ]
    problem = _run([*command, *settings])
    rest = ["checkpoint", "data", "budget", "loader workers", "time"]
    if problem:
        yield Check("a real step", "failed", problem)
        for name in rest:
            yield Check(name, "skipped", "because of the step")
        return
    lines = [json.loads(line) for line in (trial / "metrics.jsonl").read_text().splitlines()]
    first, second = lines[0], lines[-1]
    bad = [line for line in lines if line["loss"] is None or line["grad_norm"] is None]
    seconds = found["tokens_per_step"] / second["tokens_per_second"] if found else None
    if bad:
        remedy = "Lower optimizer.lr, lengthen the warm-up or try precision=fp32"
        yield Check("a real step", "failed", f"step {bad[0]['step']}: loss or gradient is not finite. {remedy}")
    else:
        said = f"loss {first['loss']:.3f}, then {second['loss']:.3f}; peak memory {second['memory_gib']:.2f} GiB"
        yield Check("a real step", "passed", said + (f"; {seconds:.2f} s per step" if seconds else ""))

    yield _repeat([*command, *settings], trial)
    corpora = {name: corpus_dir / name for name in ("train", "validation")}
    train = open_corpus(corpora["train"])
    yield _data(config, train.fingerprint, corpora["validation"])
    yield _budget(config, train.num_tokens, found)
    workers = config.data.num_workers
    if workers:
        yield Check("loader workers", "passed", f"{workers} per process have made the batches of both steps")
    else:
        yield Check("loader workers", "skipped", "data.num_workers is 0: batches are made in the process itself")
    steps = _steps_after(config, found)
    if steps and seconds:
        mfu = f", MFU {second['mfu']:.1%}" if second.get("mfu") else ""
        hours = steps * seconds / 3600
        long = f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
        disk = f"{found['kept_bytes'] / GIB:,.2f} GiB of disk"
        yield Check("time", "passed", f"{steps:,} steps of {seconds:.2f} s: {long}{mfu}; {disk}")
    else:
        yield Check("time", "skipped", "the number of steps is not known")


def _repeat(command: list[str], trial: Path) -> Check:
    """Whether the run resumes from its first checkpoint and makes the second once more."""
    target = trial / "checkpoints" / "step-00000002"
    kept = trial / "second"
    if problems := verify(target):
        return Check("checkpoint", "failed", "; ".join(problems))
    target.rename(kept)
    if problem := _run(command):
        return Check("checkpoint", "failed", f"the run does not resume: {problem}")
    differing = differing_tensors(kept, target)
    if differing:
        shown = "; ".join(differing[:3]) + (f"; and {len(differing) - 3} more" if len(differing) > 3 else "")
        remedy = "A resumed run would go another way; on a GPU deterministic=true may help"
        return Check("checkpoint", "failed", f"step 2, resumed from step 1, differs: {shown}. {remedy}")
    size = sum(file.stat().st_size for file in kept.rglob("*") if file.is_file())
    return Check("checkpoint", "passed", f"saved, loaded, and step 2 repeated to the last bit ({size / GIB:.2f} GiB)")


def _data(config: Any, fingerprint: str, validation: Path) -> Check:
    """Whether the text is that of the checkpoint to resume from, and can be evaluated on."""
    if config.eval_every and not (validation / "corpus.json").exists():
        return Check("data", "failed", "eval_every is set, and there is no validation text")
    found = f"{open_corpus(validation).num_tokens:,} tokens for validation" if config.eval_every else "no evaluation"
    newest = max((Path(config.output_dir) / "checkpoints").glob("step-*"), default=None)
    if newest is None:
        return Check("data", "passed", f"opens; {found}; no checkpoint yet, the run begins at step 1")
    if problems := verify(newest, checksums=False):
        return Check("data", "failed", f"{newest}: {'; '.join(problems)}")
    stored = json.loads((newest / "state.json").read_text(encoding="utf-8"))["state"].get("corpus")
    if stored != fingerprint:
        return Check("data", "failed", f"it is not the corpus that {newest} was trained on: bring the old one back")
    return Check("data", "passed", f"opens; {found}; it is that of {newest}, from which the run goes on")


def _budget(config: Any, tokens: int, found: dict[str, Any] | None) -> Check:
    """How often each text is seen."""
    steps = _steps_after(config, found)
    if not steps:
        return Check("budget", "skipped", "the number of steps is not known")
    epochs = steps * config.rows_per_step * config.seq_len / tokens
    said = f"{steps:,} steps see the {tokens:,} tokens of the corpus {epochs:,.2f} times"
    if epochs > MANY_EPOCHS:
        said += f": more than {MANY_EPOCHS} repetitions teach little; more text would"
    return Check("budget", "passed", said)


def _steps_after(config: Any, found: dict[str, Any] | None) -> int | None:
    """The run's steps; known for `epochs` only now that the corpus is there."""
    if found is None or found["steps"]:
        return found and found["steps"]
    return estimate_run(config)["steps"]


def _run(command: list[str]) -> str:
    """Runs a command to its end. Returns its message if it fails, else nothing."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode == 0:
        return ""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    return "\n".join(lines[-5:]) or f"it ended with exit code {result.returncode}"
