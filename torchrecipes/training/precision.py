"""Which number format the forward and backward pass compute in. Weights and optimizer state stay in fp32."""

from contextlib import AbstractContextManager

import torch

from torchrecipes.errors import UserError


def choose_precision(precision: str, device: torch.device) -> torch.dtype:
    """`auto` gives bf16 where the device multiplies bf16 matrices in hardware, else fp32.

    Args:
        precision: `auto`, `bf16` or `fp32`.
        device: where the model runs.

    Returns:
        `torch.bfloat16` or `torch.float32`. It depends on the machine alone, never on a timing, so that a run that
        is resumed on the same machine goes on in the same format.

    Raises:
        UserError: another name.
    """
    if precision == "auto":
        return torch.bfloat16 if _has_fast_bf16(device) else torch.float32
    names = {"bf16": torch.bfloat16, "fp32": torch.float32}
    if precision not in names:
        raise UserError(f"precision: {precision!r} is not known. Use auto, bf16 or fp32.")
    return names[precision]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """`torch.autocast` for bf16; for fp32 the same context, switched off."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def _has_fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return False
