"""Initial values of parameters: a function of (seed, parameter name), so equal on every device and mesh."""

import hashlib
import re

import torch
from torch import Tensor, nn

_INTO_RESIDUAL = re.compile(r"\b(o_proj|down_proj)(\.weight)?$")


def init_tensor(name: str, shape: tuple[int, ...], *, seed: int, std: float) -> Tensor:
    """The initial value of a parameter, fp32 on the CPU.

    Biases are 0 and other vectors (weights of norms) 1. Tensors with two or more dimensions are normal with mean 0 and
    standard deviation `std`, from a generator that is seeded with a hash of seed and name.

    Args:
        name: the parameter's name in its model.
        shape: the full shape, not that of one device's shard.
        seed: seed of the model.
        std: standard deviation, `initializer_range` in configs.
    """
    if name.endswith("bias"):
        return torch.zeros(shape, device="cpu")  # whatever the default device is
    if len(shape) == 1:
        return torch.ones(shape, device="cpu")
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.empty(shape, device="cpu").normal_(0.0, std, generator=generator)


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
        copy_full(
            parameter, init_tensor(name, tuple(parameter.shape), seed=seed, std=residual_std if into_residual else std)
        )


def copy_full(target: Tensor, value: Tensor) -> None:
    """Copies a full value into a tensor, which may be a shard of it (a DTensor); without communication."""
    if hasattr(target, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor  # 0.3 s that only sharded models need

        value = value.to(target.device_mesh.device_type)
        value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)
