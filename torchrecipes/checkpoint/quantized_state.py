"""Optimizer state of 8 or 4 bits as plain fp32 tensors, for a checkpoint, and back.

The state of `optim.adamw_8bit` and `adamw_4bit` is codes and scales, which fit one cutting of a tensor into blocks:
that of one number of processes. Plain values fit any. They lose nothing, because reading a block and writing it again
gives the same codes and the same scale, to the last bit:

- The largest magnitude in a block has the code of 1 or -1, so it reads as exactly the scale, and the scale that is
  written is the largest magnitude again. (torchao's own map has no -1: there this fails.) Below 1e-12, the least scale
  that is written, the scale is 1e-12 both times.
- Any other code reads as q * scale, which divided by the scale is q to within rounding, and q is the nearest one.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

SIGNED = {"exp_avg": True, "exp_avg_sq": False}  # the averages of AdamW


def to_plain(state: Tensor) -> Tensor:
    """A state's values in fp32 and in the CPU's memory; one that is not quantized is returned as it is.

    Args:
        state: of any shape and optimizer; a `DTensor` is returned as one, with the same placements.
    """
    local = state.to_local() if isinstance(state, DTensor) else state
    if not hasattr(local, "qmap"):
        return state
    plain = local.dequantize()
    # To the CPU: on a GPU the plain values of all parameters would take the memory that was to be saved.
    return (_like(plain, state) if isinstance(state, DTensor) else plain).to("cpu")


@torch.no_grad()
def from_plain(optimizer: torch.optim.Optimizer, parameter: Tensor, kind: str, plain: Tensor) -> Tensor:
    """What `to_plain` made plain, as this optimizer holds it, beside the parameter; bit by bit if it was cut alike.

    Args:
        optimizer: any; `plain` is returned as it is unless it is one of `adamw_8bit` or `adamw_4bit`.
        parameter: that the state is of.
        kind: `exp_avg`, `exp_avg_sq`, or another one, which is returned as it is.
        plain: fp32, of the parameter's shape and placements, on any device.
    """
    if kind not in SIGNED or not hasattr(optimizer, "_new_buffer"):
        return plain
    state = optimizer._new_buffer(parameter, SIGNED[kind])  # quantized if its part of the parameter is large enough
    local = state.to_local() if isinstance(state, DTensor) else state
    local.copy_((plain.to_local() if isinstance(plain, DTensor) else plain).to(local.device))
    return state


def _like(local: Tensor, state: DTensor) -> DTensor:
    shape, stride = state.shape, state.stride()
    return DTensor.from_local(local, state.device_mesh, state.placements, run_check=False, shape=shape, stride=stride)
