"""Gathers rows of all ranks, with gradients: what a loss over the whole batch is computed from."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from torchrecipes.distributed.collectives import rank, world_size

# Names since torch 2.13, and before.
_all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
_reduce_scatter = dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor


def all_gather_numbers(numbers: Sequence[int]) -> list[list[int]]:
    """Every rank's numbers, in the order of ranks. It runs between CPUs and does not wait for a GPU.

    Args:
        numbers: of the host, as many on every rank.
    """
    if world_size() == 1:
        return [list(numbers)]
    gathered = torch.empty(world_size(), len(numbers), dtype=torch.int64)
    _all_gather(gathered, torch.tensor([numbers], dtype=torch.int64))
    return gathered.tolist()


def all_gather_rows(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """The rows of all ranks, one rank after the other. A gradient flows back to the rank that a row is from.

    There the gradients of all ranks are added up, as the gradient of the sum of their losses: every rank must compute
    something from the result, and run the backward pass, even if it has no rows itself.

    Args:
        rows: `[n, ...]`; n may differ from rank to rank and may be 0, all else is equal.
        counts: n of every rank (see `all_gather_numbers`).

    Returns:
        `[sum of counts, ...]`, on the device of `rows`.
    """
    if world_size() == 1:
        return rows
    if counts[rank()] != len(rows):
        raise ValueError(f"all_gather_rows: this rank has {len(rows)} rows, and counts says {counts[rank()]}")
    most = max(counts)
    padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])]) if len(rows) < most else rows
    gathered = _AllGather.apply(padded)
    if min(counts) == most:
        return gathered
    parts = gathered.split(most)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows):  # noqa: ARG004
        gathered = rows.new_empty(world_size() * len(rows), *rows.shape[1:])
        _all_gather(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx, gradient):  # noqa: ARG004
        own = gradient.new_empty(len(gradient) // world_size(), *gradient.shape[1:])
        _reduce_scatter(own, gradient.contiguous())
        return own
