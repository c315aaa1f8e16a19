"""Cross-entropy of a linear layer's outputs, computed chunk by chunk so that the full logits never exist.

Names carry their shape: N rows, C rows of one chunk, R rows of one tile, V vocabulary, D hidden size, K columns of
one block of the vocabulary.

How memory and time are kept low:

1. The rows are cut into chunks. Loss and gradients of a chunk are computed together in the forward pass and its logits
   are overwritten by their own gradient, so one buffer of `[C, V]` serves the whole call.
2. The softmax of a chunk runs over tiles of a few rows in fp32: on a CPU they stay in the cache, and in bf16 no fp32
   copy of a whole chunk is needed.
3. In bf16 the weight's gradient is added up in fp32, one block of the vocabulary at a time, for the same two reasons.

Computing the gradient in the forward pass is the method of Liger Kernel (Hsu et al., 2024, arXiv:2410.10989).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from torchrecipes.estimation import chunk_starts, kernel_device

IGNORED = -100  # the label of a row that has no target: torch's own default
MIB = 1 << 20


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    chunk_size: int | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    return_cross_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The sum of `cross_entropy(hidden @ weight.T + bias, labels)` over the rows that have a label.

    Gives the number and the gradients of `F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction="sum")`,
    while holding the logits of one chunk of rows only. Nothing in it waits for the GPU.

    Under `torch.autocast` the matrix products are in autocast's dtype, as for `F.linear` (fp64 stays as it is). Softmax
    and loss are in fp32 at least, and so is the sum of the weight's gradient over the chunks, even for a bf16 weight.

    Args:
        hidden: `[N, D]` floating point. N may be 0.
        weight: `[V, D]`, dtype of `hidden` unless autocast is on.
        labels: `[N]` int64: the target of each row, or -100 for a row that counts nothing. Another number outside
            `[0, V)` is an IndexError or RuntimeError on a CPU; on a GPU it is a device-side assert, as for any
            indexing kernel, because looking at the values here would make the host wait.
        bias: `[V]`, or None.
        chunk_size: rows whose logits are held at once. None chooses it by the memory that they take.
        z_loss: coefficient of `logsumexp(logits) ** 2`, added in every row that counts; it keeps logits from drifting
            away (PaLM, Chowdhery et al., 2022, arXiv:2204.02311, section 5, takes 1e-4).
        label_smoothing: the share of every target that is spread evenly over the vocabulary, as in
            `F.cross_entropy` (Szegedy et al., 2015, arXiv:1512.00567, section 7), in [0, 1].
        return_cross_entropy: also return the plain cross-entropy, without `z_loss` and `label_smoothing`, at no cost:
            the number to log, which compares with other runs and with evaluation.

    Returns:
        The loss to train on: a scalar, fp32 (fp64 for fp64 inputs). With no row to count it is 0, with gradients that
        are 0. With `return_cross_entropy` a pair of it and the plain sum of cross-entropies, which has no gradient.

        The gradients are ready when this returns and take their memory until `backward`, which scales them in place:
        a graph can be run backward once (`retain_graph=True` does not help, except in fp64), and there is no second
        derivative.

    Raises:
        ValueError: shapes, dtypes, `chunk_size`, `z_loss` or `label_smoothing` do not fit.
        RuntimeError: from `backward`, when it is run a second time or with `create_graph=True`.
    """
    extra = _Extra(z_loss, label_smoothing)
    _check(hidden, weight, labels, bias, chunk_size, extra)
    dtype = _matmul_dtype(hidden, weight)
    if chunk_size is None:
        chunk_size = default_chunk_size(hidden.shape[0], weight.shape[0], dtype, hidden.device)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias)):
        loss, plain = _LinearCrossEntropy.apply(hidden, weight, bias, labels, dtype, chunk_size, extra)
    else:
        needs = (False, False, False)
        loss, plain, _ = _loss_and_gradients(hidden, weight, bias, labels, dtype, chunk_size, extra, needs)
    return (loss, plain) if return_cross_entropy else loss


