"""Attention backends: chosen once per forward pass, outside the blocks, and shared by all of them.

| backend  | where                                                | how documents are kept apart                   |
|----------|------------------------------------------------------|------------------------------------------------|
| `flex`   | CUDA, bf16 and fp16: rows of documents, windows      | a block mask (block_mask.py), compiled kernel  |
| `varlen` | the same, where FlashAttention-4 is active           | `cu_seqlens`                                   |
| `sdpa`   | CUDA, rows that are one document: cuDNN, else flash  | nothing to keep apart                          |
|          | CUDA, fp32 or dropout                                | a mask over rows                               |
|          | CPU, otherwise                                       | those of one length at a time, or a mask       |
| `math`   | CPU, bf16 and fp16, rows up to 1024 tokens; dropout; | the same                                       |
|          | training with documents one length at a time         |                                                |
|          | Apple GPUs (`mps`): see `torchrecipes.devices`       | a mask over rows                               |
| `tiled`  | CPU, causal rows up to 2048 tokens                   | the same                                       |
| `banded` | CPU, windows that are shorter than a row             | a mask over the window, regrouped or not       |

The choice on CUDA is from an H100, 2026-11-28, torch 2.11: 12 heads of 64, 32 rows of 1,024 tokens, forward plus
backward in ms. Documents of 4 to 40 tokens: flex 0.82, varlen 2.24; of about 400 tokens: flex 1.21, varlen 1.29; rows
of one document: cuDNN 1.00, varlen 1.57, flash 1.61. Other lengths, causal rows and FlashAttention-4 have not been
measured: `benchmarks/gpu.py` measures them all.

On a CPU, documents are taken one length at a time where that saves work. For texts of 8 to 40 tokens it takes half of
the time of regrouped rows with a mask in fp32, and as much in bf16; for texts of 100 to 256 tokens 0.8 of it without a
gradient, and a quarter to a third in training with dropout (12 heads of 32, AVX-512 without AMX,
`benchmarks/short_documents.py`). For gradients `math` is then faster up to 256 tokens in fp32; without them `sdpa` is
as fast, and needs no memory for scores.

`math` is scores, softmax and values as three batched products. In bf16 they take a third of the time of the CPU's flash
kernel at rows of 64 to 512 tokens and two thirds at 1024 (measured without AMX), for `S / (20 H)` times the memory of a
layer's other activations. The flash kernel of the CPU has no dropout either.

`tiled` is `math` in tiles of queries that each look at the keys up to their last one only: half of the products, and a
backward pass written by hand (`torchrecipes.modules.cpu.tiled_causal_attention`). Of the better of the other two it
takes 0.35 to 0.9 of the time in bf16 at rows of 256 to 1024 tokens and 0.8 to 1.1 in fp32, and below as much as `math`.

`banded` (`torchrecipes.modules.cpu.banded_attention`) does the same where a window hides most of a row: a tile of
queries attends to the keys of its windows only, so that work grows with the length of a row and not with its square.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchrecipes.estimation import is_estimating, kernel_device
from torchrecipes.modules.block_mask import document_block_mask
from torchrecipes.modules.cpu import banded_attention
from torchrecipes.modules.cpu.regroup import document_lengths, group_by_length, regroup
from torchrecipes.modules.cpu.tiled_causal_attention import TILE

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# The longest rows for which holding all scores is worth their memory, and the longest documents in fp32.
MATH_LONGEST_ROW = 1024
MATH_LONGEST_FP32 = 256
TILED_LONGEST_ROW = 2048


class AttentionBackend(NamedTuple):
    """How one forward pass computes attention; made by `choose_attention_backend`, shared by all layers.

    A tuple of tensors and constants, so that `torch.compile`, activation checkpointing and FSDP carry it along.

    Attributes:
        name: `flex`, `varlen`, `sdpa`, `math`, `tiled` or `banded`.
        causal: `sdpa` applies causality itself (dense rows); with a mask it is part of the mask.
        dropout_p: probability of dropping an attention weight.
        mask: what is added to the scores, 0 or -inf, in the dtype of q: `[B or 1, 1, S, S]`, or `[R, 1, L, L]` when
            documents are regrouped. None where every token of a row sees every other. For `tiled` and dense rows only
            the `[1, 1, TILE, TILE]` of it that lies on the diagonal; for `banded` see `band_mask`.
        gather: `[R, L]` int64, the token in each slot of the regrouped rows (token 0 in an empty slot), or None.
        scatter: `[B, S]` int64, the slot of each token, or None.
        groups: `[G, 2]` int64: how many documents have which length, for `sdpa` and `math` one length at a time;
            `gather` and `scatter` are then `[T]`, or None where the documents are in this order, and `mask` is
            `[1, 1, L, L]` for the longest, or None.
        block_mask: for `flex`.
        cu_seqlens: `[documents + 1]` int32, for `varlen` and one length at a time.
        max_seqlen: upper bound on a document's length, for the same.
        window_size: tokens seen to the (left, right), -1 without bound, for `varlen`, `banded`, one length at a time
            and estimates.
    """

    name: str
    causal: bool = False
    dropout_p: float = 0.0
    mask: Tensor | None = None
    gather: Tensor | None = None
    scatter: Tensor | None = None
    groups: Tensor | None = None
    block_mask: BlockMask | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0
    window_size: tuple[int, int] = (-1, -1)


def choose_attention_backend(
    shape: tuple[int, int],
    *,
    document_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    causal: bool = False,
    window: int | None = None,
    dropout_p: float = 0.0,
    device: torch.device,
    dtype: torch.dtype,
) -> AttentionBackend:
    """Chooses the kernel and builds what it needs (mask, indices), once for all layers of a forward pass.

    On CUDA nothing waits for the device. On the CPU, where reading lengths costs nothing, the boundaries are checked,
    and short documents in long rows are taken one length at a time, or regrouped into shorter rows, where that costs
    less.

    Args:
        shape: (B, S).
        document_ids: `[B, S]` integers on `device`: the number of each token's document, which never falls along a row.
        cu_seqlens: `[documents + 1]` int32 or int64 on `device`: 0, then the end of every document in the B * S
            flattened tokens. Repeated entries are empty documents. The end of every row must be among them (a document
            never crosses into the next row). `document_ids` and `cu_seqlens` say the same, and one of them is enough;
            neither: every row is one document.
        max_seqlen: upper bound on the length of a document, padding included, in tokens. None: S.
        causal: a token sees no later token.
        window: a token sees no token further away than this. None: no bound.
        dropout_p: probability of dropping an attention weight; 0 outside training.
        device, dtype: of the queries that the backend is for.

    Raises:
        ValueError: CPU only: boundaries or numbers that do not describe the rows. Any device: a window below 0,
            `document_ids` of another shape.
    """
    rows, row_len = shape
    if window is not None and window < 0:
        raise ValueError(f"window must be 0 or more, not {window}")
    if document_ids is not None and tuple(document_ids.shape) != tuple(shape):
        raise ValueError(f"document_ids has shape {list(document_ids.shape)}; rows of tokens have {list(shape)}")
    if window is not None and window >= min(max_seqlen or row_len, row_len) - 1:
        window = None  # no token of a document is further away
    if is_estimating() and kernel_device(device) == "cuda":
        # What these kernels keep: queries, keys, values and outputs, never the scores.
        reach = (-1, -1) if window is None else (window, 0 if causal else window)
        return AttentionBackend("sdpa", causal=causal and window is None, window_size=reach)
    if cu_seqlens is not None and len(cu_seqlens) == rows + 1 and kernel_device(device) != "cpu":
        document_ids = cu_seqlens = None  # as many documents as rows
    half = dtype in (torch.bfloat16, torch.float16)
    packed = document_ids is not None or cu_seqlens is not None
    if device.type == "cuda" and half and (packed or window is not None) and not dropout_p and _has_flash(device):
        if _flash_4_is_active() and (cu_seqlens is not None or not packed):
            return varlen_backend(shape, cu_seqlens, max_seqlen, causal=causal, window=window, device=device)
        return flex_backend(shape, document_ids, cu_seqlens, causal=causal, window=window, device=device)
    if kernel_device(device) != "cpu":
        return masked_backend(shape, document_ids, cu_seqlens, causal, window, dropout_p, device, dtype)

    segments = gather = scatter = None
    if packed:
        if cu_seqlens is None:
            cu_seqlens = _boundaries(document_ids)
        lengths = document_lengths(cu_seqlens, rows, row_len, max_seqlen)
        if window is not None and window >= lengths.max() - 1:
            window = None
        if len(lengths) > rows:  # else every row is one document
            if not causal:
                by_length = _one_length_at_a_time(lengths, row_len, cu_seqlens, window, dropout_p, device, dtype)
                if by_length is not None:
                    return by_length
            segments, gather, scatter = regroup(lengths, rows, row_len)
            row_len = segments.shape[1]
    if window is not None and not dropout_p and row_len > banded_attention.TILE + (1 if causal else 2) * window:
        band = (window, 0 if causal else window)
        mask = banded_attention.band_mask(segments, row_len, *band, device, dtype)
        return AttentionBackend("banded", mask=mask, gather=gather, scatter=scatter, window_size=band)
    if causal and not dropout_p and row_len <= TILED_LONGEST_ROW:
        dense = segments is None and window is None
        mask = _mask(segments, min(row_len, TILE) if dense else row_len, True, window, device, dtype)
        return AttentionBackend("tiled", mask=mask, gather=gather, scatter=scatter)
    use_math = dropout_p > 0 or (half and row_len <= MATH_LONGEST_ROW)
    name = "math" if use_math else "sdpa"
    if segments is None and window is None and not (causal and use_math):
        return AttentionBackend(name, causal=causal, dropout_p=dropout_p)
    mask = _mask(segments, row_len, causal, window, device, dtype)
    return AttentionBackend(name, dropout_p=dropout_p, mask=mask, gather=gather, scatter=scatter)


def _one_length_at_a_time(
    lengths: np.ndarray,
    row_len: int,
    cu_seqlens: Tensor,
    window: int | None,
    dropout_p: float,
    device: torch.device,
    dtype: torch.dtype,
) -> AttentionBackend | None:
    """The backend for documents in groups of the same length; None where rows cost less, or a band for a window."""
    longest = int(lengths.max())
    if window is not None and longest > banded_attention.TILE + 2 * window:
        return None
    grouped = group_by_length(lengths, row_len)
    if grouped is None:
        return None
    groups, gather, scatter = grouped
    limit = MATH_LONGEST_ROW if dtype in (torch.bfloat16, torch.float16) else MATH_LONGEST_FP32
    return AttentionBackend(
        "math" if dropout_p or (torch.is_grad_enabled() and longest <= limit) else "sdpa",
        dropout_p=dropout_p,
        mask=None if window is None else _mask(None, longest, False, window, device, dtype),
        gather=gather,
        scatter=scatter,
        groups=groups,
        cu_seqlens=cu_seqlens,
        max_seqlen=longest,
        window_size=(-1, -1) if window is None else (window, window),
    )


def flex_backend(
    shape: tuple[int, int],
    document_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    device: torch.device,
) -> AttentionBackend:
    """`flex_attention` over blocks of tokens, whatever `choose_attention_backend` would choose; its arguments."""
    if document_ids is None and cu_seqlens is not None:
        document_ids = document_ids_from(cu_seqlens, shape)
    mask = document_block_mask(document_ids, shape[1], causal=causal, window=window, device=device)
    return AttentionBackend("flex", block_mask=mask)


def varlen_backend(
    shape: tuple[int, int],
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    device: torch.device,
) -> AttentionBackend:
    """`varlen_attn`, whatever `choose_attention_backend` would choose; its arguments.

    An empty document costs the kernel as much as a tile of another one: `cu_seqlens` should have none.
    """
    rows, row_len = shape
    if cu_seqlens is None:
        cu_seqlens = torch.arange(0, rows * row_len + 1, row_len, dtype=torch.int32, device=device)
    left = -1 if window is None else window
    return AttentionBackend(
        "varlen",
        cu_seqlens=cu_seqlens.to(torch.int32),
        max_seqlen=max_seqlen or row_len,
        window_size=(left, 0 if causal else left),
    )


def masked_backend(
    shape: tuple[int, int],
    document_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int | None,
    dropout_p: float,
    device: torch.device,
    dtype: torch.dtype,
) -> AttentionBackend:
    """Rows with a mask where they are not dense, by `scaled_dot_product_attention`, or by plain products on other
    devices than CUDA; `choose_attention_backend`'s arguments."""
    name = "sdpa" if device.type == "cuda" else "math"
    if document_ids is None and cu_seqlens is not None:
        document_ids = document_ids_from(cu_seqlens, shape)
    if document_ids is None and window is None and not (causal and name == "math"):
        return AttentionBackend(name, causal=causal, dropout_p=dropout_p)
    mask = _mask(document_ids, shape[1], causal, window, device, dtype)
    return AttentionBackend(name, dropout_p=dropout_p, mask=mask)


