"""AdamW whose state takes 8 or 4 bits per value instead of 32: torchao's, with a code map that survives resuming.

State is quantized in blocks of `block_size` values. A block is stored as its largest magnitude, in fp32, and one code
per value: an index into a fixed map of numbers between -1 and 1. Every step dequantizes, updates in fp32 and quantizes
again; weights and gradients stay as they are.

torchao's map for signed values ends in 1, but begins with -0.993 (8 bits) or -0.8875 (4 bits): a block whose largest
magnitude is negative has it rounded towards zero in every step. Here the map begins with -1. The largest magnitude is
then exact, the error has (almost) no bias, and dequantizing and quantizing again changes no bit: so a checkpoint can
hold plain fp32 values, which fit any number of processes. See `torchrecipes.checkpoint.quantized_state`.
"""

from collections.abc import Callable
from contextlib import nullcontext
from types import MethodType

import torch
from torch import Tensor, nn

from torchrecipes.optim.adamw_variants import adamw_groups
from torchrecipes.optim.settings import out_of_range
from torchrecipes.torchao_import import import_torchao


def adamw_8bit(
    model: nn.Module,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    block_size: int = 256,
) -> torch.optim.Optimizer:
    """AdamW with 8-bit state (Dettmers et al. 2021, arXiv:2110.02861), over the groups of `weight_decay_groups`.

    State takes `2 + 8 / block_size` bytes per parameter instead of 8. Tensors of less than 4096 values, or whose size
    (on a rank) is no multiple of `block_size`, keep fp32 state: those are norms and biases.

    On a GPU the step is compiled, once for each shape of parameter. On a CPU it is not, and takes about 0.1 s per
    million parameters: enough to try it out.

    torchao's step takes no `found_inf`, so `Guard.step` waits for the device to know whether to skip it.

    Args:
        model, lr, betas, eps, weight_decay: see `adamw`.
        block_size: values that share a scale, even; a smaller block is more exact.

    Returns:
        A `torchao.optim.AdamW8bit`. The `lr` of its groups are tensors, so that a new value does not recompile: a
        scheduler writes them in place.

    Raises:
        UserError: a value is out of range, no parameter is trainable, or torchao is not installed.
    """
    return _low_bit("8bit", model, lr, betas, eps, weight_decay, block_size)


def adamw_4bit(
    model: nn.Module,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    block_size: int = 128,
) -> torch.optim.Optimizer:
    """AdamW with 4-bit state (Li et al. 2023, arXiv:2309.01507), coarser than `adamw_8bit`.

    State takes `1 + 8 / block_size` bytes per parameter instead of 8. For the rest see `adamw_8bit`.
    """
    return _low_bit("4bit", model, lr, betas, eps, weight_decay, block_size)


def _low_bit(bits, model, lr, betas, eps, weight_decay, block_size):
    betas = tuple(betas)
    problems = []
    if block_size < 2 or block_size % 2:
        problems.append(out_of_range("block_size", block_size, "an even number of 2 or more, such as 256"))
    groups = adamw_groups(model, lr, betas, eps, weight_decay, problems)
    optimizer_class = getattr(import_torchao("optim"), f"AdamW{bits}")
    optimizer = optimizer_class(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, block_size=block_size)
    state_class = getattr(import_torchao(f"optim.subclass_{bits}"), f"OptimState{bits}")

    def zeros(parameter: Tensor, signed: bool, block_size: int) -> Tensor:
        state = state_class.zeros(parameter.shape, signed, block_size, parameter.device, dtype=parameter.dtype)
        if signed:
            state.qmap[0] = -1.0  # the map's first number is its least
        return state

    optimizer._subclass_zeros = zeros  # torchao's base class calls it to make a state
    optimizer.step = MethodType(_step, optimizer)
    return optimizer


def _step(optimizer: torch.optim.Optimizer, closure: Callable | None = None):
    """torchao's step, which compiles itself. On a CPU that takes seconds per shape, and a C++ compiler."""
    devices = {parameter.device.type for group in optimizer.param_groups for parameter in group["params"]}
    with nullcontext() if devices == {"cuda"} else torch.compiler.set_stance("force_eager"):
        return type(optimizer).step(optimizer, closure)
