"""Attention of documents, those of one length at a time as rows of their own: no mask, and no token of padding."""

from __future__ import annotations

import torch
from torch import Tensor

from torchrecipes.modules.attention_backend import AttentionBackend
from torchrecipes.modules.cpu.dropout import dropout
from torchrecipes.modules.row_attention import attend_rows


def attend_by_length(q: Tensor, k: Tensor, v: Tensor, backend: AttentionBackend) -> Tensor:
    """Attention of the documents in `backend.groups`.

    Args:
        q, k, v: as for `attention`, `[B, S, N, H]` and `[B, S, K, H]`.
        backend: `sdpa` or `math` with `groups`.

    Returns:
        `[B, S, N, H]`.
    """
    if torch.compiler.is_compiling():  # the loop follows the lengths in a batch: to a compiler it is one operation
        tensors = (backend.groups, backend.gather, backend.scatter, backend.mask)
        return _attend(q, k, v, *tensors, backend.name, backend.dropout_p)[0]
    groups, mask = backend.groups.tolist(), backend.mask
    outs = []
    for (_, length), *rows in zip(groups, *(_rows(x, groups, backend.gather) for x in (q, k, v)), strict=True):
        of_group = backend if mask is None else backend._replace(mask=mask[..., :length, :length])
        outs.append(attend_rows(*rows, of_group).flatten(0, 1))
    return _tokens(outs, backend.scatter).view(q.shape)


def _rows(x: Tensor, groups: list[list[int]], gather: Tensor | None) -> list[Tensor]:
    """`[documents, L, N, H]` for every group."""
    x_TNH = x.flatten(0, 1) if gather is None else x.flatten(0, 1).index_select(0, gather)
    parts = x_TNH.split([count * length for count, length in groups])
    return [part.unflatten(0, group) for part, group in zip(parts, groups, strict=True)]


def _tokens(parts: list[Tensor], scatter: Tensor | None) -> Tensor:
    x_TNH = torch.cat(parts)
    return x_TNH if scatter is None else x_TNH.index_select(0, scatter)


RNG_STATE_BYTES = torch.get_rng_state().numel()
_RANDOM = {"tags": torch.Tag.nondeterministic_seeded}  # a compiler recomputes it with the same dropout


@torch.library.custom_op("torchrecipes::attend_by_length", mutates_args=(), **_RANDOM)
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Tensor,
    gather: Tensor | None,
    scatter: Tensor | None,
    mask: Tensor | None,
    name: str,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """`attend_by_length`, and the state of the random generator before it."""
    state = torch.get_rng_state()
    backend = AttentionBackend(name, dropout_p=dropout_p, mask=mask, gather=gather, scatter=scatter, groups=groups)
    return attend_by_length(q, k, v, backend), state


@_attend.register_fake
def _(q, *_):
    state = torch.empty(RNG_STATE_BYTES, dtype=torch.uint8)
    return torch.empty_like(q, memory_format=torch.contiguous_format), state


@torch.library.custom_op("torchrecipes::attend_by_length_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Tensor,
    gather: Tensor | None,
    scatter: Tensor | None,
    mask: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v; weights are computed again, with the dropout of the forward pass."""
    sizes, scale = groups.tolist(), q.shape[-1] ** -0.5
    gradients: tuple[list[Tensor], ...] = ([], [], [])
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(state)
        for rows in zip(*(_rows(x, sizes, gather) for x in (q, k, v, grad)), strict=True):
            q_BNSH, k_BKSH, v_BKSH, grad_BNSH = (x.transpose(1, 2) for x in rows)
            batch, heads, length, size = q_BNSH.shape
            by_key_head = (batch, k_BKSH.shape[1], -1, size)  # the query heads of a key head are more rows
            q_rows, grad_rows = (q_BNSH * scale).reshape(by_key_head), grad_BNSH.reshape(by_key_head)
            scores = torch.matmul(q_rows, k_BKSH.mT).view(batch, heads, length, length)
            if mask is not None:
                scores = scores + mask[..., :length, :length]
            weights = scores.softmax(-1)
            dropped = dropout(weights, dropout_p)
            of_key_head = (batch, k_BKSH.shape[1], -1, length)
            of_weights = torch.matmul(grad_rows, v_BKSH.mT).view(scores.shape) * dropped
            of_scores = (of_weights - weights * of_weights.sum(-1, keepdim=True)).view(of_key_head)
            found = (
                torch.matmul(of_scores, k_BKSH).view(q_BNSH.shape) * scale,
                torch.matmul(of_scores.mT, q_rows),
                torch.matmul(dropped.view(of_key_head).mT, grad_rows),
            )
            for of_one, x in zip(gradients, found, strict=True):
                of_one.append(x.transpose(1, 2).flatten(0, 1))
    return tuple(_tokens(parts, scatter).view(x.shape) for parts, x in zip(gradients, (q, k, v), strict=True))


@_attend_backward.register_fake
def _(_grad, _state, q, k, v, *_):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    *tensors, _, ctx.dropout_p = inputs
    ctx.save_for_backward(output[1], *tensors)


def _backward(ctx, grad, _):
    gradients = _attend_backward(grad, *ctx.saved_tensors, ctx.dropout_p)
    return *gradients, *[None] * 6


_attend.register_autograd(_backward, setup_context=_setup_context)
