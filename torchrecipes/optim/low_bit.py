"""AdamW whose two averages take 8 or 4 bits per parameter instead of 32: torchao's, made safe to stop and resume.

An average is cut into blocks of `block_size` values. A block is stored as its largest magnitude, in fp32, and one code
per value, an index into a fixed map of numbers between -1 and 1. Every step reads the codes, updates in fp32 and writes
codes again; weights and gradients stay as they are.

torchao's map for signed values ends in 1, but begins with -0.993 (8 bits) or -0.8875 (4 bits): a block whose largest
magnitude is negative has it rounded towards zero in every step. Here the map begins with -1. The largest magnitude is
then exact, the error has (almost) no bias, and reading and writing an average again changes nothing, to the last bit:
so a checkpoint can hold plain fp32 values, which fit any number of processes. See `training.quantized_state`.
"""

from collections.abc import Callable
from contextlib import nullcontext
from types import MethodType

import torch
from torch import Tensor, nn

from torchrecipes.optim.adamw_groups import adamw_groups
from torchrecipes.torchao_import import import_torchao


def adamw_8bit(
    model: nn.Module,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    block_size: int = 256,
) -> torch.optim.Optimizer:
    """AdamW with averages of 8 bits (Dettmers et al. 2021, arXiv:2110.02861), over the groups of `weight_decay_groups`.

    2 bytes and `8 / block_size` per parameter instead of 8. Tensors of less than 4096 values, or whose size (on a rank)
    is no multiple of `block_size`, keep averages of fp32: those are norms and biases.

    The step is compiled with torch.compile where the parameters are on a GPU, for every shape of a parameter once. On a
    CPU it is not, and takes about 0.1 s per million parameters: enough to try it out.

    Args:
        model, lr, betas, eps, weight_decay: see `adamw`.
        block_size: values that share a scale; smaller is more exact. Even.

    Returns:
        A `torchao.optim.AdamW8bit`. Its groups' `lr` are tensors, so that a new value compiles nothing anew: set them
        with a `Schedule`, or with `fill_`.

    Raises:
        UserError: a value is out of range, or nothing in the model is trainable.
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
    """AdamW with averages of 4 bits (Li et al. 2023, arXiv:2309.01507): `adamw_8bit`, coarser.

    1 byte and `8 / block_size` per parameter instead of 8. Arguments, errors and what is returned are as there.
    """
    return _low_bit("4bit", model, lr, betas, eps, weight_decay, block_size)


def _low_bit(bits, model, lr, betas, eps, weight_decay, block_size):
    betas = tuple(betas)
    problems = []
    if block_size < 2 or block_size % 2:
        problems.append(f"block_size: {block_size} must be an even number of 2 or more, such as 256")
    groups = adamw_groups(model, lr, betas, eps, weight_decay, problems)
    torchao_optim = import_torchao("optim")
    optimizer_class = getattr(torchao_optim, f"AdamW{bits}")
    optimizer = optimizer_class(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, block_size=block_size)
    state_class = getattr(import_torchao(f"optim.subclass_{bits}"), f"OptimState{bits}")

    def zeros(parameter: Tensor, signed: bool, block_size: int) -> Tensor:
        state = state_class.zeros(parameter.shape, signed, block_size, parameter.device, dtype=parameter.dtype)
        if signed:
            state.qmap[0] = -1.0  # the least value, which is the map's first
        return state

    optimizer._subclass_zeros = zeros  # where torchao's base class asks its kind of optimizer for a state
    optimizer.step = MethodType(_step, optimizer)
    return optimizer


def _step(optimizer: torch.optim.Optimizer, closure: Callable | None = None):
    """torchao's step, which compiles itself. On a CPU that takes seconds per shape, and a C++ compiler."""
    devices = {parameter.device.type for group in optimizer.param_groups for parameter in group["params"]}
    with torch.compiler.set_stance("force_eager") if devices == {"cpu"} else nullcontext():
        return type(optimizer).step(optimizer, closure)
