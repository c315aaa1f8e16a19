"""Helpers of all evaluations: evaluation mode, exact sums, and means over the ranks."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from torchrecipes.devices import preset
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


class RunningSum:
    """Adds up tensors of one shape in float64, or about as exactly, without waiting for the device.

    A sum over millions of tokens must not depend on how they are spread over batches and ranks. On a device without
    float64 (Apple's GPUs) the rounding error of every addition is kept in a second float32 (TwoSum: Knuth, The Art of
    Computer Programming, volume 2, section 4.2.2, theorem B).

    Args:
        shape: of what is added.
        device: where.
        dtype: to add in; None: float64, float32 where the device has no float64.

    Attributes:
        dtype: as above.
    """

    def __init__(self, shape: Sequence[int], device: torch.device, dtype: torch.dtype | None = None):
        self.dtype = dtype or (torch.float64 if preset(device).float64 else torch.float32)
        self._sum = torch.zeros(tuple(shape), dtype=self.dtype, device=device)
        self._error = torch.zeros_like(self._sum)

    def add(self, value: Tensor) -> None:
        """Adds a tensor of `shape`."""
        value = value.to(self.dtype)
        if self.dtype == torch.float64:
            self._sum += value
            return
        total = self._sum + value
        added = total - self._sum
        self._error += (self._sum - (total - added)) + (value - added)
        self._sum = total

    def over_ranks(self) -> Tensor:
        """The sum over all ranks, float64 on the CPU: waits for the device."""
        if self.dtype == torch.float64:
            return all_reduce_sum_(self._sum).cpu()
        return all_reduce_sum_(self._sum.cpu().double() + self._error.cpu().double())


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
