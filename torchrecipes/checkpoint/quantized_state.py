"""Converts 8-bit and 4-bit optimizer state to plain fp32 tensors for a checkpoint, and back.

The state of `optim.adamw_8bit` and `adamw_4bit` is codes and scales of blocks, which depend on how a tensor is sharded.
Plain values do not. They lose nothing, because dequantizing a block and quantizing it again gives the same codes and
the same scale, bit for bit:

- The largest magnitude in a block has the code of 1 or -1, so its value is exactly the scale, and the new scale is the
  largest magnitude again. (torchao's own map has no -1: there this fails.) Below 1e-12, the smallest scale, the scale
  is 1e-12 both times.
- Any other code has the value q * scale, which divided by the scale is q to within rounding, and q is the nearest one.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchrecipes.optim.cpu_offload_adamw import OffloadedAdamW

SIGNED = {"exp_avg": True, "exp_avg_sq": False}  # the averages of AdamW


def to_plain(state: Tensor) -> Tensor:
    """The values of quantized state in fp32, on the CPU; other state is returned as it is.

    Args:
        state: of any shape and optimizer; of a `DTensor` the result is one with the same placements.
    """
    local = state.to_local() if isinstance(state, DTensor) else state
    if not hasattr(local, "qmap"):
        return state
    plain = local.dequantize()
    # On a GPU, the plain values of all parameters would take the memory that quantization saves.
    return (_like(plain, state) if isinstance(state, DTensor) else plain).to("cpu")


@torch.no_grad()
def from_plain(optimizer: torch.optim.Optimizer, parameter: Tensor, kind: str, plain: Tensor) -> Tensor:
    """Plain state in this optimizer's own form: quantized on the parameter's device, or on the CPU.

    Args:
        optimizer: any; for most the state is returned as it is.
        parameter: the state's parameter.
        kind: the name of the state; `exp_avg` and `exp_avg_sq` are quantized.
        plain: fp32, with the parameter's shape and placements, on any device.
    """
    if isinstance(optimizer, OffloadedAdamW):
        return plain.to("cpu")
    if kind not in SIGNED or not hasattr(optimizer, "_new_buffer"):
        return plain
    state = optimizer._new_buffer(
        parameter, SIGNED[kind]
    )  # quantized if this rank's part of the parameter is large enough
    local = state.to_local() if isinstance(state, DTensor) else state
    local.copy_((plain.to_local() if isinstance(plain, DTensor) else plain).to(local.device))
    return state


def _like(local: Tensor, state: DTensor) -> DTensor:
    shape, stride = state.shape, state.stride()
    return DTensor.from_local(local, state.device_mesh, state.placements, run_check=False, shape=shape, stride=stride)
