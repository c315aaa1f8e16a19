"""How long a run lasts: steps, tokens or epochs, as people state them."""

import math

from torchrecipes.errors import UserError


def budget_steps(
    *,
    max_steps: int | None,
    total_tokens: int | None,
    epochs: float | None,
    rows_per_step: int,
    num_rows: int,
    tokens_per_row: float,
) -> int:
    """The number of optimizer steps that a budget pays for, rounded up.

    Args:
        max_steps, total_tokens, epochs: exactly one is given.
        rows_per_step: rows of one optimizer step, over all ranks and micro-batches.
        num_rows: rows of the training corpus, one epoch.
        tokens_per_row: mean number of tokens in a row that are not padding.

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
        return math.ceil(value / (rows_per_step * tokens_per_row))
    return math.ceil(value * num_rows / rows_per_step)
