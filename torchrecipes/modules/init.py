"""Initial values of parameters: a function of (seed, parameter name, row), so equal on every device and mesh.

Rows are drawn in blocks, each from a generator of its own, so a rank draws little more than the rows that it holds.
"""

import hashlib
import math
import re

import torch
from torch import Tensor, nn

BLOCK = 2**15  # elements that are drawn together, if a row has no more
_INTO_RESIDUAL = re.compile(r"\b(o_proj|down_proj)(\.weight)?$")


def init_tensor(
    name: str, shape: tuple[int, ...], *, seed: int, std: float, rows: tuple[int, int] | None = None
) -> Tensor:
    """The initial value of a parameter, or some rows of it, fp32 on the CPU.

    Biases are 0 and other vectors (weights of norms) 1. Tensors with two or more dimensions are normal with mean 0 and
    standard deviation `std`. `lora_B` is 0, and `lora_A` has the standard deviation of peft's uniform values,
    `1 / sqrt(3 in)`. A block of about `BLOCK` elements, some rows (indices of the first dimension), comes from a
    generator that is seeded with a hash of seed, name and the block's number.

    Args:
        name: the parameter's name in its model.
        shape: the full shape, not that of one device's shard.
        seed: seed of the model.
        std: standard deviation, `initializer_range` in configs.
        rows: (first, end) of the rows that are asked for; None: all.
    """
    first, last = rows or (0, shape[0] if shape else 1)
    size = (last - first, *shape[1:]) if shape else ()
    if name.endswith(("bias", "lora_B")):
        return torch.zeros(size, device="cpu")  # whatever the default device is
    if len(shape) == 1:
        return torch.ones(size, device="cpu")
    if name.endswith("lora_A"):
        std = (3 * shape[1]) ** -0.5
    value, generator = torch.empty(last - first, *shape[1:], device="cpu"), torch.Generator("cpu")
    per_block = max(1, BLOCK // max(1, math.prod(shape[1:])))
    for number in range(first // per_block, -(-last // per_block)):
        start, end = number * per_block, min((number + 1) * per_block, shape[0] if shape else 1)
        digest = hashlib.blake2b(f"{seed}/{name}/{number}".encode(), digest_size=8).digest()
        generator.manual_seed(int.from_bytes(digest, "little") >> 1)
        mine = value[max(start - first, 0) : end - first]
        if len(mine) == end - start:
            mine.normal_(0.0, std, generator=generator)
        else:  # the rows at the edge of a shard
            block = torch.empty(end - start, *shape[1:], device="cpu").normal_(0.0, std, generator=generator)
            mine.copy_(block[max(first - start, 0) : last - start])
    return value.view(size)


@torch.no_grad()
def init_weights(model: nn.Module, *, seed: int, std: float, residual_std: float | None = None) -> None:
    """Sets every parameter of the model to its initial value, and buffers to 0. Meta tensors are skipped.

    A shard made by `fully_shard` gets its part of the same full value, without communication.

    Args:
        model: changed in place.
        seed, std: see `init_tensor`.
        residual_std: replaces `std` for projections into the residual stream (`o_proj` and `down_proj`): with GPT-2's
            `std / sqrt(2 L)` the sum of 2 L of them does not depend on the number of layers L. None: `std`.
    """
    for buffer in model.buffers():
        buffer.zero_()
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            continue
        into_residual = residual_std is not None and _INTO_RESIDUAL.search(name)
        init_parameter(parameter, name, seed=seed, std=residual_std if into_residual else std)


@torch.no_grad()
def init_parameter(parameter: Tensor, name: str, *, seed: int, std: float) -> None:
    """Sets a parameter, or this rank's shard of it, to its initial value (`init_tensor`)."""
    shape = tuple(parameter.shape)
    if rows := _rows_of_shard(parameter):
        parameter.to_local().copy_(init_tensor(name, shape, seed=seed, std=std, rows=rows))
    else:
        copy_full(parameter, init_tensor(name, shape, seed=seed, std=std))


def _rows_of_shard(parameter: Tensor) -> tuple[int, int] | None:
    """(First, end) of the rows that this rank holds; None if it holds all of them, or is not sharded by rows."""
    if not hasattr(parameter, "device_mesh") or not parameter.ndim:
        return None
    from torch.distributed.tensor import Replicate, Shard  # 0.3 s that only sharded models need

    mesh, (first, last) = parameter.device_mesh, (0, parameter.shape[0])
    for dimension, placement in enumerate(parameter.placements):
        if placement == Shard(0):
            size = -(-(last - first) // mesh.size(dimension))  # as `torch.chunk` splits
            first = min(first + mesh.get_local_rank(dimension) * size, last)
            last = min(first + size, last)
        elif placement != Replicate():
            return None
    return first, last


def copy_full(target: Tensor, value: Tensor) -> None:
    """Copies a full value into a tensor, which may be a shard of it (a DTensor); without communication."""
    if hasattr(target, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor  # 0.3 s that only sharded models need

        value = value.to(target.device_mesh.device_type)
        value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)
