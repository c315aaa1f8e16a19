"""Checks that a checkpoint can be resumed: the same settings, the same network."""

import difflib
from pathlib import Path

import yaml
from torch import nn

from torchrecipes.config import changed_keys
from torchrecipes.errors import UserError
from torchrecipes.models.hub import architecture_differences


def check_same_architecture(path: Path, model: nn.Module) -> None:
    """Checks that a checkpoint is of this network; keys that only training uses, such as dropout, may differ.

    Args:
        path: the checkpoint's folder.
        model: may be on the meta device, or sharded.

    Raises:
        UserError: it is of another one; names what differs (code `other_model`).
    """
    if problems := architecture_differences(model, path):
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise UserError(
            f"{path} is a checkpoint of another model: {shown}",
            key="model",
            hint="Give the settings it was trained with.",
            code="other_model",
        )


def check_same_settings(config_file: Path, config_yaml: str, schema: type) -> None:
    """Checks that a run is continued with the settings it was started with; those marked `MayChange` may differ.

    Args:
        config_file: `config.yaml` of the run.
        config_yaml: the config of now.
        schema: the recipe's `Config`.

    Raises:
        UserError: names the keys that differ (code `other_settings`).
    """
    old, new = yaml.safe_load(config_file.read_text(encoding="utf-8")), yaml.safe_load(config_yaml)
    differing = changed_keys(old, new, schema)
    if not differing:
        return
    lines = [f"  {key}: saved {saved}, current {current}" for key, (saved, current) in differing.items()]
    folder = config_file.parent
    raise UserError(
        "\n".join([f"{folder} holds a run with other settings:", *lines]),
        hint=f"To start a new run: output_dir=OTHER. To train its weights with the new settings: output_dir=OTHER "
        f"init_from={folder}. To continue it: give the saved values. To discard it: delete {folder}.",
        code="other_settings",
    )


def report_recipe_changes(path: Path, source: str) -> None:
    """Prints by how many lines a recipe differs from the one that saved a checkpoint.

    Args:
        path: the checkpoint's folder.
        source: the recipe's text now; "" if there is none to compare.
    """
    stored = path / "recipe.py"
    if not source or not stored.exists():
        return
    before, now = stored.read_text(encoding="utf-8").splitlines(), source.splitlines()
    changes = list(difflib.unified_diff(before, now, n=0))[2:]  # without the two file names
    added, removed = (sum(line.startswith(sign) for line in changes) for sign in "+-")
    if changes:
        print(
            f"the recipe has changed since {path}: {added} lines added, {removed} removed (saved version: {stored})",
            flush=True,
        )
