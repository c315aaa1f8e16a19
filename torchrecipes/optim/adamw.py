"""AdamW with weight decay on matrices only."""

import math

import torch
from torch import nn

from torchrecipes.errors import UserError
from torchrecipes.optim.groups import decay_groups


def adamw(
    model: nn.Module,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    fused: bool = True,
) -> torch.optim.AdamW:
    """`torch.optim.AdamW` (Loshchilov and Hutter, 2017, arXiv:1711.05101) over the groups of `decay_groups`.

    The decay of a step is `lr * weight_decay`: it follows the schedule.

    Args:
        model: its parameters with `requires_grad=True` are trained.
        lr: the peak learning rate. Every group remembers it as `initial_lr`, which a `Schedule` multiplies.
        betas: how slowly the averages of the gradient and of its square forget. 0.98 for the second is the choice of
            RoBERTa (Liu et al., 2019, arXiv:1907.11692) for masked language models.
        eps: added to the root of the second average.
        weight_decay: for matrices; embeddings, norms and biases are not decayed.
        fused: one kernel for all parameters of a group (CPU and CUDA have it); False loops over them.

    Raises:
        UserError: a value is out of range, or nothing in the model is trainable.
    """
    betas = tuple(betas)
    problems = []
    if not 0 <= lr < math.inf:
        problems.append(f"lr: {lr} must be 0 or more, such as 1e-3")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        problems.append(f"betas: {list(betas)} must be two numbers from 0 up to, not including, 1, such as [0.9, 0.98]")
    if not 0 <= eps < math.inf:
        problems.append(f"eps: {eps} must be 0 or more, such as 1e-8")
    if not 0 <= weight_decay < math.inf:
        problems.append(f"weight_decay: {weight_decay} must be 0 or more, such as 0.01")
    groups = decay_groups(model, weight_decay)
    if not groups:
        problems.append("model: no parameter is trainable. Set requires_grad=True on what the optimizer shall change")
    if problems:
        raise UserError("\n".join(f"optimizer {problem}." for problem in problems))
    for group in groups:
        group["initial_lr"] = lr
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)
