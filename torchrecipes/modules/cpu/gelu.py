"""GELU in its tanh approximation, fast on a CPU."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchrecipes.estimation import kernel_device

SCALE, CUBIC = math.sqrt(8 / math.pi), 0.044715
TILE = 1 << 17  # elements whose fp32 values stay in the cache


def gelu_tanh(x: Tensor) -> Tensor:
    """`F.gelu(x, approximate="tanh")` (Hendrycks and Gimpel 2016, arXiv:1606.08415), in the dtype of x.

    On a CPU it is computed as `x * sigmoid(2 z)`, which equals `x * (1 + tanh(z)) / 2`, because tanh takes four
    times as long as sigmoid. The forward pass also computes the derivative and keeps it instead of x.
    """
    if kernel_device(x.device) != "cpu":
        return F.gelu(x, approximate="tanh")
    if torch.is_grad_enabled() and x.requires_grad:
        return _GeluTanh.apply(x)
    return _gelu(x, with_slope=False)[0]


class _GeluTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        out, slope = _gelu(x, with_slope=True)
        ctx.save_for_backward(slope)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]


def _gelu(x: Tensor, with_slope: bool) -> tuple[Tensor, Tensor | None]:
    """GELU of x and, if asked for, its derivative, in the dtype of x."""
    if torch.compiler.is_compiling() or x.numel() <= TILE:  # a compiler fuses it by itself
        out, slope = _tile(x, with_slope)
        return _cast(out, x.dtype), _cast(slope, x.dtype) if with_slope else None
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    slope = torch.empty_like(out) if with_slope else None
    slopes = slope.view(-1).split(TILE) if with_slope else ()
    for i, (x_part, out_part) in enumerate(zip(x.reshape(-1).split(TILE), out.view(-1).split(TILE), strict=True)):
        wide, wide_slope = _tile(x_part, with_slope)
        out_part.copy_(wide)
        if with_slope:
            slopes[i].copy_(wide_slope)
    return out, slope


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Not left to `x.to`: where it changes nothing, torch 2.11 compiles it to a gradient of zero."""
    return x if x.dtype == dtype else x.to(dtype)


def _tile(x: Tensor, with_slope: bool) -> tuple[Tensor, Tensor | None]:
    """The same in fp32 or wider."""
    wide = _cast(x, torch.promote_types(x.dtype, torch.float32))
    scale = wide.new_full((), SCALE)
    gate = torch.addcmul(scale, wide, wide, value=SCALE * CUBIC).mul_(wide).sigmoid_()
    out = wide * gate
    if not with_slope:
        return out, None
    inner = torch.addcmul(scale, wide, wide, value=3 * SCALE * CUBIC)  # derivative of what the sigmoid is taken of
    return out, inner.mul_(out.addcmul(out, gate, value=-1)).add_(gate)
