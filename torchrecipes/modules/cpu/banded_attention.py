"""Attention within a window on a CPU: tiles of queries, each with the keys that its window reaches."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 128  # queries


def band_tiles(length: int, left: int, right: int) -> Iterator[tuple[slice, slice, slice]]:
    """For every tile of queries: its tokens, its keys, and the columns of the mask that are these keys."""
    for start in range(0, length, TILE):
        end = min(start + TILE, length)
        first, last = max(0, start - left), min(length, end + right)
        yield slice(start, end), slice(first, last), slice(first - start + left, last - start + left)


def band_mask(
    segments: Tensor | None, length: int, left: int, right: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """0 where a token sees another, -inf elsewhere, for the keys that `band_tiles` gives its tile.

    Args:
        segments: `[R, L]`, the document of each token; None: every row is one document.
        length: L.
        left, right: how many tokens before itself, and after itself, a token sees.
        device, dtype: of the result.

    Returns:
        `[R, 1, L, TILE + left + right]`, or `[1, 1, TILE, TILE + left + right]` without segments.
    """
    width = TILE + left + right
    distance = torch.arange(width, device=device)[None, :] - torch.arange(TILE, device=device)[:, None] - left
    seen = (distance >= -left) & (distance <= right)
    if segments is not None:
        tiles = -(-length // TILE)
        queries = torch.nn.functional.pad(segments, (0, tiles * TILE - length), value=-2).view(-1, tiles, TILE, 1)
        keys = torch.nn.functional.pad(segments, (left, tiles * TILE - length + right), value=-3)
        seen = (seen & (queries == keys.unfold(1, width, TILE)[:, :, None])).flatten(1, 2)[:, :length]
    else:
        seen = seen[None]
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))[:, None]


class BandedAttention(torch.autograd.Function):
    """Softmax attention within a window, scaled by `1 / sqrt(H)`; work and memory grow with the length of a row.

    The weights (`TILE + left + right` per query and head) are kept for the backward pass.

    Args of `apply`:
        q: `[B, S, N, H]`.
        k, v: `[B, S, K, H]`; query head n uses head `n // (N // K)`.
        mask: from `band_mask`.
        left, right: see `band_mask`.

    Returns:
        `[B, S, N, H]`, contiguous.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, left: int, right: int) -> Tensor:  # noqa: D102
        batch, length, heads, size = q.shape
        groups = heads // k.shape[2]  # query heads per key head: together they are more rows of one product
        q = (q * size**-0.5).transpose(1, 2).reshape(-1, groups, length, size)  # [B K, G, S, H]
        k, v = (x.transpose(1, 2).reshape(-1, length, size) for x in (k, v))  # [B K, S, H]
        out = torch.empty(batch, length, heads, size, dtype=q.dtype, device=q.device)
        kept = []
        for tokens, keys, columns in band_tiles(length, left, right):
            rows = tokens.stop - tokens.start
            queries = q[:, :, tokens].reshape(-1, groups * rows, size)
            scores = torch.bmm(queries, k[:, keys].transpose(1, 2))
            of_tile = mask[:, :, tokens] if mask.shape[2] == length else mask[:, :, :rows]
            scores.view(batch, heads, rows, -1).add_(of_tile[..., columns])
            weights = torch.softmax(scores, -1, out=scores)
            kept.append(weights)
            out[:, tokens] = torch.bmm(weights, v[:, keys]).view(batch, heads, rows, size).transpose(1, 2)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.band = (left, right)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # noqa: D102
        q, k, v, *kept = ctx.saved_tensors
        batch, length, heads, size = grad.shape
        groups = q.shape[1]
        grad = grad.transpose(1, 2).reshape(q.shape)
        grad_q = torch.empty(batch, length, heads, size, dtype=q.dtype, device=q.device)
        grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
        for (tokens, keys, _), weights in zip(band_tiles(length, *ctx.band), kept, strict=True):
            rows = tokens.stop - tokens.start
            grad_rows = grad[:, :, tokens].reshape(-1, groups * rows, size)
            grad_scores = torch.bmm(grad_rows, v[:, keys].transpose(1, 2))  # of the weights; softmax's in place
            torch.ops.aten._softmax_backward_data.out(grad_scores, weights, -1, weights.dtype, grad_input=grad_scores)
            grad_k[:, keys].baddbmm_(grad_scores.transpose(1, 2), q[:, :, tokens].reshape(-1, groups * rows, size))
            grad_v[:, keys].baddbmm_(weights.transpose(1, 2), grad_rows)
            tile_q = torch.bmm(grad_scores, k[:, keys]).mul_(size**-0.5)
            grad_q[:, tokens] = tile_q.view(batch, heads, rows, size).transpose(1, 2)
        grad_k, grad_v = (x.view(batch, -1, length, size).transpose(1, 2) for x in (grad_k, grad_v))
        return grad_q, grad_k, grad_v, None, None, None
