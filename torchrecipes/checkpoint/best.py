"""The best checkpoint of a run by an evaluation metric: `checkpoints/best.json`, and the link `checkpoints/best`."""

import contextlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torchrecipes.atomic_write import write_atomically
from torchrecipes.manifest import HIDDEN, read_digest, verify


@dataclass
class KeepBest:
    """Which checkpoint is best: the one with the lowest or highest value of an evaluation metric."""

    metric: str  # as in metrics.jsonl: eval/validation/loss
    mode: Literal["min", "max"] = "min"


def best_checkpoint(folder: Path) -> dict | None:
    """What `best.json` says, if the checkpoint that it names is still the one that was evaluated.

    Args:
        folder: `<output_dir>/checkpoints`.

    Returns:
        `checkpoint` (a name), `metric`, `mode`, `value`; or None.
    """
    try:
        best = json.loads((folder / "best.json").read_bytes())
        return best if read_digest(folder / best["checkpoint"]) == best["manifest"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def mark_if_best(target: Path, keep: KeepBest, value: float) -> bool:
    """Makes `target` the best checkpoint of its folder if it is valid and its value better than the best one's."""
    best = best_checkpoint(target.parent)
    if best and (best["metric"], best["mode"]) == (keep.metric, keep.mode):
        better = value < best["value"] if keep.mode == "min" else value > best["value"]
    else:
        better = not math.isnan(value)
    if not better or verify(target, checksums=False):
        return False
    entry = {"checkpoint": target.name, "metric": keep.metric, "mode": keep.mode, "value": value}
    entry["manifest"] = read_digest(target)
    write_atomically(target.parent / "best.json", [json.dumps(entry).encode() + b"\n"])
    link_best(target.parent)
    return True


def link_best(folder: Path) -> None:
    """Points the link `best` to the best checkpoint, or removes it; where links are not possible there is none."""
    best = best_checkpoint(folder)
    link, temporary = folder / "best", folder / f"{HIDDEN}best"
    with contextlib.suppress(OSError):
        if best is None:
            link.unlink(missing_ok=True)
        elif not link.is_symlink() or os.readlink(link) != best["checkpoint"]:
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(best["checkpoint"])
            os.replace(temporary, link)
