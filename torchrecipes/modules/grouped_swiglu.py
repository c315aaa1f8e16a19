"""SwiGLU layers of many experts in grouped products, for GPUs and for `torch.compile`.

PyTorch has a kernel of `grouped_mm` for bf16 on GPUs from Hopper on, which takes rows and columns in any order: none of
the transposed operands below is copied. Elsewhere `grouped_mm` waits for the device and multiplies one expert after the
other.

Letters, besides those of the package: E experts, k of them for a token, I inside one, M = T k assignments of a token to
an expert, sorted by expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchrecipes.modules.expert_dispatch import Dispatch


def grouped_swiglu(x_TD: Tensor, weight_Tk: Tensor, gate_up: Tensor, down: Tensor, dispatch: Dispatch) -> Tensor:
    """`sum over k of weight * down(silu(gate(x)) * up(x))`, each token with its own k experts.

    Args:
        x_TD: hidden states of the tokens.
        weight_Tk: the weights of each token's experts.
        gate_up: `[E, 2 I, D]`.
        down: `[E, D, I]`.
        dispatch: which experts these are.

    Returns:
        `[T, D]`, in the dtype of all of them.
    """
    return _GroupedSwiGLU.apply(x_TD, weight_Tk, gate_up, down, *dispatch)


class _GroupedSwiGLU(torch.autograd.Function):
    """The backward pass is written by hand: it needs neither the experts' outputs, since the gradient of a weight is
    the product of its expert's inner activation and the gradient of that, nor sums whose order depends on threads.

    A compiler fuses what is between two products into one kernel, the gathers of tokens and the sums over k included.
    """

    @staticmethod
    def forward(ctx, x_TD, weight_Tk, gate_up, down, token_M, place_Tk, ends_E):
        weight_M = torch.empty_like(weight_Tk).flatten()
        weight_M[place_Tk.flatten()] = weight_Tk.flatten()
        gate_up_M2I = _grouped_mm(x_TD.index_select(0, token_M), gate_up.mT, ends_E)
        gate, up = gate_up_M2I.chunk(2, dim=-1)
        out_MD = _grouped_mm(F.silu(gate) * up * weight_M[:, None], down.mT, ends_E)
        ctx.save_for_backward(x_TD, weight_M, gate_up, down, token_M, place_Tk, ends_E, gate_up_M2I)
        return _sum_of_assignments(out_MD, place_Tk)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD):
        x_TD, weight_M, gate_up, down, token_M, place_Tk, ends_E, gate_up_M2I = ctx.saved_tensors
        grad_MD = grad_TD.index_select(0, token_M)
        grad_inner_MI = _grouped_mm(grad_MD, down, ends_E)
        inner_MI, grad_M2I, grad_weight_M = swiglu_backward(gate_up_M2I, weight_M, grad_inner_MI)
        grad_down = _grouped_mm(grad_MD.t(), inner_MI, ends_E)
        grad_gate_up = _grouped_mm(grad_M2I.t(), x_TD.index_select(0, token_M), ends_E)
        grad_x_TD = _sum_of_assignments(_grouped_mm(grad_M2I, gate_up, ends_E), place_Tk)
        return grad_x_TD, grad_weight_M[place_Tk], grad_gate_up, grad_down, None, None, None


@torch.library.custom_op("torchrecipes::swiglu_backward", mutates_args=())
def swiglu_backward(gate_up_M2I: Tensor, weight_M: Tensor, grad_MI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass between the two products: on a GPU one kernel, of which `torch.compile` makes two that read
    everything twice.

    Args:
        gate_up_M2I: what `silu(gate) * up` is made of.
        weight_M: by what it is multiplied.
        grad_MI: the gradient of the product of both.

    Returns:
        The product itself, `[M, I]`, and the gradients of `gate_up_M2I` and `weight_M`.
    """
    if gate_up_M2I.is_cuda and gate_up_M2I.dtype != torch.float64:
        from torchrecipes.modules.cuda import swiglu_backward as kernel  # here, since triton takes long to import

        if kernel.HAS_TRITON:
            return kernel.swiglu_backward(gate_up_M2I, weight_M, grad_MI)
    gate, up = gate_up_M2I.chunk(2, dim=-1)
    weight_M1, sigmoid = weight_M[:, None], gate.sigmoid()
    silu = gate * sigmoid
    inner_MI, weighted_MI = silu * up, grad_MI * weight_M1
    # silu'(g) = sigmoid(g) + silu(g) (1 - sigmoid(g))
    grad_gate_MI = weighted_MI * up * (sigmoid + silu * (1 - sigmoid))
    grad_M2I = torch.cat([grad_gate_MI, weighted_MI * silu], dim=-1)
    return inner_MI * weight_M1, grad_M2I, (grad_MI * inner_MI).sum(-1)


@swiglu_backward.register_fake
def _(gate_up_M2I: Tensor, weight_M: Tensor, grad_MI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(grad_MI), torch.empty_like(gate_up_M2I), torch.empty_like(weight_M)


def _sum_of_assignments(x_MD: Tensor, place_Tk: Tensor) -> Tensor:
    return x_MD[place_Tk].sum(1)


def _grouped_mm(a: Tensor, b: Tensor, ends_E: Tensor) -> Tensor:
    """`F.grouped_mm`, which has no float64; compiled in fp32 as a custom operation, since torch traces bf16 only.

    Args:
        a: `[M, R]`, or `[R, M]` for the outer products of each expert's rows.
        b: `[E, R, C]`, or `[M, C]`.
        ends_E: see `Dispatch`.

    Returns:
        `[M, C]`, or `[E, R, C]`.
    """
    if a.dtype == torch.float64:
        ends = ends_E.tolist()
        spans = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        if b.dim() == 3:
            return torch.cat([a[span] @ matrix for span, matrix in zip(spans, b, strict=True)])
        return torch.stack([a[:, span] @ b[span] for span in spans])
    if a.dtype == torch.float32 and torch.compiler.is_compiling():
        return _grouped_mm_fp32(a, b, ends_E)
    return F.grouped_mm(a, b, offs=ends_E)


@torch.library.custom_op("torchrecipes::grouped_mm_fp32", mutates_args=())
def _grouped_mm_fp32(a: Tensor, b: Tensor, ends_E: Tensor) -> Tensor:
    return F.grouped_mm(a, b, offs=ends_E)


@_grouped_mm_fp32.register_fake
def _(a: Tensor, b: Tensor, ends_E: Tensor) -> Tensor:
    groups = () if b.dim() == 3 else (len(ends_E),)
    return a.new_empty(*groups, a.shape[0], b.shape[-1])
