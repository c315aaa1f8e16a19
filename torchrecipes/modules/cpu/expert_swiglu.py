"""SwiGLU layers of many experts in batched products.

Every expert gets as many slots as the fullest one needs, so that one batched product serves all: on a CPU it takes half
the time of one product after the other. Between the products, a few rows at a time stay in the cache through several
operations.

Letters, besides those of the package: E experts, k of them for a token, I inside one, M slots or, without empty ones,
T k assignments of a token to an expert, sorted by expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchrecipes.estimation import is_estimating

TILE = 1 << 18  # elements per elementwise operation
MOST_SLOTS = 1.6  # times the assignments; with more, products of empty slots cost more than batching saves


def expert_swiglu(x_TD: Tensor, expert_Tk: Tensor, weight_Tk: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`sum over k of weight * down(silu(gate(x)) * up(x))`, each token with its own k experts.

    Args:
        x_TD: hidden states of the tokens.
        expert_Tk: the experts of each token, int64.
        weight_Tk: their weights.
        gate_up: `[E, 2 I, D]`.
        down: `[E, D, I]`.

    Returns:
        `[T, D]`, in the dtype of all of them.
    """
    return _ExpertSwiGLU.apply(x_TD, weight_Tk, gate_up, down, *_assign_slots(expert_Tk, len(down)))


