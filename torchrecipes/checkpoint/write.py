"""Writes a checkpoint: every rank its files, then rank 0 the manifest, and last the name by which it is visible."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from torchrecipes.checkpoint.tensor_files import save_shards
from torchrecipes.distributed import collectives
from torchrecipes.errors import UserError
from torchrecipes.manifest import HIDDEN, flush, fsync, write_manifest
from torchrecipes.models.hub import write_tensors


@dataclass(frozen=True)
class Save:
    """What is to be written; nothing in it changes while training continues.

    Attributes:
        step: optimizer steps done.
        target: the checkpoint's folder; `hidden` is the one that is written and then renamed.
        needed: bytes, about, for the message when the disk is full.
        rng: random generators of all ranks.
        contents: of files that rank 0 writes.
        files: model file -> the tensors that this rank writes into it.
        sharded: `optimizer` and `state` -> tensors as they are sharded.
    """

    step: int
    target: Path
    hidden: Path
    needed: int
    contents: dict[str, bytes]
    rng: dict[str, Tensor]
    files: dict[str, dict[str, Tensor]]
    sharded: dict[str, dict[str, Tensor]]


def write_checkpoint(job: Save, group: dist.ProcessGroup | None) -> None:
    """Writes the files with all ranks, then lets rank 0 make the checkpoint visible.

    Args:
        job: the same step and folders on every rank, and this rank's tensors.
        group: a gloo group of all ranks; None: one process.

    Raises:
        UserError: on all ranks, if the disk refuses it on any (code `cannot_save`); nothing is visible then.
    """
    reports = collectives.all_gather_object(_write_own_files(job, group), group)
    problems = [problem for problem, _ in reports if problem]
    files = {name: entry for _, entries in reports for name, entry in entries.items()}
    collectives.run_on_rank0_and_broadcast(lambda: _publish(job, problems, files), group)


def _write_own_files(job: Save, group: dist.ProcessGroup | None) -> tuple[str, dict[str, dict]]:
    """Writes this rank's files: (what went wrong or "", the files' entries for the manifest)."""
    problem, names, entries = "", [], {}
    try:
        with disk_errors(job.target.parent, job.needed):
            for name, tensors in job.files.items():
                (job.hidden / name).parent.mkdir(parents=True, exist_ok=True)
                write_tensors(tensors, job.hidden / name)
                names.append(name)
            if collectives.rank() == 0:
                write_tensors(job.rng, job.hidden / "rng.safetensors")
                for name, content in job.contents.items():
                    (job.hidden / name).parent.mkdir(parents=True, exist_ok=True)
                    (job.hidden / name).write_bytes(content)
    except UserError as error:
        problem = str(error)
    try:
        # All ranks have to take part, also one that has failed already.
        with disk_errors(job.target.parent, job.needed):
            for part, tensors in job.sharded.items():
                names += save_shards(tensors, job.hidden / part, group)
            entries = flush(job.hidden, names)
    except UserError as error:
        problem = problem or str(error)
    return problem, entries


def _publish(job: Save, problems: list[str], files: dict[str, dict]) -> None:
    folder = job.target.parent
    try:
        if problems:
            raise UserError(problems[0], code="cannot_save")
        with disk_errors(job.target.parent, job.needed):
            found = [file for file in job.hidden.rglob("*") if file.is_file()]
            rest = {str(file.relative_to(job.hidden)) for file in found} - files.keys()  # config, tokenizer, ...
            write_manifest(job.hidden, job.step, files | flush(job.hidden, rest))
            if job.target.exists():
                os.rename(job.target, folder / f"{HIDDEN}corrupt-{job.target.name}")
            os.rename(job.hidden, job.target)
            fsync(folder)
            fsync(folder.parent)  # which `checkpoints` itself may be new in
    except BaseException:
        shutil.rmtree(job.hidden, ignore_errors=True)
        raise


@contextmanager
def disk_errors(folder: Path, needed: int) -> Iterator[None]:
    """Turns a disk's errors into a UserError (code `cannot_save`); safetensors raises its own class for them."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(there).free
        raise UserError(
            f"cannot save in {folder}: {reason}; a checkpoint takes about {needed / 2**20:,.0f} MiB, and "
            f"{free / 2**20:,.0f} MiB are free",
            hint="Make room there, or make it writable, and run the same command to resume from the newest checkpoint; "
            "older ones are untouched.",
            code="cannot_save",
        ) from error
