"""What every form of AdamW is given: checked settings, and groups of parameters."""

import math

from torch import nn

from torchrecipes.errors import UserError
from torchrecipes.optim.groups import weight_decay_groups


def adamw_groups(
    model: nn.Module, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, problems: tuple = ()
) -> list[dict]:
    """Checks the settings and makes the groups of `weight_decay_groups`.

    Args:
        model, lr, betas, eps, weight_decay: see `adamw`.
        problems: what is wrong with other settings, to be told together with what is wrong with these.

    Raises:
        UserError: a value is out of range, or nothing in the model is trainable.
    """
    problems = list(problems)
    if not 0 <= lr < math.inf:
        problems.append(f"lr: {lr} must be 0 or more, such as 1e-3")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        problems.append(f"betas: {list(betas)} must be two numbers from 0 up to, not including, 1, such as [0.9, 0.98]")
    if not 0 <= eps < math.inf:
        problems.append(f"eps: {eps} must be 0 or more, such as 1e-8")
    if not 0 <= weight_decay < math.inf:
        problems.append(f"weight_decay: {weight_decay} must be 0 or more, such as 0.01")
    groups = weight_decay_groups(model, weight_decay)
    if not groups:
        problems.append("model: no parameter is trainable. Set requires_grad=True on what the optimizer shall change")
    if problems:
        raise UserError("\n".join(f"optimizer {problem}." for problem in problems))
    return groups
