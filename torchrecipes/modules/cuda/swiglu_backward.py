"""The backward pass of a weighted SwiGLU, in one pass over memory."""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch for CPUs comes without it
    HAS_TRITON = False
else:
    HAS_TRITON = True

    @triton.jit
    def _kernel(gate_up, weight, grad, inner, grad_gate_up, grad_weight, SIZE: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        row_weight = tl.load(weight + row).to(tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, SIZE, BLOCK):
            i = start + tl.arange(0, BLOCK)
            mask = i < SIZE
            gate = tl.load(gate_up + row * 2 * SIZE + i, mask, 0.0).to(tl.float32)
            up = tl.load(gate_up + (row * 2 + 1) * SIZE + i, mask, 0.0).to(tl.float32)
            grad_row = tl.load(grad + row * SIZE + i, mask, 0.0).to(tl.float32)
            sigmoid = tl.sigmoid(gate)
            silu = gate * sigmoid
            out = silu * up
            total += grad_row * out
            tl.store(inner + row * SIZE + i, out * row_weight, mask)
            grad_row *= row_weight
            # silu'(g) = sigmoid(g) + silu(g) (1 - sigmoid(g))
            tl.store(grad_gate_up + row * 2 * SIZE + i, grad_row * up * (sigmoid + silu * (1 - sigmoid)), mask)
            tl.store(grad_gate_up + (row * 2 + 1) * SIZE + i, grad_row * silu, mask)
        tl.store(grad_weight + row, tl.sum(total))


def swiglu_backward(gate_up_M2I: Tensor, weight_M: Tensor, grad_MI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `torchrecipes.modules.grouped_swiglu.swiglu_backward`, for contiguous tensors of at most fp32 on a GPU."""
    rows, size = grad_MI.shape
    inner_MI, grad_M2I = torch.empty_like(grad_MI), torch.empty_like(gate_up_M2I)
    grad_weight_M = torch.empty_like(weight_M)
    block = min(1024, triton.next_power_of_2(size))
    warps = max(1, min(4, block // 256))  # 8 elements per thread, 16 bytes in bf16
    with torch.cuda.device(grad_MI.device):
        _kernel[(rows,)](
            gate_up_M2I, weight_M, grad_MI, inner_MI, grad_M2I, grad_weight_M, SIZE=size, BLOCK=block, num_warps=warps
        )
    return inner_MI, grad_M2I, grad_weight_M
