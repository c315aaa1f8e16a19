"""The device whose kernels a model runs: that of its tensors, or the one that an estimate is for.

An estimate runs a model on fake CPU tensors, whichever device it is for: PyTorch built without CUDA has no fake CUDA
tensors that autograd accepts. Code that differs between devices asks `kernel_device` instead of `x.device.type`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch


class _Estimate(NamedTuple):
    device_type: str
    first_chunk_only: bool


_estimate: ContextVar[_Estimate | None] = ContextVar("estimate", default=None)


@contextmanager
def estimating(device_type: str, *, first_chunk_only: bool = False) -> Iterator[None]:
    """Runs models on fake CPU tensors as a `device_type` would run them.

    Inside, the load of experts is even, since it depends on data.

    Args:
        device_type: `cuda`, `mps` or `cpu`.
        first_chunk_only: loops over chunks that reuse the same memory stop after the first: peak memory is the same,
            FLOPs are not.
    """
    token = _estimate.set(_Estimate(device_type, first_chunk_only))
    try:
        yield
    finally:
        _estimate.reset(token)


def kernel_device(device: torch.device) -> str:
    """The type of the device whose kernels are to be used for tensors on `device`."""
    if torch.compiler.is_compiling() or (estimate := _estimate.get()) is None:
        return device.type
    return estimate.device_type


def is_estimating() -> bool:
    """Whether this is an estimate: tensors have shapes and no data."""
    return not torch.compiler.is_compiling() and _estimate.get() is not None


def chunk_starts(size: int, step: int) -> range:
    """`range(0, size, step)`, or its first element where an estimate needs no more."""
    starts = range(0, size, step)
    if torch.compiler.is_compiling() or (estimate := _estimate.get()) is None:
        return starts
    return starts[:1] if estimate.first_chunk_only else starts
