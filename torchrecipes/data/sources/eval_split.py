"""A split of a data set to evaluate on, instead of documents held out of the one that is trained on."""

from dataclasses import replace
from typing import Any

from torchrecipes.config.suggest import did_you_mean
from torchrecipes.data.sources.records import Source
from torchrecipes.errors import UserError

AUTO = "auto"
USUAL_SPLITS = ("validation", "valid", "val", "eval", "test", "dev")


def split_for_evaluation(source: Any, split: str, max_documents: int | None = None) -> Source:
    """Another split of a source that has several.

    Args:
        source: has `split`, its own, and `splits()`, the names of all.
        split: its name; `auto`: the first of `USUAL_SPLITS` that is there.
        max_documents: the first documents of it, so many. None: all.

    Raises:
        UserError: the source has no splits, or none of this name (code `no_such_split`).
    """
    names = source.splits() if hasattr(source, "splits") else []
    others = [name for name in names if name != source.split]
    chosen = next((name for name in USUAL_SPLITS if name in others), None) if split == AUTO else split
    if chosen not in others:
        wanted = f"no split named {', '.join(USUAL_SPLITS)}" if split == AUTO else f"no split '{split}' beside its own"
        raise UserError(
            f"{source.name} has {wanted}",
            key="data.eval_split",
            hint=(did_you_mean(split, others, "Its other splits are") if others else "It has no other splits.")
            + " Without eval_split, data.validation_fraction or data.eval_samples holds documents out.",
            code="no_such_split",
        )
    return replace(source, split=chosen, **({"max_documents": max_documents} if max_documents else {}))
