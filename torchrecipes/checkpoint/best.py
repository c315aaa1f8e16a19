"""The best checkpoint of a run by an evaluation metric: `checkpoints/best.json`, and the link `checkpoints/best`."""

import contextlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torchrecipes.atomic_write import write_atomically
from torchrecipes.manifest import HIDDEN, read_digest, verify


@dataclass
class KeepBest:
    """Which checkpoint is best: the one with the lowest or highest value of an evaluation metric."""

    metric: str  # as in metrics.jsonl: eval/validation/loss
    mode: Literal["min", "max"] = "min"
    at_most: dict[str, float] = field(default_factory=dict)  # limits: with another metric above its own, it is not best


def best_checkpoint(folder: Path) -> dict | None:
    """What `best.json` says, if the checkpoint that it names is still the one that was evaluated.

    Args:
        folder: `<output_dir>/checkpoints`.

    Returns:
        `checkpoint` (a name), `metric`, `mode`, `at_most`, `value`; or None.
    """
    try:
        best = json.loads((folder / "best.json").read_bytes())
        return best if read_digest(folder / best["checkpoint"]) == best["manifest"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def mark_if_best(target: Path, keep: KeepBest, metrics: Mapping[str, float]) -> bool:
    """Makes `target` the best checkpoint of its folder if it is valid, within the limits, and better than the best one.

    Args:
        target: the checkpoint's folder.
        keep: which one is best.
        metrics: of `target`, among them those that `keep` names.
    """
    best, value = best_checkpoint(target.parent), metrics[keep.metric]
    rule = {"metric": keep.metric, "mode": keep.mode, "at_most": keep.at_most}
    if best and {"at_most": {}, **best} == {**best, **rule}:
        better = value < best["value"] if keep.mode == "min" else value > best["value"]
    else:
        better = not math.isnan(value)
    if not better or not all(metrics[name] <= limit for name, limit in keep.at_most.items()):
        return False
    if verify(target, checksums=False):
        return False
    entry = {"checkpoint": target.name, **rule, "value": value, "manifest": read_digest(target)}
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
