"""Trading memory for time, and time for memory; and what to say when memory runs out."""

import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    SAC_IGNORED_OPS,
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from torchrecipes.errors import UserError
from torchrecipes.modules.blocks import transformer_blocks

CHECKPOINT_MODES = ("none", "full", "selective")

# FSDP's hooks of a module inside a block (a router) mark their work for the profiler, and there is more of it in the
# forward pass than when it is recomputed.
SAC_IGNORED_OPS.update(
    {
        torch.ops.profiler._record_function_enter_new.default,
        torch.ops.profiler._record_function_exit._RecordFunction,
    }
)


def apply_activation_checkpointing(model: nn.Module, mode: str = "full") -> None:
    """Keeps less of every block for the backward pass, and computes the rest again there. Call it before `compile`.

    Gradients are the same to the last bit, dropout included, and parameter names do not change.

    Args:
        model: any module; its blocks (`transformer_blocks`) are changed in place.
        mode: `full` keeps a block's input only (Chen et al. 2016, 1604.06174): a step costs about a third more time.
            `selective` keeps, too, what matrix products and attention kernels return, and computes norms, activations
            and other cheap operations again (Korthikanti et al. 2022, 2205.05198): most of the memory, little time.
            `none` changes nothing.

    Raises:
        UserError: another mode.
    """
    if mode not in CHECKPOINT_MODES:
        raise UserError(
            f"{mode!r} is not one of {', '.join(CHECKPOINT_MODES)}",
            key="compute.activation_checkpointing",
            code="unknown_name",
        )
    if mode == "none":
        return
    for block in transformer_blocks(model):
        block.forward = _checkpointed(block.forward, selective=mode == "selective")


def _checkpointed(forward: Callable, selective: bool) -> Callable:
    """A function, not a `partial`: torch.compile leaves out a forward that begins outside of this project."""
    if not selective:
        return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
    contexts = functools.partial(create_selective_checkpoint_contexts, _keep_products)

    def cast_anew(*args, **kwargs):
        # Autocast without its cache of cast weights: with it, a second forward pass has fewer operations than its
        # recomputation, which torch refuses.
        device = next(x.device.type for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False):
            return forward(*args, **kwargs)

    return lambda *args, **kwargs: checkpoint(cast_anew, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _keep_products(_context, operation, *_args, **_kwargs) -> CheckpointPolicy:
    """Not among them: `bmm`, the scores of attention without a kernel, which no one wants to keep."""
    if str(operation) in _EXPENSIVE:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


# By name: which of them there are depends on the version and build of torch.
_EXPENSIVE = frozenset(
    f"{name}.default"
    for name in (
        "aten.mm",
        "aten.addmm",
        "aten._scaled_mm",
        "aten._grouped_mm",
        "torchrecipes.grouped_mm_fp32",
        "aten._scaled_dot_product_flash_attention",
        "aten._scaled_dot_product_flash_attention_for_cpu",
        "aten._scaled_dot_product_efficient_attention",
        "aten._scaled_dot_product_cudnn_attention",
        "aten._scaled_dot_product_fused_attention_overrideable",
        "torch_attn._varlen_attn",
    )
)


def tune_malloc() -> bool:
    """Tells the C library to keep freed memory for the next tensor, not to give it back to the kernel (Linux, CPU).

    Otherwise every large tensor of every step is made of fresh pages, which the kernel has to clear: a tenth of the
    step of a small model. The process' memory stays at its peak. Where there is no glibc nothing happens.

    Returns:
        Whether it was done.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # from malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt if sys.platform == "linux" else None
    except AttributeError:
        mallopt = None
    return bool(mallopt and mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, 2**31 - 1))


@contextmanager
def oom_hint(micro_batch_size: int) -> Iterator[None]:
    """Turns the device's out-of-memory error into the setting to lower.

    Raises:
        UserError: in place of `torch.OutOfMemoryError`.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        advice = (
            f"micro_batch_size={max(1, micro_batch_size // 2)} (now {micro_batch_size}; the result of "
            "training does not depend on it)"
            if micro_batch_size > 1
            else "a smaller seq_len or model"
        )
        first = str(error).splitlines()[0]
        raise UserError(
            f"out of memory: {first}\nUse {advice}, or activation_checkpointing=selective, or full."
        ) from error
