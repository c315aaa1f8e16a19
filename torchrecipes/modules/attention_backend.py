"""Attention backends: chosen once per forward pass, outside the blocks, and shared by all of them.

| kernel   | where                               | how documents are kept apart                                     |
|----------|-------------------------------------|------------------------------------------------------------------|
| `varlen` | CUDA, bf16 and fp16, no dropout     | `cu_seqlens` goes to the flash kernel                            |
| `math`   | CPU, bf16 and fp16, rows up to 1024 | a mask over rows, or over rows regrouped from short documents    |
|          | tokens; CPU with dropout            |                                                                  |
| `tiled`  | CPU, causal rows up to 2048 tokens  | the same                                                         |
| `sdpa`   | otherwise                           | the same; dense rows need no mask                                |

`math` is scores, softmax and values as three batched products. In bf16 they take a third of the time of the CPU's flash
kernel at rows of 64 to 512 tokens and two thirds at 1024 (measured without AMX), for `S / (20 H)` times the memory of a
layer's other activations. The flash kernel of the CPU has no dropout either.

`tiled` is `math` in tiles of queries that each look at the keys up to their last one only: half of the products, and a
backward pass written by hand (`torchrecipes.modules.cpu.tiled_causal_attention`). Of the better of the other two it
takes 0.35 to 0.9 of the time in bf16 at rows of 256 to 1024 tokens and 0.8 to 1.1 in fp32, and below as much as `math`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchrecipes.estimation import is_estimating, kernel_device
from torchrecipes.modules.cpu.tiled_causal_attention import TILE

# The longest rows for which holding all scores is worth their memory.
MATH_LONGEST_ROW = 1024
TILED_LONGEST_ROW = 2048
# Copying a token into a regrouped row and back costs about as much as attending to this many more tokens (CPU).
REGROUP_COST_IN_KEYS = 64


class AttentionBackend(NamedTuple):
    """How one forward pass computes attention; made by `choose_attention_backend`, shared by all layers.

    A tuple of tensors and constants, so that `torch.compile`, activation checkpointing and FSDP carry it along.

    Attributes:
        kernel: `varlen`, `sdpa`, `math` or `tiled`.
        causal: `sdpa` applies causality itself (dense rows); with a mask it is part of the mask.
        dropout_p: probability of dropping an attention weight.
        mask: what is added to the scores, 0 or -inf, in the dtype of q: `[B or 1, 1, S, S]`, or `[R, 1, L, L]` when
            documents are regrouped. None where every token of a row sees every other. For `tiled` and dense rows only
            the `[1, 1, TILE, TILE]` of it that lies on the diagonal.
        gather: `[R, L]` int64, the token in each slot of the regrouped rows (token 0 in an empty slot), or None.
        scatter: `[B, S]` int64, the slot of each token, or None.
        cu_seqlens: `[documents + 1]` int32, for `varlen`.
        max_seqlen: upper bound on a document's length, for `varlen`.
        window_size: tokens seen to the (left, right), -1 without bound, for `varlen`.
    """

    name: str
    causal: bool = False
    dropout_p: float = 0.0
    mask: Tensor | None = None
    gather: Tensor | None = None
    scatter: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0
    window_size: tuple[int, int] = (-1, -1)


def choose_attention_backend(
    cu_seqlens: Tensor | None,
    shape: tuple[int, int],
    *,
    max_seqlen: int | None = None,
    causal: bool = False,
    window: int | None = None,
    dropout_p: float = 0.0,
    device: torch.device,
    dtype: torch.dtype,
) -> AttentionBackend:
    """Chooses the kernel and builds what it needs (mask, indices), once for all layers of a forward pass.

    On CUDA nothing waits for the device. On the CPU, where reading lengths costs nothing, the boundaries are checked,
    and short documents in long rows are regrouped into rows of `max_seqlen` where that costs less. The choice follows
    from shapes and `max_seqlen`, not from the lengths of one batch, so a compiled model sees few different shapes.

    Args:
        cu_seqlens: `[documents + 1]` int32 or int64, on `device`: 0, then the end of every document in the B * S
            flattened tokens. Repeated entries are empty documents. The end of every row must be among them (a
            document never crosses into the next row). None: every row is one document.
        shape: (B, S).
        max_seqlen: upper bound on the length of a document, padding included, in tokens. None: S.
        causal: a token sees no later token.
        window: a token sees no token further away than this. None: no bound.
        dropout_p: probability of dropping an attention weight; 0 outside training.
        device, dtype: of the queries that the backend is for.

    Raises:
        ValueError: CPU only: boundaries that do not describe the rows. Any device: a window below 0.
    """
    rows, row_len = shape
    if window is not None and window < 0:
        raise ValueError(f"window must be 0 or more, not {window}")
    if is_estimating() and kernel_device(device) == "cuda":
        # What flash attention keeps: queries, keys, values and outputs, never the scores.
        return AttentionBackend("sdpa", causal=causal)
    half = dtype in (torch.bfloat16, torch.float16)
    packed_or_window = cu_seqlens is not None or window is not None
    if device.type == "cuda" and half and packed_or_window and not dropout_p and _has_flash(device):
        if cu_seqlens is None:
            cu_seqlens = torch.arange(0, rows * row_len + 1, row_len, dtype=torch.int32, device=device)
        left = -1 if window is None else window
        return AttentionBackend(
            "varlen",
            cu_seqlens=cu_seqlens.to(torch.int32),
            max_seqlen=max_seqlen or row_len,
            window_size=(left, 0 if causal else left),
        )

    segments = gather = scatter = None
    if cu_seqlens is not None and device.type == "cpu":
        lengths = _checked_lengths(cu_seqlens, rows, row_len, max_seqlen)
        segments, gather, scatter = _regroup(lengths, rows, row_len, max_seqlen or row_len)
        row_len = segments.shape[1]
    elif cu_seqlens is not None:
        positions = torch.arange(rows * row_len, device=device, dtype=cu_seqlens.dtype)
        segments = torch.searchsorted(cu_seqlens, positions, right=True).view(rows, row_len)
    if causal and device.type == "cpu" and not dropout_p and row_len <= TILED_LONGEST_ROW:
        dense = segments is None and window is None
        mask = _mask(segments, min(row_len, TILE) if dense else row_len, True, window, device, dtype)
        return AttentionBackend("tiled", mask=mask, gather=gather, scatter=scatter)
    use_math = device.type == "cpu" and (dropout_p > 0 or (half and row_len <= MATH_LONGEST_ROW))
    kernel = "math" if use_math else "sdpa"
    if segments is None and window is None and not (causal and use_math):
        return AttentionBackend(kernel, causal=causal, dropout_p=dropout_p)
    mask = _mask(segments, row_len, causal, window, device, dtype)
    return AttentionBackend(kernel, dropout_p=dropout_p, mask=mask, gather=gather, scatter=scatter)


def cached_attention_backend(position_ids: Tensor, num_keys: int, dtype: torch.dtype) -> AttentionBackend:
    """How tokens attend to the slots of a `KVCache`: one at position p sees the slots 0 to p.

    Args:
        position_ids: `[B, S]`.
        num_keys: slots looked at, the first ones.
        dtype: of the queries.
    """
    slots = torch.arange(num_keys, device=position_ids.device)
    unseen = slots > position_ids[:, None, :, None]
    mask = torch.zeros(unseen.shape, dtype=dtype, device=position_ids.device).masked_fill_(unseen, float("-inf"))
    return AttentionBackend("sdpa" if position_ids.shape[1] > 1 else "math", mask=mask)


def _has_flash(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _checked_lengths(cu_seqlens: Tensor, rows: int, row_len: int, max_seqlen: int | None) -> np.ndarray:
    """Document lengths in order, without empty documents."""
    bounds = cu_seqlens.numpy()
    lengths = np.diff(bounds)
    if bounds[0] != 0 or bounds[-1] != rows * row_len or (lengths < 0).any():
        raise ValueError(
            f"cu_seqlens must rise from 0 to the number of tokens, {rows} x {row_len}; it goes from {bounds[0]} to "
            f"{bounds[-1]}" + (" and falls in between" if (lengths < 0).any() else "")
        )
    crossed = np.setdiff1d(np.arange(row_len, rows * row_len, row_len), bounds)
    if crossed.size:
        raise ValueError(f"cu_seqlens has a document that crosses the end of row {crossed[0] // row_len - 1}")
    if max_seqlen is not None and lengths.max() > max_seqlen:
        raise ValueError(f"cu_seqlens has a document of {lengths.max()} tokens; max_seqlen is {max_seqlen}")
    return lengths[lengths > 0]


def _regroup(lengths: np.ndarray, rows: int, row_len: int, longest: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Document number of every slot, in rows as they are or in shorter rows where those cost less.

    Documents go in order into rows of L tokens, a new row whenever the next one does not fit. Two neighbouring rows
    hold more than L tokens, so there are at most 2 T / L + 1 of them.

    Returns:
        segments `[rows, length]` int64 (-1 in an empty slot), gather and scatter as in `AttentionBackend` (None: rows
        as they are).
    """
    tokens = rows * row_len
    group_len = min(row_len, -(-longest // 64) * 64)
    document_of_token = np.repeat(np.arange(len(lengths)), lengths)
    step = max(1, tokens // (4 * group_len))  # rows come in steps of a quarter of the least number: few shapes
    if group_len + REGROUP_COST_IN_KEYS >= row_len / 2:
        return torch.from_numpy(document_of_token.reshape(rows, row_len)), None, None

    first_slot = np.empty(len(lengths), dtype=np.int64)
    group, used = 0, 0
    for document, length in enumerate(lengths.tolist()):
        if used + length > group_len:
            group, used = group + 1, 0
        first_slot[document] = group * group_len + used
        used += length
    groups = -(-(group + 1) // step) * step
    document_start = np.cumsum(lengths) - lengths
    slot_of_token = np.arange(tokens) + np.repeat(first_slot - document_start, lengths)
    segments = np.full(groups * group_len, -1)
    segments[slot_of_token] = document_of_token
    gather = np.zeros(groups * group_len, dtype=np.int64)
    gather[slot_of_token] = np.arange(tokens)
    return (
        torch.from_numpy(segments.reshape(groups, group_len)),
        torch.from_numpy(gather.reshape(groups, group_len)),
        torch.from_numpy(slot_of_token.reshape(rows, row_len)),
    )


def _mask(
    segments: Tensor | None, length: int, causal: bool, window: int | None, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """0 where a token sees another, -inf elsewhere: `[B or 1, 1, S, S]`; additive, or every layer would convert it."""
    position = torch.arange(length, device=device)
    distance_SS = position[:, None] - position[None, :]
    seen = torch.ones_like(distance_SS, dtype=torch.bool)
    if causal:
        seen &= distance_SS >= 0
    if window is not None:
        seen &= distance_SS.abs() <= window
    seen = seen[None] if segments is None else seen & (segments[:, :, None] == segments[:, None, :])
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))[:, None]
