"""AdamW with weight decay on matrices only."""

import torch
from torch import nn

from torchrecipes.optim.adamw_groups import adamw_groups


def adamw(
    model: nn.Module,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    fused: bool = True,
) -> torch.optim.AdamW:
    """`torch.optim.AdamW` (Loshchilov and Hutter, 2017, arXiv:1711.05101) over the groups of `weight_decay_groups`.

    The decay of a step is `lr * weight_decay`: it follows the schedule.

    Args:
        model: its parameters with `requires_grad=True` are trained.
        lr: the peak learning rate.
        betas: how slowly the averages of the gradient and of its square forget. 0.98 for the second is the choice of
            RoBERTa (Liu et al., 2019, arXiv:1907.11692) for masked language models.
        eps: added to the root of the second average.
        weight_decay: for matrices; embeddings, norms and biases are not decayed.
        fused: one kernel for all parameters of a group (CPU and CUDA have it); False loops over them.

    Raises:
        UserError: a value is out of range, or nothing in the model is trainable.
    """
    betas = tuple(betas)
    groups = adamw_groups(model, lr, betas, eps, weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)
