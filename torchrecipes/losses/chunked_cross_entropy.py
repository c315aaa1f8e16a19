"""Cross-entropy of a linear layer, computed in chunks so that the full logits never exist.

Names carry their shape: N rows, C rows of one chunk, R rows of one tile, V vocabulary, D hidden size, K columns of
one block of the vocabulary.

1. Rows are split into chunks. Loss and gradients of a chunk are computed together in the forward pass, and the gradient
   overwrites the logits, so the call needs one buffer of `[C, V]`.
2. The softmax of a chunk runs in fp32 without an fp32 copy of the chunk: on a CPU over tiles of a few rows, which stay
   in the cache; on CUDA in one compiled kernel (`fused_softmax`).
3. In bf16 the weight's gradient is accumulated in fp32: on a CPU one block of the vocabulary at a time, for the same
   reasons; on CUDA by the product itself.

Computing the gradient in the forward pass is the method of Liger Kernel (Hsu et al., 2024, arXiv:2410.10989).
"""

import warnings
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from torchrecipes.estimation import chunk_starts, is_estimating, kernel_device

IGNORED = -100  # the label of a row that has no target: torch's own default
MIB = 1 << 20
SCRATCH_BYTES = 2 * MIB  # fits into the second-level cache of a CPU


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    chunk_size: int | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    return_token_loss: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sum of `cross_entropy(hidden @ weight.T + bias, labels)` over the rows that have a label.

    Loss and gradients equal those of `F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction="sum")`. Logits
    exist for one chunk of rows at a time. Nothing waits for the GPU.

    On CUDA the first call compiles the softmax, whether the caller is compiled or not; another number of rows uses the
    same kernel. Where that fails (no Triton, no C compiler), a warning says so, and small tiles run instead. A compiled
    caller has a graph break here.

    Under `torch.autocast` matrix products use autocast's dtype, as in `F.linear` (fp64 stays fp64). Softmax, loss and
    the accumulated gradient of the weight are in fp32 at least, even for a bf16 weight.

    Args:
        hidden: `[N, D]` floating point. N may be 0.
        weight: `[V, D]`, dtype of `hidden` unless autocast is on.
        labels: `[N]` int64: the target of each row, or -100 to ignore the row. Any other number outside `[0, V)` is an
            IndexError or RuntimeError on a CPU, and a device-side assert on a GPU, because checking the values would
            make the host wait.
        bias: `[V]`, or None.
        chunk_size: rows whose logits are held at once. None chooses it by memory.
        z_loss: coefficient of `logsumexp(logits) ** 2`, added for every row with a target; it keeps logits from
            drifting (PaLM, Chowdhery et al., 2022, arXiv:2204.02311, section 5, uses 1e-4).
        label_smoothing: share of every target that is spread evenly over the vocabulary, as in
            `F.cross_entropy` (Szegedy et al., 2015, arXiv:1512.00567, section 7), in [0, 1].
        return_token_loss: also return the plain cross-entropy of every row, without `z_loss` and `label_smoothing`, at
            no cost. Log its sum: it is comparable across runs and with evaluation.

    Returns:
        The loss, a scalar, fp32 (fp64 for fp64 inputs). Without any target, loss and gradients are 0. With
        `return_token_loss` a pair of it and `[N]` of its dtype, which has no gradient and is 0 in rows without a label.

        Gradients are computed in the forward pass and kept until `backward`, which scales them in place. So `backward`
        can run once (`retain_graph=True` does not help, except in fp64), and there is no second derivative.

    Raises:
        ValueError: invalid shapes, dtypes, `chunk_size`, `z_loss` or `label_smoothing`.
        RuntimeError: raised by a second `backward`, or one with `create_graph=True`.
    """
    extra = _Extra(z_loss, label_smoothing)
    _check(hidden, weight, labels, bias, chunk_size, extra)
    dtype = _matmul_dtype(hidden, weight)
    if chunk_size is None:
        chunk_size = default_chunk_size(hidden.shape[0], weight.shape[0], dtype, hidden.device)
    function = _without_gradients
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias)):
        function = _LinearCrossEntropy.apply
    if torch.compiler.is_compiling() and kernel_device(hidden.device) == "cuda":
        from torchrecipes.losses.fused_softmax import outside_of_graph

        function = partial(outside_of_graph, function)
    loss, token_loss = function(hidden, weight, bias, labels, dtype, chunk_size, extra)
    return (loss, token_loss) if return_token_loss else loss


def default_chunk_size(num_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows per chunk, in chunks of about equal size.

    On CUDA logits of at most 512 MiB, and a multiple of 128 rows, so that all kernels load aligned blocks. Few chunks
    are faster: each reads and writes the weight's gradient in fp32. 16,384 rows of width 1,280 and 50,304 ids in bf16
    take 9.0 ms for three products at 700 TFLOP/s. At 2.6 TB/s add 1.9 ms for the softmax (the logits are read twice
    and written once), 0.7 ms for the sum of the weight's gradient over 4 chunks, and 0.4 ms for the weight's copy in
    bf16 and the scaling in `backward`: 12.0 ms with 0.4 GB of logits. 2 chunks would save 0.4 ms and 8 cost 0.8 ms.

    Otherwise at most 256 MiB, and on a CPU at most 512 rows or 1 MiB: a larger chunk saves nothing, because the softmax
    runs in smaller tiles and matrix products of so many rows are at full speed, while its buffer causes page faults in
    every call. With a small vocabulary all logits fit into the cache, and fewer chunks have less overhead.
    """
    row = vocab_size * dtype.itemsize
    multiple = 1
    if kernel_device(device) == "cuda":
        multiple = 128
        rows = max(multiple, 512 * MIB // row // multiple * multiple)
    elif kernel_device(device) == "cpu":
        rows = max(1, min(256 * MIB // row, max(512, MIB // row)))
    else:
        rows = max(1, 256 * MIB // row)
    num_chunks = max(1, -(-num_rows // rows))
    return max(1, -(-num_rows // (num_chunks * multiple))) * multiple


class _Extra(NamedTuple):
    """Terms that are added to the cross-entropy."""

    z_loss: float
    label_smoothing: float


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, dtype, chunk_size, extra):
        needs = ctx.needs_input_grad[:3]
        loss, token_loss, ctx.gradients = _loss_and_gradients(
            hidden, weight, bias, labels, dtype, chunk_size, extra, needs
        )
        ctx.mark_non_differentiable(token_loss)
        return loss, token_loss

    @staticmethod
    def backward(ctx, grad_loss, _):
        if torch.is_grad_enabled():  # create_graph=True: the stored gradients would be treated as constants
            raise RuntimeError("linear_cross_entropy: there is no second derivative. Use F.cross_entropy for it.")
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_cross_entropy: backward ran a second time on one graph, but the first one scaled the gradients "
                "in place and released them. Call linear_cross_entropy again for each backward."
            )
        gradients = ctx.gradients
        if grad_loss.dtype == torch.float64:  # for checks such as gradcheck, which run backward many times
            return *(None if g is None else g * grad_loss for g in gradients), None, None, None, None
        ctx.gradients = None
        return *(None if g is None else g.mul_(grad_loss) for g in gradients), None, None, None, None


def _without_gradients(*args):
    return _loss_and_gradients(*args, needs=(False, False, False))[:2]


def _loss_and_gradients(hidden, weight, bias, labels, dtype, chunk_size, extra, needs):
    """Loss, plain loss of every row, and the gradients for (hidden, weight, bias); None where `needs` is False."""
    device = hidden.device
    (num_rows, _), vocab_size = hidden.shape, weight.shape[0]
    softmax_dtype = torch.promote_types(dtype, torch.float32)
    has_target = labels != IGNORED
    # Ignored rows read column 0 with weight 0. Any other label reaches the index check.
    label_N1 = torch.where(has_target, labels, 0).unsqueeze(1)
    count_N1 = has_target.unsqueeze(1).to(softmax_dtype)

    needs_hidden, needs_weight, needs_bias = needs
    grad_hidden = torch.empty_like(hidden) if needs_hidden else None
    # Rounding the running sum to bf16 after every chunk would lose what later chunks add.
    grad_weight = torch.empty(weight.shape, dtype=softmax_dtype, device=device) if needs_weight else None
    grad_bias = torch.zeros(vocab_size, dtype=softmax_dtype, device=device) if needs_bias else None

    on_cuda = kernel_device(device) == "cuda"
    # Products of rows that do not start at a multiple of 16 bytes are slow on CUDA.
    stride = -(-vocab_size // 8) * 8 if on_cuda else vocab_size

    with torch.autocast(device.type, enabled=False):
        hidden_ND, weight_VD = hidden.to(dtype), weight.to(dtype)
        bias_V = None if bias is None else bias.to(softmax_dtype)
        logits_buffer = torch.empty(min(chunk_size, num_rows), stride, dtype=dtype, device=device)[:, :vocab_size]
        tile_buffer = None if on_cuda else _tile_buffer(logits_buffer)
        plain_N1 = torch.empty(num_rows, 1, dtype=softmax_dtype, device=device)
        extra_N1 = torch.empty_like(plain_N1) if any(extra) else None

        for start in chunk_starts(num_rows, chunk_size):
            chunk = slice(start, min(start + chunk_size, num_rows))
            logits_CV = logits_buffer[: chunk.stop - chunk.start]
            torch.mm(hidden_ND[chunk], weight_VD.t(), out=logits_CV)
            rows = (logits_CV, bias_V, label_N1[chunk], count_N1[chunk], any(needs), grad_bias, extra)
            plain_N1[chunk], extra_C1 = _fused_loss(*rows) if on_cuda else _tiled_loss(tile_buffer, *rows)
            if extra_N1 is not None:
                extra_N1[chunk] = extra_C1
            if needs_hidden:
                grad_hidden[chunk] = logits_CV @ weight_VD
            if needs_weight:
                _add_outer(grad_weight, logits_CV, hidden_ND[chunk], is_first=start == 0)
        if needs_weight and num_rows == 0:
            grad_weight.zero_()

    loss = plain_N1.sum()
    if extra_N1 is not None:
        loss = loss + extra_N1.sum()
    return (
        loss,
        plain_N1.squeeze(1),
        (
            grad_hidden,
            grad_weight.to(weight.dtype) if needs_weight else None,
            grad_bias.to(bias.dtype) if needs_bias else None,
        ),
    )


def _fused_loss(logits_CV, bias_V, label_C1, count_C1, needs_gradient, grad_bias, extra):
    """`_tiled_loss` in one kernel, for CUDA."""
    if is_estimating():  # the kernel makes nothing else
        return torch.empty_like(count_C1), torch.empty_like(count_C1)
    from torchrecipes.losses import fused_softmax  # compiles: importing it takes a second

    try:
        losses = fused_softmax.loss_and_gradient(logits_CV, bias_V, label_C1, count_C1, needs_gradient, *extra)
    except fused_softmax.Unavailable as error:
        warnings.warn(f"linear_cross_entropy: {error}; a slower path runs instead", stacklevel=2)
        rows = (logits_CV, bias_V, label_C1, count_C1, needs_gradient, grad_bias, extra)
        return _tiled_loss(_tile_buffer(logits_CV), *rows)
    if grad_bias is not None:
        grad_bias.add_(logits_CV.sum(dim=0, dtype=grad_bias.dtype))
    return losses


def _tiled_loss(buffer, logits_CV, bias_V, label_C1, count_C1, needs_gradient, grad_bias, extra):
    """The cross-entropies `[C, 1]` of a chunk, and what `extra` adds to them (None if it is off).

    With `needs_gradient`, the gradient of their sum overwrites `logits_CV`.
    """
    plain_C1 = torch.empty_like(count_C1)
    extra_C1 = torch.empty_like(count_C1) if any(extra) else None
    size = _rows_per_tile(logits_CV)
    for start in chunk_starts(len(logits_CV), size):
        tile = slice(start, start + size)
        plain_C1[tile], extra_R1 = _tile_loss(
            logits_CV[tile], buffer, bias_V, label_C1[tile], count_C1[tile], needs_gradient, grad_bias, extra
        )
        if extra_C1 is not None:
            extra_C1[tile] = extra_R1
    return plain_C1, extra_C1


def _tile_loss(logits_RV, buffer, bias_V, label_R1, count_R1, needs_gradient, grad_bias, extra):
    x_RV = logits_RV if buffer is None else buffer[: len(logits_RV)].copy_(logits_RV)
    if bias_V is not None:
        x_RV.add_(bias_V)
    largest_R1 = x_RV.amax(dim=1, keepdim=True)
    x_RV.sub_(largest_R1)
    at_label_R1 = x_RV.gather(1, label_R1)
    mean_R1 = x_RV.mean(dim=1, keepdim=True) if extra.label_smoothing else None
    x_RV.exp_()
    total_R1 = x_RV.sum(dim=1, keepdim=True)
    log_total_R1 = total_R1.log()
    logsumexp_R1 = log_total_R1 + largest_R1 if extra.z_loss else None
    if needs_gradient:
        # d loss / d logits = softmax - one_hot(label), and 0 in rows without a target.
        scale_R1 = count_R1 / total_R1
        if extra.z_loss:
            scale_R1 = scale_R1 * (1 + 2 * extra.z_loss * logsumexp_R1)
        x_RV.mul_(scale_R1)
        if extra.label_smoothing:
            x_RV.sub_(count_R1 * (extra.label_smoothing / x_RV.shape[1]))
        x_RV.scatter_add_(1, label_R1, (extra.label_smoothing - 1) * count_R1)
        if grad_bias is not None:
            grad_bias.add_(x_RV.sum(dim=0))
        if buffer is not None:
            logits_RV.copy_(x_RV)
    has_target_R1 = count_R1 > 0
    extra_R1 = None
    if any(extra):
        extra_R1 = torch.zeros_like(log_total_R1)
        if extra.z_loss:
            extra_R1 = extra_R1 + extra.z_loss * logsumexp_R1.square()
        if extra.label_smoothing:
            extra_R1 = extra_R1 + extra.label_smoothing * (at_label_R1 - mean_R1)
        extra_R1 = torch.where(has_target_R1, extra_R1, 0)
    return torch.where(has_target_R1, log_total_R1 - at_label_R1, 0), extra_R1


def _add_outer(sum_VD, grad_CV, hidden_CD, is_first):
    """Adds `grad_CV.T @ hidden_CD` to `sum_VD`; the first call overwrites it, which saves zeroing the memory."""
    beta = 0 if is_first else 1
    if sum_VD.dtype == grad_CV.dtype:
        sum_VD.addmm_(grad_CV.t(), hidden_CD, beta=beta)
        return
    if kernel_device(sum_VD.device) == "cuda":
        _add_half_product(sum_VD, grad_CV.t(), hidden_CD, beta)
        return
    # On a CPU a bf16 product cannot be added to an fp32 sum in one kernel. By blocks of the vocabulary it waits in the
    # cache.
    (vocab_size, size), dtype = sum_VD.shape, grad_CV.dtype
    block_size = max(8, SCRATCH_BYTES // (size * dtype.itemsize) // 8 * 8)
    buffer = torch.empty(min(block_size, vocab_size), size, dtype=dtype, device=sum_VD.device)
    for start in chunk_starts(vocab_size, block_size):
        sum_KD = sum_VD[start : start + block_size]
        product_KD = torch.mm(grad_CV[:, start : start + block_size].t(), hidden_CD, out=buffer[: len(sum_KD)])
        if is_first:
            sum_KD.copy_(product_KD)
        else:
            sum_KD.add_(product_KD)


def _add_half_product(sum_VD, grad_VC, hidden_CD, beta):
    """`sum_VD = beta * sum_VD + grad_VC @ hidden_CD` with an fp32 sum of half-precision factors: one kernel on CUDA."""
    if is_estimating():  # CPU tensors have no such kernel: a product of the same size, into memory that is there
        torch.mm(grad_VC, hidden_CD, out=sum_VD.view(grad_VC.dtype)[:, : sum_VD.shape[1]])
        return
    torch.addmm(sum_VD, grad_VC, hidden_CD, out_dtype=sum_VD.dtype, beta=beta, out=sum_VD)


def _tile_buffer(logits_CV):
    """Room for one tile in fp32, or None if the logits are."""
    dtype = torch.promote_types(logits_CV.dtype, torch.float32)
    if logits_CV.dtype == dtype:
        return None
    rows = min(_rows_per_tile(logits_CV), len(logits_CV))
    return torch.empty(rows, logits_CV.shape[1], dtype=dtype, device=logits_CV.device)


def _rows_per_tile(logits_CV):
    # On a CPU what fits its second-level caches; on a GPU enough to fill every multiprocessor and hide kernel launches.
    size = 2 * SCRATCH_BYTES if kernel_device(logits_CV.device) == "cpu" else 64 * MIB
    dtype = torch.promote_types(logits_CV.dtype, torch.float32)
    return max(1, size // (logits_CV.shape[1] * dtype.itemsize))


def _matmul_dtype(hidden, weight):
    """The dtype in which `F.linear` would multiply here."""
    kind = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"linear_cross_entropy: hidden is {hidden.dtype} and weight is {weight.dtype}. Use torch.autocast, or give "
            "both in one dtype."
        )
    return hidden.dtype


def _check(hidden, weight, labels, bias, chunk_size, extra):
    problems = []
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[-1]:
        problems.append(f"hidden [N, D] and weight [V, D] do not fit: {list(hidden.shape)} and {list(weight.shape)}")
    if labels.dtype != torch.int64 or labels.shape != hidden.shape[:1]:
        problems.append(f"labels must be int64 [{hidden.shape[0]}], not {labels.dtype} {list(labels.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        problems.append(f"bias must be [{weight.shape[0]}], not {list(bias.shape)}")
    if chunk_size is not None and chunk_size < 1:
        problems.append(f"chunk_size must be at least 1, not {chunk_size}")
    if not 0 <= extra.z_loss < float("inf"):
        problems.append(f"z_loss must be 0 or more, not {extra.z_loss}")
    if not 0 <= extra.label_smoothing <= 1:
        problems.append(f"label_smoothing must be in [0, 1], not {extra.label_smoothing}")
    if problems:
        raise ValueError("linear_cross_entropy: " + "; ".join(problems))
