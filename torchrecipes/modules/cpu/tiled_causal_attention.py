"""Causal attention on a CPU: a few batched products over tiles of queries."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 128  # queries; 64 and 256 are slower


class CausalTiles(torch.autograd.Function):
    """Causal softmax attention, scaled by `1 / sqrt(H)`: a tile of queries attends to the keys up to its own end.

    So the masked half of the scores is not computed. The weights (S / 2 per query and head) are kept for the backward
    pass.

    Args of `apply`:
        q: `[B, S, N, H]`.
        k, v: `[B, S, K, H]`; query head n uses head `n // (N // K)`.
        mask: added to the scores, 0 or -inf: `[B or 1, 1, S, S]`; or `[1, 1, TILE, TILE]` for longer rows, which is
            then what lies on the diagonal, and below it nothing is hidden.

    Returns:
        `[B, S, N, H]`, contiguous.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:  # noqa: D102
        batch, length, heads, size = q.shape
        groups = heads // k.shape[2]  # query heads per key head: together they are more rows of one product
        q = (q * size**-0.5).transpose(1, 2).reshape(-1, groups, length, size)  # [B K, G, S, H]
        k, v = (x.transpose(1, 2).reshape(-1, length, size) for x in (k, v))  # [B K, S, H]
        out = torch.empty(batch, length, heads, size, dtype=q.dtype, device=q.device)
        kept = []
        for start, end in _tiles(length):
            rows = end - start
            scores = torch.bmm(q[:, :, start:end].reshape(-1, groups * rows, size), k[:, :end].transpose(1, 2))
            by_head = scores.view(batch, heads, rows, end)
            if mask.shape[-1] < length:
                by_head[..., start:].add_(mask[..., :rows, :rows])
            else:
                by_head.add_(mask[..., start:end, :end])
            weights = torch.softmax(scores, -1, out=scores)
            kept.append(weights)
            out[:, start:end] = torch.bmm(weights, v[:, :end]).view(batch, heads, rows, size).transpose(1, 2)
        ctx.save_for_backward(q, k, v, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # noqa: D102
        q, k, v, *kept = ctx.saved_tensors
        batch, length, heads, size = grad.shape
        groups = q.shape[1]
        grad = grad.transpose(1, 2).reshape(q.shape)
        grad_q = torch.empty(batch, length, heads, size, dtype=q.dtype, device=q.device)
        grad_k = grad_v = None
        for (start, end), weights in reversed(list(zip(_tiles(length), kept, strict=True))):
            rows = end - start
            grad_rows = grad[:, :, start:end].reshape(-1, groups * rows, size)
            grad_scores = torch.bmm(grad_rows, v[:, :end].transpose(1, 2))  # of the weights; softmax's in place
            torch.ops.aten._softmax_backward_data.out(grad_scores, weights, -1, weights.dtype, grad_input=grad_scores)
            q_rows = q[:, :, start:end].reshape(-1, groups * rows, size)
            tile_k = torch.bmm(grad_scores.transpose(1, 2), q_rows)
            tile_v = torch.bmm(weights.transpose(1, 2), grad_rows)
            if grad_k is None:  # the last tile has seen all keys
                grad_k, grad_v = tile_k, tile_v
            else:
                grad_k[:, :end].add_(tile_k)
                grad_v[:, :end].add_(tile_v)
            tile_q = torch.bmm(grad_scores, k[:, :end]).mul_(size**-0.5)
            grad_q[:, start:end] = tile_q.view(batch, heads, rows, size).transpose(1, 2)
        grad_k, grad_v = (x.view(batch, -1, length, size).transpose(1, 2) for x in (grad_k, grad_v))
        return grad_q, grad_k, grad_v, None


def _tiles(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + TILE, length)) for start in range(0, length, TILE)]
