"""Finds the model folder that a path stands for: the folder itself, or what a run has to give."""

import difflib
import sys
from pathlib import Path

from torchrecipes.errors import UserError
from torchrecipes.manifest import verify

INDEX = "model.safetensors.index.json"  # names the files where there are several
FINAL = "model"  # of a run: the folder of its result


def has_hf_config(path: str | Path) -> bool:
    """Whether the folder that `path` stands for has a `config.json`, which describes its architecture."""
    return (resolve_model_folder(path) / "config.json").is_file()


def resolve_model_folder(path: str | Path, warn: bool = False) -> Path:
    """The folder that holds the model's files.

    Of a run it is `model`, which a fine-tuning recipe writes at its end, or else the newest checkpoint whose files have
    the sizes in its manifest; loading compares checksums.

    Args:
        path: a Hugging Face folder, a checkpoint, or a run's folder.
        warn: print which checkpoints of a run are skipped, on stderr.

    Raises:
        UserError: `not_found` if there is no such folder, `no_model` if it holds no model, `corrupt_checkpoint` if none
            of the run's checkpoints is valid.
    """
    folder = Path(path)
    if not folder.is_dir():
        hint = "Give a Hugging Face folder, a checkpoint, or a run's folder. Models are not downloaded"
        near = similar_folder(folder)
        hint = f"Did you mean {near}?" if near else hint
        raise UserError(f"{folder} does not exist", hint=hint, code="not_found")
    if any((folder / name).is_file() for name in ("config.json", "model.safetensors", INDEX)):
        return folder
    if (folder / FINAL / "manifest.json").is_file() and not verify(folder / FINAL, checksums=False):
        return folder / FINAL
    checkpoints = sorted((folder / "checkpoints").glob("step-*[0-9]"), key=lambda found: (len(found.name), found.name))
    for checkpoint in reversed(checkpoints):
        problems = verify(checkpoint, checksums=False)
        if not problems:
            return checkpoint
        if warn:
            print(f"skipping corrupt checkpoint {checkpoint}: {'; '.join(problems)}", file=sys.stderr)
    if checkpoints:
        raise UserError(f"every checkpoint in {folder / 'checkpoints'} is corrupt", code="corrupt_checkpoint")
    pickles = sorted(file.name for file in folder.glob("*.bin"))
    if pickles:
        raise pickle_error(folder, pickles[0])
    hint = "Give a folder that save_hf() or save_pretrained() wrote, or a run's folder"
    raise UserError(f"{folder} has no config.json, no model.safetensors and no checkpoints", hint=hint, code="no_model")


def similar_folder(path: str | Path) -> Path | None:
    """The folder beside a missing one whose name is the most similar, if any is."""
    folder = Path(path)
    near = difflib.get_close_matches(folder.name, [other.name for other in folder.parent.glob("*/")], n=1)
    return folder.parent / near[0] if near else None


def pickle_error(folder: Path, name: str) -> UserError:
    """The error for a folder whose weights are in `name` only."""
    return UserError(
        f"{folder} has its weights only in {name}, a pickle: reading one can run code",
        hint="Convert it where you trust it, with the class that config.json names under architectures: "
        "from_pretrained(folder).save_pretrained(folder)",
        code="pickle",
    )
