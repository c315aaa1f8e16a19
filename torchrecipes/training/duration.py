"""The length of a run: optimizer steps, from the budget that a config states in steps, tokens or epochs."""

import math
from typing import Any

from torchrecipes.errors import UserError


def resolve_max_steps(config: Any, dataset: Any) -> int:
    """The number of optimizer steps that a budget pays for, rounded up, and prints it.

    Args:
        config: has `global_batch_size` (rows of one optimizer step, over all ranks and micro-batches), and exactly one
            of `max_steps`, `total_tokens` and `epochs` that is not None.
        dataset: the training rows: has `num_rows`, those of one epoch, and `tokens_per_row`, the mean number of tokens
            in a row that are not padding.

    Raises:
        UserError: none or several are given, or the budget is not positive (code `budget`).
    """
    names = ("max_steps", "total_tokens", "epochs")
    given = {name: value for name in names if (value := getattr(config, name)) is not None}
    if len(given) != 1:
        raise UserError(
            f"{' and '.join(given)} are set" if given else "none of them is set",
            key=", ".join(names),
            hint="Set exactly one, and the others to null, as in max_steps=1000 total_tokens=null epochs=null.",
            code="budget",
        )
    ((name, value),) = given.items()
    if value <= 0:
        raise UserError(f"{value} trains nothing", key=name, hint="Give a number above 0.", code="budget")
    tokens_per_step = config.global_batch_size * dataset.tokens_per_row
    if name == "total_tokens":
        value = math.ceil(value / tokens_per_step)
    elif name == "epochs":
        value = math.ceil(value * dataset.num_rows / config.global_batch_size)
    print(
        f"duration: {value:,} steps of {round(tokens_per_step):,} tokens, {round(value * tokens_per_step):,} in total, "
        f"{value * config.global_batch_size / dataset.num_rows:.2f} epochs",
        flush=True,
    )
    return value
