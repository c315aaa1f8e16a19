"""Activation checkpointing, and what else the memory of a step depends on: out-of-memory hints, malloc."""

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

from torchrecipes.devices import is_out_of_memory
from torchrecipes.errors import UserError
from torchrecipes.modules.blocks import transformer_blocks

CHECKPOINT_MODES = ("none", "full", "selective")

# FSDP's hooks inside a block (of a router) mark their work for the profiler, and do more of it in the forward pass than
# in its recomputation.
SAC_IGNORED_OPS.update(
    {
        torch.ops.profiler._record_function_enter_new.default,
        torch.ops.profiler._record_function_exit._RecordFunction,
    }
)


def apply_activation_checkpointing(model: nn.Module, mode: str = "full") -> None:
    """Keeps fewer activations of every block, and recomputes the others in the backward pass. Call it before `compile`.

    Gradients are the same bit for bit, dropout included, and parameter names do not change.

    Args:
        model: any module; its blocks (`transformer_blocks`) are changed in place.
        mode: `full` keeps a block's input only (Chen et al. 2016, 1604.06174): a step costs about a third more time.
            `selective` also keeps the results of matrix products and attention kernels, and recomputes norms,
            activations and other cheap operations (Korthikanti et al. 2022, 2205.05198): saves much memory, costs
            little time.
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
        block.forward = _where_gradients_are_needed(block, _checkpointed(block.forward, selective=mode == "selective"))


def _where_gradients_are_needed(block: nn.Module, checkpointed: Callable) -> Callable:
    """Frozen blocks before the first that is trained keep nothing anyway, and compiled checkpoints fail there."""
    forward = block.forward

    def choose(*args, **kwargs):
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        is_needed = any(tensor.requires_grad for tensor in (*inputs, *block.parameters()))
        return (checkpointed if is_needed else forward)(*args, **kwargs)

    return choose


def _checkpointed(forward: Callable, selective: bool) -> Callable:
    """A function, not a `partial`, since torch.compile skips a forward whose code is in torch."""
    if not selective:
        return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
    contexts = functools.partial(create_selective_checkpoint_contexts, _keep_products)

    def cast_anew(*args, **kwargs):
        # Without autocast's cache of cast weights: with it, a second forward pass has fewer operations than its
        # recomputation, which is an error.
        device = next(x.device.type for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False):
            return forward(*args, **kwargs)

    return lambda *args, **kwargs: checkpoint(cast_anew, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _keep_products(_context, operation, *_args, **_kwargs) -> CheckpointPolicy:
    """Keeps expensive operations, but not `bmm`: the scores of attention without a kernel are large."""
    if str(operation) in _EXPENSIVE:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


# By name, since they depend on the version and build of torch. `flex_attention` has no overloads.
_EXPENSIVE = frozenset({"flex_attention"}) | frozenset(
    f"{name}.default"
    for name in (
        "aten.mm",
        "aten.addmm",
        "aten._scaled_mm",
        "aten._grouped_mm",
        "aten.rsqrt",  # a number per row, with which inductor needs one pass for the backward of a norm instead of two
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
    """Lets the C library keep freed memory for the next tensor, instead of returning it to the kernel (Linux, CPU).

    Otherwise every large tensor of every step gets new pages, which the kernel has to clear: a tenth of the step of a
    small model. The process' memory stays at its peak. Without glibc nothing happens.

    Returns:
        Whether it has taken effect.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # from malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt if sys.platform == "linux" else None
    except AttributeError:
        mallopt = None
    return bool(mallopt and mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, 2**31 - 1))


@contextmanager
def oom_hint(micro_batch_size: int) -> Iterator[None]:
    """Adds the setting to lower to the device's out-of-memory error.

    Raises:
        UserError: in place of `torch.OutOfMemoryError`, or what `mps` raises for it.
    """
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        if micro_batch_size > 1:
            remedy = f"micro_batch_size={micro_batch_size // 2} (now {micro_batch_size}; training stays the same, "
            remedy += "except that a mixture of experts balances each micro-batch)"
        else:
            remedy = "a smaller seq_len or model"
        raise UserError(
            f"out of memory: {str(error).splitlines()[0]}",
            hint=f"Use {remedy}, or compute.activation_checkpointing=selective, or full.",
            code="out_of_memory",
        ) from error
