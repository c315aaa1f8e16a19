"""AdamW with weight decay on matrices only."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw as functional_adamw

from torchrecipes.errors import UserError
from torchrecipes.optim.groups import layer_lr_groups, weight_decay_groups
from torchrecipes.optim.settings import bad_betas, negative, nothing_to_train, out_of_range, raise_all


def adamw(
    model: nn.Module,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    fused: bool = True,
    layer_lr_decay: float | None = None,
) -> torch.optim.AdamW:
    """`torch.optim.AdamW` (Loshchilov and Hutter, 2017, arXiv:1711.05101) over the groups of `weight_decay_groups`.

    A step decays a weight by `lr * weight_decay`, so the decay follows the schedule.

    Args:
        model: its parameters with `requires_grad=True` are trained.
        lr: the peak learning rate.
        betas: decay rates of the averages of the gradient and of its square. 0.98 for the second is RoBERTa's choice
            (Liu et al., 2019, arXiv:1907.11692) for masked language models.
        eps: added to the root of the second average.
        weight_decay: for matrices; embeddings, norms and biases are not decayed.
        fused: one kernel for all parameters of a group (CPU and CUDA have it); False loops over them.
        layer_lr_decay: the learning rate of each layer is that of the layer above it times this, such as 0.9; see
            `layer_lr_groups`. None: all have the same.

    Raises:
        UserError: a value is out of range, or no parameter is trainable.
    """
    betas = tuple(betas)
    problems = []
    if layer_lr_decay is not None and not 0 < layer_lr_decay <= 1:
        problems.append(out_of_range("layer_lr_decay", layer_lr_decay, "above 0 and at most 1"))
    groups = adamw_groups(model, lr, betas, eps, weight_decay, problems)
    if layer_lr_decay is not None:
        groups = layer_lr_groups(model, lr, layer_lr_decay, weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)


def adamw_groups(
    model: nn.Module,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    problems: list[UserError] | None = None,
) -> list[dict]:
    """Checks the settings of any form of AdamW, and makes its groups.

    Args:
        model, lr, betas, eps, weight_decay: see `adamw`.
        problems: mistakes in other settings, to be reported together with those in these.

    Raises:
        UserError: a value is out of range, or no parameter is trainable.
    """
    groups = weight_decay_groups(model, weight_decay)
    problems = (problems or []) + negative(lr=lr, eps=eps, weight_decay=weight_decay) + bad_betas("betas", betas)
    raise_all(problems + ([] if groups else [nothing_to_train()]))
    return groups


def fused_adamw_(
    group: dict, weights: list[Tensor], gradients: list[Tensor], states: list[dict], found_inf: Tensor | None = None
) -> None:
    """A step of `torch.optim.AdamW`, fused, for parameters of which this rank holds `weights`; in place.

    Args:
        group: has `lr`, `betas`, `eps` and `weight_decay`.
        weights, gradients: plain tensors.
        states: each with `step`, `exp_avg` and `exp_avg_sq`, sharded or not.
        found_inf: `[]` fp32; nothing changes if it is 1.
    """
    beta1, beta2 = group["betas"]
    functional_adamw(
        weights,
        gradients,
        [to_local(state["exp_avg"]) for state in states],
        [to_local(state["exp_avg_sq"]) for state in states],
        [],
        [state["step"] for state in states],
        fused=True,
        found_inf=found_inf,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def to_local(x: Tensor) -> Tensor:
    """This rank's shard of a `DTensor`; another tensor itself."""
    return x.to_local() if isinstance(x, DTensor) else x
