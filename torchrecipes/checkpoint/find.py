"""Finds the checkpoint that a run resumes from."""

import json
from pathlib import Path

from torchrecipes.errors import UserError
from torchrecipes.manifest import verify


def find_checkpoint(output_dir: str | Path, resume: str = "auto") -> tuple[Path | None, dict[Path, list[str]]]:
    """The checkpoint that a run would resume from; reads every file of it, and changes nothing.

    Args:
        output_dir: the run's folder.
        resume: `auto`: the newest valid one; `never`: none; else the path of a checkpoint, of any run.

    Returns:
        Its folder, None if there is none; and the corrupt ones that were skipped, each with its problems.

    Raises:
        UserError: the path is not a valid checkpoint, or all of the run's are corrupt (code `corrupt_checkpoint`); or
            the run has newer ones (code `newer_checkpoints`).
    """
    folder, skipped = Path(output_dir) / "checkpoints", {}
    if resume == "never":
        return None, skipped
    if resume != "auto":
        return _named(Path(resume).resolve(), folder), skipped  # resolved, as checkpoints/best is a link
    found = list_checkpoints(folder)
    for path in reversed(found):
        problems = verify(path)
        if not problems:
            print(f"resuming from {path}", flush=True)
            return path, skipped
        skipped[path] = problems
        print(f"skipping corrupt checkpoint {path}: {'; '.join(problems)}", flush=True)
    if found:
        raise UserError(
            f"every checkpoint in {folder} is corrupt",
            hint="Delete that folder to start again from step 1, or give checkpoint.resume=PATH with a valid one.",
            code="corrupt_checkpoint",
        )
    return None, skipped


def list_checkpoints(folder: Path) -> list[Path]:
    """The visible checkpoints in `<output_dir>/checkpoints`, oldest first, valid or not."""
    names = (path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit())
    return sorted((path for path in names if path.is_dir()), key=step_of)


def step_of(path: Path) -> int:
    """The step in the name of a run's checkpoint."""
    return int(path.name.removeprefix("step-"))


def _named(path: Path, folder: Path) -> Path:
    if problems := verify(path):
        raise UserError(
            f"{path} is not a valid checkpoint: {'; '.join(problems)}",
            key="checkpoint.resume",
            hint="Give another one.",
            code="corrupt_checkpoint",
        )
    newest = max(list_checkpoints(folder), key=step_of, default=None)
    if newest and step_of(newest) > json.loads((path / "manifest.json").read_bytes())["step"]:
        raise UserError(
            f"{newest} is newer than {path}: continuing from there would mix two runs in one folder",
            key="checkpoint.resume",
            hint="Give another output_dir=..., or checkpoint.resume=auto for the newest, or delete the newer ones.",
            code="newer_checkpoints",
        )
    return path