def default_chunk_size(num_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows per chunk: logits of at most 256 MiB, in chunks of equal size.

    On a CPU also at most 512 rows, or 1 MiB of logits: a larger chunk saves nothing there, because the softmax runs in
    smaller tiles and a matrix product of so many rows is as fast as it gets, while its buffer costs page faults in
    every call. Logits of a few characters fit the cache whole, and the fewer chunks, the less it costs to start them.
    """
    rows = max(1, 256 * MIB // (vocab_size * dtype.itemsize))
    if kernel_device(device) == "cpu":
        rows = min(rows, max(512, MIB // (vocab_size * dtype.itemsize)))
    num_chunks = max(1, -(-num_rows // rows))
    return max(1, -(-num_rows // num_chunks))


class _Extra(NamedTuple):
    """What is trained on beside the cross-entropy."""

    z_loss: float
    label_smoothing: float


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, dtype, chunk_size, extra):
        needs = ctx.needs_input_grad[:3]
        loss, plain, ctx.gradients = _loss_and_gradients(hidden, weight, bias, labels, dtype, chunk_size, extra, needs)
        ctx.mark_non_differentiable(plain)
        return loss, plain

    @staticmethod
    def backward(ctx, grad_loss, _):
        if torch.is_grad_enabled():  # that is create_graph=True: the stored gradients would pass for constants
            raise RuntimeError("linear_cross_entropy: there is no second derivative. Use F.cross_entropy for it.")
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_cross_entropy: backward ran a second time on one graph, but the first run scaled the gradients "
                "in place and gave them away. Call linear_cross_entropy again for each backward."
            )
        gradients = ctx.gradients
        if grad_loss.dtype == torch.float64:  # for checks such as gradcheck, which run backward many times
            return *(None if g is None else g * grad_loss for g in gradients), None, None, None, None
        ctx.gradients = None
        return *(None if g is None else g.mul_(grad_loss) for g in gradients), None, None, None, None


def _loss_and_gradients(hidden, weight, bias, labels, dtype, chunk_size, extra, needs):
    """Loss, plain loss, and the loss' gradients for (hidden, weight, bias), None where `needs` says not asked for."""
    device = hidden.device
    (num_rows, _), vocab_size = hidden.shape, weight.shape[0]
    softmax_dtype = torch.promote_types(dtype, torch.float32)
    has_target = labels != IGNORED
    # Ignored rows look up column 0, and what they find counts zero times. Any other label reaches the index check.
    label_N1 = torch.where(has_target, labels, 0).unsqueeze(1)
    count_N1 = has_target.unsqueeze(1).to(softmax_dtype)

    needs_hidden, needs_weight, needs_bias = needs
    grad_hidden = torch.empty_like(hidden) if needs_hidden else None
    # Rounding the running sum to bf16 after every chunk would lose what later chunks add.
    sum_dtype = torch.promote_types(weight.dtype, torch.float32)
    grad_weight = torch.empty(weight.shape, dtype=sum_dtype, device=device) if needs_weight else None
    grad_bias = torch.zeros(vocab_size, dtype=softmax_dtype, device=device) if needs_bias else None

    with torch.autocast(device.type, enabled=False):
        hidden_ND, weight_VD = hidden.to(dtype), weight.to(dtype)
        bias_V = None if bias is None else bias.to(softmax_dtype)
        rows_per_tile = _rows_per_tile(vocab_size, softmax_dtype, device)
        logits_buffer = torch.empty(min(chunk_size, num_rows), vocab_size, dtype=dtype, device=device)
        tile_buffer = None
        if dtype != softmax_dtype:
            rows = min(rows_per_tile, chunk_size, num_rows)
            tile_buffer = torch.empty(rows, vocab_size, dtype=softmax_dtype, device=device)
        plain_N1 = torch.empty(num_rows, 1, dtype=softmax_dtype, device=device)
        extra_N1 = torch.empty_like(plain_N1) if any(extra) else None

        for start in chunk_starts(num_rows, chunk_size):
            chunk = slice(start, min(start + chunk_size, num_rows))
            logits_CV = logits_buffer[: chunk.stop - chunk.start]
            torch.mm(hidden_ND[chunk], weight_VD.t(), out=logits_CV)
            for first in (start + offset for offset in chunk_starts(chunk.stop - start, rows_per_tile)):
                tile = slice(first, min(first + rows_per_tile, chunk.stop))
                plain_N1[tile], extra_R1 = _tile_loss(
                    logits_CV[tile.start - start : tile.stop - start],
                    tile_buffer,
                    bias_V,
                    label_N1[tile],
                    count_N1[tile],
                    any(needs),
                    grad_bias,
                    extra,
                )
                if extra_N1 is not None:
                    extra_N1[tile] = extra_R1
            if needs_hidden:
                grad_hidden[chunk] = logits_CV @ weight_VD
            if needs_weight:
                _add_outer(grad_weight, logits_CV, hidden_ND[chunk], is_first=start == 0)
        if needs_weight and num_rows == 0:
            grad_weight.zero_()

    plain = plain_N1.sum()
    loss = plain.clone() if extra_N1 is None else plain + extra_N1.sum()
    return (
        loss,
        plain,
        (
            grad_hidden,
            grad_weight.to(weight.dtype) if needs_weight else None,
            grad_bias.to(bias.dtype) if needs_bias else None,
        ),
    )


def _tile_loss(logits_RV, buffer, bias_V, label_R1, count_R1, needs_gradient, grad_bias, extra):
    """The cross-entropies `[R, 1]` of a few rows, and what `extra` adds to them, None where it is off.

    Where `needs_gradient`, `logits_RV` is overwritten by the gradient of both together.
    """
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
    """Adds `grad_CV.T @ hidden_CD` to `sum_VD`; the first time it overwrites, which saves clearing the memory."""
    if sum_VD.dtype == grad_CV.dtype:
        sum_VD.addmm_(grad_CV.t(), hidden_CD, beta=0 if is_first else 1)
        return
    # A bf16 product cannot be added to an fp32 sum in one kernel. By blocks of the vocabulary it waits in the cache.
    (vocab_size, size), dtype = sum_VD.shape, grad_CV.dtype
    block_size = max(1, _scratch_bytes(sum_VD.device) // (size * dtype.itemsize))
    buffer = torch.empty(min(block_size, vocab_size), size, dtype=dtype, device=sum_VD.device)
    for start in chunk_starts(vocab_size, block_size):
        sum_KD = sum_VD[start : start + block_size]
        product_KD = torch.mm(grad_CV[:, start : start + block_size].t(), hidden_CD, out=buffer[: len(sum_KD)])
        if is_first:
            sum_KD.copy_(product_KD)
        else:
            sum_KD.add_(product_KD)


def _rows_per_tile(vocab_size, dtype, device):
    return max(1, 2 * _scratch_bytes(device) // (vocab_size * dtype.itemsize))


def _scratch_bytes(device):
    # On a CPU what fits its second-level caches; on a GPU enough to fill every multiprocessor and hide kernel launches.
    return 2 * MIB if kernel_device(device) == "cpu" else 32 * MIB


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