def _assign_slots(expert_Tk: Tensor, num_experts: int) -> tuple[Tensor, Tensor, list[int] | None]:
    """Sorts assignments by expert.

    Returns:
        token_M: the token of every slot; of empty ones, token 0, which gets a weight of 0 there. slot_Tk: the slots of
        a token's assignments. The third is None; where the load is so uneven that empty slots cost more than they save,
        there are none, and the third is the number of each expert's assignments.
    """
    tokens, k = expert_Tk.shape
    order_M = expert_Tk.flatten().argsort(stable=True)
    slot_M = torch.empty_like(order_M)
    slot_M[order_M] = torch.arange(tokens * k)
    if is_estimating():
        count_E = torch.full((num_experts,), -(-tokens * k // num_experts))
        slots = -(-tokens * k // num_experts)
    else:
        count_E = torch.bincount(expert_Tk.flatten(), minlength=num_experts)
        slots = max(1, int(count_E.max()))
    if slots * num_experts > MOST_SLOTS * tokens * k:
        return order_M // k, slot_M.view_as(expert_Tk), count_E.tolist()
    shift_E = torch.arange(num_experts) * slots - (count_E.cumsum(0) - count_E)
    slot_Tk = slot_M.view_as(expert_Tk) + shift_E[expert_Tk]
    token_M = slot_M.new_zeros(slots * num_experts)
    token_M[slot_Tk] = torch.arange(tokens)[:, None]
    return token_M, slot_Tk, None


class _ExpertSwiGLU(torch.autograd.Function):
    """The backward pass is written by hand: it needs neither the experts' outputs, since the gradient of a weight is
    the product of its expert's inner activation and the gradient of that, nor sums whose order depends on threads.
    """

    @staticmethod
    def forward(ctx, x_TD, weight_Tk, gate_up, down, token_M, slot_Tk, counts):
        gate_up_M2I = _product(F.embedding(token_M, x_TD), gate_up.mT, counts)
        out_MD = _product(_inner(gate_up_M2I), down.mT, counts)
        ctx.counts = counts
        ctx.save_for_backward(x_TD, weight_Tk, gate_up, down, token_M, slot_Tk, gate_up_M2I)
        return F.embedding_bag(slot_Tk, out_MD, mode="sum", per_sample_weights=weight_Tk)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD):
        x_TD, weight_Tk, gate_up, down, token_M, slot_Tk, gate_up_M2I = ctx.saved_tensors
        weight_M1 = weight_Tk.new_zeros(len(token_M), 1)
        weight_M1[slot_Tk, 0] = weight_Tk
        grad_MD = F.embedding(token_M, grad_TD.contiguous())
        grad_inner_MI = _product(grad_MD, down, ctx.counts)
        inner_MI, grad_M2I, grad_weight_M = _inner_backward(gate_up_M2I, weight_M1, grad_inner_MI)
        grad_down = _outer(grad_MD, inner_MI, ctx.counts, len(down))
        grad_gate_up = _outer(grad_M2I, F.embedding(token_M, x_TD), ctx.counts, len(down))
        grad_x_TD = F.embedding_bag(slot_Tk, _product(grad_M2I, gate_up, ctx.counts), mode="sum")
        return grad_x_TD, grad_weight_M[slot_Tk].to(weight_Tk.dtype), grad_gate_up, grad_down, None, None, None


def _inner(gate_up_M2I: Tensor) -> Tensor:
    """`silu(gate) * up`, `[M, I]`."""
    inner_MI = gate_up_M2I.new_empty(len(gate_up_M2I), gate_up_M2I.shape[1] // 2)
    for rows in _tiles(inner_MI):
        gate, up = gate_up_M2I[rows].chunk(2, dim=-1)
        torch.mul(F.silu(gate), up, out=inner_MI[rows])
    return inner_MI


def _inner_backward(gate_up_M2I: Tensor, weight_M1: Tensor, grad_MI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`weight * silu(gate) * up` and the gradients of `gate_up_M2I` and of the weights, `[M]` in fp32 or wider.

    Args:
        grad_MI: the gradient of that, before the weights.
    """
    inner_MI, grad_M2I = torch.empty_like(grad_MI), torch.empty_like(gate_up_M2I)
    wide = torch.promote_types(grad_MI.dtype, torch.float32)
    grad_weight_M = torch.empty(len(grad_MI), dtype=wide)
    for rows in _tiles(inner_MI):
        gate, up = gate_up_M2I[rows].chunk(2, dim=-1)
        grad_gate, grad_up = grad_M2I[rows].chunk(2, dim=-1)
        grad, weight = grad_MI[rows], weight_M1[rows]
        silu = F.silu(gate)
        inner = torch.mul(silu, up, out=inner_MI[rows])
        torch.sum(grad * inner, -1, dtype=wide, out=grad_weight_M[rows])
        inner.mul_(weight)
        grad = grad * weight
        torch.mul(silu, grad, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=grad_gate)
    return inner_MI, grad_M2I, grad_weight_M


def _tiles(x: Tensor) -> list[slice]:
    """Slices of as many rows as stay in the cache through several operations."""
    if is_estimating():
        return [slice(None)]
    rows = max(1, TILE // x.shape[1])
    return [slice(start, start + rows) for start in range(0, len(x), rows)]


def _product(a_MR: Tensor, b_ERC: Tensor, counts: list[int] | None) -> Tensor:
    """Multiplies every expert's rows by its matrix: `[M, C]`."""
    if counts is None:
        return torch.bmm(a_MR.unflatten(0, (len(b_ERC), -1)), b_ERC).flatten(0, 1)
    out_MC = a_MR.new_empty(len(a_MR), b_ERC.shape[-1])
    for a, b, out in zip(a_MR.split(counts), b_ERC, out_MC.split(counts), strict=True):
        torch.mm(a, b, out=out)
    return out_MC


def _outer(a_MR: Tensor, b_MC: Tensor, counts: list[int] | None, num_experts: int) -> Tensor:
    """`a.T @ b` for every expert's rows: `[E, R, C]`."""
    if counts is None:
        return torch.bmm(a_MR.unflatten(0, (num_experts, -1)).mT, b_MC.unflatten(0, (num_experts, -1)))
    out_ERC = a_MR.new_empty(num_experts, a_MR.shape[1], b_MC.shape[1])
    for a, b, out in zip(a_MR.split(counts), b_MC.split(counts), out_ERC, strict=True):
        torch.mm(a.t(), b, out=out)
    return out_ERC
