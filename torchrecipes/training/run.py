"""The start of a run: its folder, its device, its seed."""

import os
import random
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
import yaml

from torchrecipes.errors import UserError
from torchrecipes.training.memory import keep_freed_memory

# Keys that change how a run is watched or kept, and none of its numbers: a run may be continued with other values.
MAY_CHANGE = (
    "output_dir",
    "resume",
    "log_every",
    "eval_every",
    "eval_rows",
    "save_every",
    "keep_last",
    "metrics",
    "data.num_workers",
    "data.tokenize_workers",
)


@dataclass(frozen=True)
class Run:
    """What a run stands on.

    Attributes:
        output_dir: the run's folder; it exists and can be written.
        device: where the model lives: the first GPU if there is one, else the CPU.
    """

    output_dir: Path
    device: torch.device


def start_run(output_dir: str | Path, *, seed: int, config_yaml: str, resume: str) -> Run:
    """Makes the run's folder, seeds every generator and picks the device.

    Args:
        output_dir: the run's folder, made if needed.
        seed: seeds `random`, NumPy and torch. What the library draws itself (weights, order, masks) is a pure function
            of the seed and does not read these generators; dropout does.
        config_yaml: the resolved config. It is written to `<output_dir>/config.yaml`; when that file is there already,
            the two are compared.
        resume: `auto`, `never` or the path of a checkpoint.

    Raises:
        UserError: the folder cannot be written, or it holds a run with other settings, or, for `never`, any run.
    """
    folder = Path(output_dir)
    config_file = folder / "config.yaml"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("WORLD_SIZE is set: runs over several processes are not supported yet. Start one process.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        has_checkpoints = any((folder / "checkpoints").glob("step-*"))
        if has_checkpoints and resume == "never":
            raise UserError(
                f"{folder} holds the checkpoints of a run, and resume=never would write over them. Give another "
                f"output_dir=..., or delete the folder, or continue the run with resume=auto."
            )
        if has_checkpoints and config_file.exists():
            _check_same_settings(config_file, config_yaml)
        temporary = config_file.with_suffix(".tmp")
        temporary.write_text(config_yaml, encoding="utf-8")
        os.replace(temporary, config_file)
    except OSError as error:
        raise UserError(f"output_dir: cannot write {folder}: {error.strerror}. Give another output_dir=...") from error

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if torch.cuda.is_available():
        return Run(folder, torch.device("cuda", 0))
    keep_freed_memory()
    return Run(folder, torch.device("cpu"))


def _check_same_settings(config_file: Path, config_yaml: str) -> None:
    old, new = _flat(yaml.safe_load(config_file.read_text(encoding="utf-8"))), _flat(yaml.safe_load(config_yaml))
    differing = [
        key
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not any(key == may or key.startswith(may + ".") for may in MAY_CHANGE)
    ]
    if not differing:
        return
    lines = [f"  {key}: {old.get(key, 'absent')} there, {new.get(key, 'absent')} now" for key in differing]
    folder = config_file.parent
    raise UserError(
        "\n".join([f"{folder} holds a run with other settings:", *lines]) + "\nTo start a new run: output_dir=OTHER. "
        f"To go on from its weights with the new settings: output_dir=OTHER resume={folder}/checkpoints/step-... "
        f"To continue it as it was: give the values on the left. To throw it away: delete {folder}."
    )


def _flat(node: object, prefix: str = "") -> dict[str, object]:
    if isinstance(node, dict) and node:
        return {k: v for key, child in node.items() for k, v in _flat(child, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): node}
