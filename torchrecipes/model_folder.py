"""Finds the model folder that a path stands for: the folder itself, or the newest valid checkpoint of a run."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from torchrecipes.errors import UserError

INDEX = "model.safetensors.index.json"  # names the files where there are several


def has_hf_config(path: str | Path) -> bool:
    """Whether the folder that `path` stands for has a `config.json`, which describes its architecture."""
    return (resolve_model_folder(path) / "config.json").is_file()


def resolve_model_folder(path: str | Path, verify: Callable[[Path], Sequence[str]] | None = None) -> Path:
    """The folder that holds the model's files.

    Args:
        path: a Hugging Face folder, a checkpoint, or a run's folder.
        verify: returns the problems of a checkpoint of a run; see `torchrecipes.checkpoint.manifest.verify`. None:
            checks that every file in the manifest exists with its size.

    Raises:
        UserError: `not_found` if there is no such folder, `no_model` if it holds no model, `corrupt_checkpoint` if none
            of the run's checkpoints is valid.
    """
    folder = Path(path)
    if not folder.is_dir():
        hint = "Give a Hugging Face folder, a checkpoint, or a run's folder. Models are not downloaded"
        raise UserError(f"{folder} does not exist", hint=hint, code="not_found")
    if any((folder / name).is_file() for name in ("config.json", "model.safetensors", INDEX)):
        return folder
    checkpoints = sorted((folder / "checkpoints").glob("step-*[0-9]"), key=lambda found: (len(found.name), found.name))
    for checkpoint in reversed(checkpoints):
        if not (verify or _missing_files)(checkpoint):
            return checkpoint
    if checkpoints:
        raise UserError(f"every checkpoint in {folder / 'checkpoints'} is corrupt", code="corrupt_checkpoint")
    pickles = sorted(file.name for file in folder.glob("*.bin"))
    if pickles:
        raise pickle_error(folder, pickles[0])
    hint = "Give a folder that save_hf() or save_pretrained() wrote, or a run's folder"
    raise UserError(f"{folder} has no config.json, no model.safetensors and no checkpoints", hint=hint, code="no_model")


def pickle_error(folder: Path, name: str) -> UserError:
    """The error for a folder whose weights are in `name` only."""
    return UserError(
        f"{folder} has its weights only in {name}, a pickle: reading one can run code",
        hint="Convert it where you trust it, with the class that config.json names under architectures: "
        "from_pretrained(folder).save_pretrained(folder)",
        code="pickle",
    )


def _missing_files(checkpoint: Path) -> list[str]:
    try:
        files = json.loads((checkpoint / "manifest.json").read_bytes())["files"]
        return [name for name, entry in files.items() if os.path.getsize(checkpoint / name) != entry["size"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [str(error)]
