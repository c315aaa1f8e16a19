"""The largest attention logit of every head, for QK-clip (Kimi K2, arXiv:2507.20534, section 2.1)."""

import torch
from torch import Tensor

from torchrecipes.modules.attention_backend import AttentionBackend
from torchrecipes.modules.cpu.banded_attention import band_tiles

# Scores per product: fewer make it slow, on a GPU sooner than on a CPU; with more of them, more are masked.
_SCORES, _SCORES_ON_GPU = 2**23, 2**26


def max_logits(q: Tensor, k: Tensor, backend: AttentionBackend) -> Tensor:
    """The largest `q . k / sqrt(H)` of every query head, over all tokens and the keys that each of them sees.

    Scores are computed for a few queries at a time, never all at once.

    Args:
        q: `[B, S, N, H]`, rotated, as `attention` takes it.
        k: `[B, S, K, H]`.
        backend: from `choose_attention_backend`, any but `flex`; documents, causality and window apply as in
            `attention`.

    Returns:
        `[N]` fp32, without gradient, with the precision of a product in q's dtype; -inf for a head whose scores are not
        finite.

    Raises:
        ValueError: a `flex` backend, whose mask is not known here.
    """
    if backend.name == "flex":
        raise ValueError("a flex backend reports its largest scores itself: attention(..., max_logits=)")
    found = torch.full((q.shape[2],), float("-inf"), device=q.device)
    record_max_logits(found, q, k, backend)
    return found


def record_max_logits(largest: Tensor, q: Tensor, k: Tensor, backend: AttentionBackend) -> None:
    """Raises `largest`, `[N]` fp32, in place to `max_logits(q, k, backend)` where that is more.

    To `torch.compile` it is one operation. When activation checkpointing recomputes a forward pass, it does nothing.
    """
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:  # inside a backward pass
        return
    left, right = backend.window_size
    if backend.causal or backend.name == "tiled":
        right = 0
    if backend.cu_seqlens is not None:  # no key of the same document is further away
        left, right = (min(reach if reach >= 0 else backend.max_seqlen, backend.max_seqlen) for reach in (left, right))
    by_length = backend.groups is not None  # documents and window say it all
    masks = (None, None, backend.cu_seqlens) if by_length else (backend.mask, backend.gather, backend.cu_seqlens)
    _record(largest, q.detach(), k.detach(), *masks, left, right, backend.name == "banded")


def raise_max_logits(largest: Tensor, max_scores_BNS: Tensor) -> None:
    """Raises `largest`, `[N]` fp32, in place to the largest of each head's scores, which `flex_attention` returns."""
    _raise(largest, max_scores_BNS.detach())


@torch.library.custom_op("torchrecipes::raise_max_logits", mutates_args=("largest",))
def _raise(largest: Tensor, max_scores_BNS: Tensor) -> None:
    found = max_scores_BNS.amax(dim=(0, 2))
    largest.copy_(torch.where(found.isfinite(), torch.maximum(largest, found), largest))


_raise.register_fake(lambda *_: None)


@torch.library.custom_op("torchrecipes::record_max_logits", mutates_args=("largest",))
def _record(
    largest: Tensor,
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    gather: Tensor | None,
    cu_seqlens: Tensor | None,
    left: int,
    right: int,
    banded: bool,
) -> None:
    if gather is not None:
        q, k = (x.flatten(0, 1)[gather.flatten()].unflatten(0, gather.shape) for x in (q, k))
    batch, length, heads, size = q.shape
    key_heads, num_keys = k.shape[2], k.shape[1]
    q = (q * size**-0.5).view(batch, length, key_heads, heads // key_heads, size).permute(0, 2, 3, 1, 4)
    k = k.permute(0, 2, 3, 1)[:, :, None]  # [B, K, 1, H, S]
    if banded:
        found = torch.full_like(largest, float("-inf"))
        for tokens, keys, columns in band_tiles(length, left, right):
            scores = torch.matmul(q[:, :, :, tokens], k[..., keys])
            of_tile = mask[:, :, tokens] if mask.shape[2] == length else mask[:, :, : scores.shape[3]]
            found = torch.maximum(
                found, (scores + of_tile[:, None, :, :, columns]).amax(dim=(0, 3, 4)).flatten().float()
            )
        largest.copy_(torch.where(found.isfinite(), torch.maximum(largest, found), largest))
        return
    if mask is not None and mask.shape[-2:] != (length, num_keys):
        mask = None  # a tile on the diagonal, for causality only, which `right` expresses, too
    segments = None
    if cu_seqlens is not None:
        positions = torch.arange(batch * length, device=q.device, dtype=cu_seqlens.dtype)
        segments = torch.searchsorted(cu_seqlens, positions, right=True).view(batch, length)
    position = torch.arange(num_keys, device=q.device)
    found = torch.full_like(largest, float("-inf"))
    rows = max(1, (_SCORES_ON_GPU if q.is_cuda else _SCORES) // (batch * heads * num_keys))
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        # Keys that none of these queries attends to are left out of the product.
        first = max(0, start - left) if left >= 0 else 0
        last = min(num_keys, stop + right) if right >= 0 else num_keys
        scores = torch.matmul(q[:, :, :, start:stop], k[..., first:last])  # [B, K, G, rows, keys]
        if mask is not None:
            scores += mask[:, :, None, start:stop, first:last]
        else:
            distance = position[start:stop, None] - position[None, first:last]
            hidden = torch.zeros_like(distance, dtype=torch.bool)
            if left >= 0:
                hidden = hidden | (distance > left)
            if right >= 0:
                hidden = hidden | (distance < -right)
            if segments is not None:
                hidden = hidden | (segments[:, start:stop, None] != segments[:, None, first:last])
                hidden = hidden[:, None, None]
            scores.masked_fill_(hidden, float("-inf"))
        found = torch.maximum(found, scores.amax(dim=(0, 3, 4)).flatten().float())
    largest.copy_(torch.where(found.isfinite(), torch.maximum(largest, found), largest))


_record.register_fake(lambda *_: None)
