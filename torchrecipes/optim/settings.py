"""Range checks of optimizer settings, so that all that is wrong is reported at once."""

import math

from torchrecipes.errors import UserError


def out_of_range(key: str, value: object, wanted: str) -> UserError:
    """The mistake that a setting has a value it must not have."""
    return UserError(f"{value} must be {wanted}", key=key, code="out_of_range")


def negative(**values: float) -> list[UserError]:
    """A mistake for each of the values that is not a finite number of 0 or more."""
    return [out_of_range(key, value, "0 or more") for key, value in values.items() if not 0 <= value < math.inf]


def bad_betas(key: str, betas: tuple[float, ...]) -> list[UserError]:
    """The mistake in AdamW's betas, if there is one."""
    if len(betas) == 2 and all(0 <= beta < 1 for beta in betas):
        return []
    return [out_of_range(key, list(betas), "two numbers from 0 up to, not including, 1, such as [0.9, 0.98]")]


def nothing_to_train() -> UserError:
    """The mistake that no parameter is trainable."""
    return UserError(
        "no parameter is trainable",
        key="model",
        hint="Set requires_grad=True on the parameters to train.",
        code="nothing_to_train",
    )


def raise_all(problems: list[UserError]) -> None:
    """Raises the mistakes as one; does nothing if there is none.

    Raises:
        UserError: the mistake, or one that lists them all.
    """
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise UserError("\n".join(map(str, problems)), code="several", problems=problems)
