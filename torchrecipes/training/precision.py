"""The number format of the forward and backward pass. Weights and optimizer state stay in fp32."""

import os
from contextlib import AbstractContextManager

import torch

from torchrecipes.errors import UserError
from torchrecipes.optim.newton_schulz import fast_dtype
from torchrecipes.training.float8 import RECIPES, check_float8


def resolve_dtype(precision: str, device: torch.device, emulate_float8: bool = False) -> torch.dtype:
    """`auto` gives bf16 where the device multiplies bf16 matrices in hardware, else fp32.

    Args:
        precision: `auto`, `bf16`, `fp32`, `float8` or `float8_rowwise`. With the last two everything but the layers
            that `convert_to_float8` converts computes in bf16.
        device: where the model runs.
        emulate_float8: whether float8 is emulated, on a device that does not have it.

    Returns:
        `torch.bfloat16` or `torch.float32`. It depends on the machine alone, never on a timing, so that a run that
        is resumed on the same machine goes on in the same format.

    Raises:
        UserError: another name, or the device does not have float8.
    """
    if precision == "auto":
        return fast_dtype(device)
    if precision in RECIPES:
        check_float8(precision, device, emulate_float8)
    names = {"bf16": torch.bfloat16, "fp32": torch.float32} | dict.fromkeys(RECIPES, torch.bfloat16)
    if precision not in names:
        raise UserError(f"precision: {precision!r} is not known. Use auto, {', '.join(names)}.")
    return names[precision]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """`torch.autocast` for bf16; for fp32 the same context, switched off."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def set_deterministic() -> None:
    """The same run on the same kind of machine gives the same numbers, to the last bit. Call it before all computing.

    Some kernels of a GPU add up in the order in which their threads finish: gradients of embeddings, of gathers and of
    attention above all. Their deterministic forms are slower, that of attention's backward pass most. Every new tensor
    is filled, too, so that no number can come from what was in memory before. An operation that has no deterministic
    form raises an error that names it. On a CPU this project's operations are deterministic anyway, with as many
    threads.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts: 24 MiB of its own per stream
    torch.backends.cudnn.benchmark = False  # it times kernels, and takes another one another time
    torch.use_deterministic_algorithms(True)