def cached_attention_backend(
    position_ids: Tensor, num_keys: int, dtype: torch.dtype, window: int | None = None
) -> AttentionBackend:
    """How tokens attend to the slots of a `KVCache`: one at position p sees the slots 0 to p, or the last of them.

    Args:
        position_ids: `[B, S]`.
        num_keys: slots looked at, the first ones.
        dtype: of the queries.
        window: a token sees no token further away than this. None: no bound.
    """
    slots, positions = torch.arange(num_keys, device=position_ids.device), position_ids[:, None, :, None]
    unseen = slots > positions
    if window is not None:
        unseen = unseen | (slots < positions - window)
    mask = torch.zeros(unseen.shape, dtype=dtype, device=position_ids.device).masked_fill_(unseen, float("-inf"))
    is_kernel = position_ids.shape[1] > 1 and position_ids.device.type in ("cpu", "cuda")
    return AttentionBackend("sdpa" if is_kernel else "math", mask=mask)


def document_ids_from(cu_seqlens: Tensor, shape: tuple[int, int]) -> Tensor:
    """`[B, S]`, the number of each token's document in the batch, from boundaries over the flattened tokens."""
    positions = torch.arange(shape[0] * shape[1], device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, positions, right=True, out_int32=True).view(shape)


def activate_flash_attention_4(device: torch.device) -> bool:
    """Lets FlashAttention-4 replace PyTorch's flash kernels in this process, if it is installed and the GPU has it.

    Install it with `pip install 'flash-attn-4>=4.0.0b30'`; it needs a Hopper or Blackwell GPU.

    Returns:
        Whether it is active now.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return False
    try:
        if find_spec("flash_attn.cute") is None:
            return False
    except ModuleNotFoundError:  # no flash_attn at all
        return False
    torch.nn.attention.activate_flash_attention_impl("FA4")
    return True


def _flash_4_is_active() -> bool:
    return torch.nn.attention.current_flash_attention_impl() == "FA4"


def _has_flash(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _boundaries(document_ids: Tensor) -> Tensor:
    """`cu_seqlens` of document numbers that do not fall along a row; waits for the device."""
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    change = document_ids.diff(dim=1)
    if (change < 0).any():
        raise ValueError("document_ids must not fall along a row")
    starts[:, 1:] = change != 0
    found = starts.flatten().nonzero().squeeze(1)
    return torch.cat((found, found.new_tensor([document_ids.numel()])))


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
