"""How long a run lasts: steps, tokens or epochs, as people state them."""

import math

from torchrecipes.errors import UserError


def resolve_max_steps(
    rows, global_batch_size: int, *, max_steps: int | None, total_tokens: int | None, epochs: float | None
) -> int:
    """The number of optimizer steps that a budget pays for, rounded up.

    Args:
        rows: of the training corpus: has `num_rows`, those of one epoch, and `tokens_per_row`, the mean number of
            tokens in a row that are not padding.
        global_batch_size: rows of one optimizer step, over all ranks and micro-batches.
        max_steps, total_tokens, epochs: exactly one is given.

    Raises:
        UserError: none or several are given, or the budget is not positive.
    """
    given = {
        name: value
        for name, value in (("max_steps", max_steps), ("total_tokens", total_tokens), ("epochs", epochs))
        if value is not None
    }
    if len(given) != 1:
        problem = f"{' and '.join(given)} are set" if given else "none of them is set"
        raise UserError(
            f"max_steps, total_tokens, epochs: {problem}. Set exactly one, and the others to null, e.g. max_steps=1000"
            + " total_tokens=null epochs=null."
        )
    ((name, value),) = given.items()
    if value <= 0:
        raise UserError(f"{name}: {value} trains nothing. Give a number above 0.")
    if name == "max_steps":
        return value
    if name == "total_tokens":
        return math.ceil(value / (global_batch_size * rows.tokens_per_row))
    return math.ceil(value * rows.num_rows / global_batch_size)


def describe_duration(rows, global_batch_size: int, max_steps: int) -> str:
    """A budget in steps, tokens and epochs, as text: the same arguments as `resolve_max_steps`, and what it gave."""
    tokens_per_step = global_batch_size * rows.tokens_per_row
    return (
        f"{max_steps:,} steps of {round(tokens_per_step):,} tokens, {round(max_steps * tokens_per_step):,} in all, "
        f"{max_steps * global_batch_size / rows.num_rows:.2f} epochs"
    )
