"""Helpers of all evaluations: evaluation mode, and means over the ranks."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from torchrecipes.distributed.collectives import all_reduce_sum_


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts all modules into evaluation mode; afterwards, also after an error, each has its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def means_over_ranks(sums: dict[str, Tensor], num_targets: Tensor) -> dict[str, float]:
    """Sums divided by the number of targets, over all ranks; NaN where there is none. Adds `perplexity` after `loss`.

    Args:
        sums: `[]` float64, this rank's; one of them `loss`, in nats.
        num_targets: `[]` float64, this rank's.
    """
    *totals, targets = all_reduce_sum_(torch.stack([*sums.values(), num_targets])).tolist()
    means = {}
    for name, total in zip(sums, totals, strict=True):
        means[name] = total / targets if targets else math.nan
        if name == "loss":
            means["perplexity"] = math.exp(min(means["loss"], 700))
    return means
