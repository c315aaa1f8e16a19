"""Finds the checkpoint that a run resumes from."""

import json
from contextlib import suppress
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


def stored_length(output_dir: str | Path, resume: str = "auto") -> tuple[int | None, int]:
    """The length that a resumed run has been given: (its `max_steps`, 0), as its newest checkpoint has it.

    (None, 0) if there is no checkpoint; (None, s) if `resume` is the checkpoint of another run's step s.

    Args:
        output_dir: the run's folder.
        resume: as for `find_checkpoint`.

    Raises:
        UserError: as `find_checkpoint`, for another run's checkpoint.
    """
    folder = Path(output_dir) / "checkpoints"
    if resume not in ("auto", "never") and Path(resume).resolve().parent != folder.resolve():
        path, _ = find_checkpoint(output_dir, resume)
        return None, json.loads((path / "state.json").read_bytes())["step"]
    for path in reversed(list_checkpoints(folder)):
        with suppress(OSError, ValueError):  # corrupt: reported when the run resumes
            return json.loads((path / "state.json").read_bytes())["max_steps"], 0
    return None, 0


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
