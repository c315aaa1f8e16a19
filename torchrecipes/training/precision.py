"""The dtype that forward and backward compute in. Weights and optimizer state stay in fp32."""

import os
from contextlib import AbstractContextManager

import torch
from torch import nn

from torchrecipes.errors import UserError
from torchrecipes.optim.newton_schulz import fast_dtype
from torchrecipes.training.float8 import RECIPES, check_float8

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_dtype(precision: str, device: torch.device, emulate_float8: bool = False) -> torch.dtype:
    """Resolves `auto` to bf16 where the device multiplies bf16 matrices in hardware, to fp16 on GPUs with tensor cores
    for fp16 alone (Volta and Turing: compute capability 7, where bf16 is emulated), else to fp32.

    Args:
        precision: `auto`, `bf16`, `fp16`, `fp32`, `float8` or `float8_rowwise`. With fp16 the loss has to be scaled
            (`Guard`). With float8, all but the layers that `convert_to_float8` converts computes in bf16.
        device: where the model runs.
        emulate_float8: emulates float8 on devices that do not have it.

    Returns:
        `torch.bfloat16`, `torch.float16` or `torch.float32`. It depends on the machine alone, never on a timing, so a
        run that resumes on the same machine keeps its dtype.

    Raises:
        UserError: an unknown name, or the device does not have float8.
    """
    if precision == "auto":
        has_fp16_only = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 7
        return torch.float16 if has_fp16_only else fast_dtype(device)
    if precision in RECIPES:
        check_float8(precision, device, emulate_float8)
    dtypes = DTYPES | dict.fromkeys(RECIPES, torch.bfloat16)
    if precision not in dtypes:
        known = ", ".join(("auto", *dtypes))
        raise UserError(f"{precision!r} is not one of {known}", key="compute.precision", code="unknown_name")
    return dtypes[precision]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """`torch.autocast` for bf16 and fp16; for fp32 the same context, switched off."""
    enabled = dtype != torch.float32
    return torch.autocast(device.type, dtype=dtype if enabled else torch.bfloat16, enabled=enabled)


def set_residual_dtype(model: nn.Module, residual: str, dtype: torch.dtype) -> None:
    """Sets the dtype of the model's residual stream: of every module with an attribute `residual_dtype`.

    Args:
        model: changed in place.
        residual: `bf16`, `fp32`, or `auto`: bf16 on CUDA and fp32 on a CPU. Where `dtype` is fp32, so is the stream;
            with fp16 it is fp32, too (`to_residual_dtype`).
        dtype: of the forward and backward pass.

    Raises:
        UserError: `bf16` with another `dtype` (code `residual_needs_bf16`), or a choice for a model without such a
            module (code `no_residual_dtype`).
    """
    dtypes = {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}
    modules = [module for module in model.modules() if hasattr(module, "residual_dtype")]
    if residual == "bf16" and dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise UserError(
            f"a residual stream in bf16 needs a forward pass in bf16, and this one is in {name}",
            key="compute.residual",
            hint="Use compute.residual=auto, or compute.precision=bf16.",
            code="residual_needs_bf16",
        )
    if residual != "auto" and not modules:
        raise UserError(
            f"{type(model).__name__} has no attribute residual_dtype that sets the dtype of its residual stream",
            key="compute.residual",
            hint="Use auto, or give the model the attribute and read it in its forward pass.",
            code="no_residual_dtype",
        )
    for module in modules:
        module.residual_dtype = dtypes[residual]


def set_float32_matmul_precision(precision: str, device: torch.device, dtype: torch.dtype) -> None:
    """Lets a GPU multiply fp32 matrices in TF32, several times as fast, where the forward pass is in fp32.

    In a bf16 run what is left in fp32, such as a mixture's routers, is there to be exact and stays so.

    Args:
        precision: `high` rounds the factors to TF32, 10 bits after the point; `highest` does not. As in
            `torch.set_float32_matmul_precision`, which also changes CPUs.
        device: where the model runs.
        dtype: of the forward and backward pass.
    """
    if device.type == "cuda":
        # Not `fp32_precision`: with it set, torch 2.11 to 2.13 raise an error where a library reads `allow_tf32`.
        torch.backends.cuda.matmul.allow_tf32 = precision == "high" and dtype == torch.float32


def set_deterministic() -> None:
    """Makes runs on one kind of machine repeat bit for bit. Call it before anything is computed.

    Some GPU kernels add up in the order in which their threads finish: gradients of embeddings, gathers and attention
    above all. Their deterministic forms are slower, attention's backward pass most. New tensors are filled, too, so
    that no number depends on what was in memory before. An operation without a deterministic form raises an error that
    names it. On a CPU all operations used here are deterministic anyway, with the same number of threads.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts; 24 MiB per stream
    torch.backends.cudnn.benchmark = False  # it times kernels, and may choose another one next time
    torch.use_deterministic_algorithms(True)
