"""Cross-entropy of a chunk of logits and its gradient in one compiled kernel, for CUDA.

The kernel reads every row twice (maximum and sum of exponentials, then gradient) and writes the gradient over the
logits; the second time the row is in the cache. Nothing of the size of the logits is allocated.

Names carry their shape: C rows of one chunk, V vocabulary.
"""

from collections.abc import Callable
from functools import cache
from types import FunctionType

import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

_failure: str | None = None  # why compiling failed once: it is not tried again


class Unavailable(Exception):
    """The kernel cannot be compiled here; the logits are as they were."""


def loss_and_gradient(
    logits_CV: Tensor,
    bias_V: Tensor | None,
    label_C1: Tensor,
    count_C1: Tensor,
    needs_gradient: bool,
    z_loss: float,
    label_smoothing: float,
) -> tuple[Tensor, Tensor | None]:
    """The cross-entropies of the rows of `logits_CV + bias_V`, and what z-loss and label smoothing add to them.

    Args:
        logits_CV: `[C, V]`; with `needs_gradient` the gradient of the sum of all losses overwrites it.
        bias_V: `[V]` or None, in fp32 (fp64 for fp64 logits).
        label_C1: `[C, 1]` int64, in `[0, V)`.
        count_C1: `[C, 1]`, 1 in rows with a target and 0 in others, dtype of the bias.
        needs_gradient: False leaves the logits as they are.
        z_loss, label_smoothing: see `linear_cross_entropy`.

    Returns:
        Two tensors `[C, 1]` in the dtype of `count_C1`; the second is None if both extra terms are 0.

    Raises:
        Unavailable: compiling failed, for instance without Triton or a C compiler.
    """
    global _failure
    if _failure is not None:
        raise Unavailable(_failure)
    # Outside of the kernel: an index beyond the vocabulary is an error of `gather`, and no read of the logits can come
    # after they are overwritten.
    at_label_C1 = logits_CV.gather(1, label_C1)
    if bias_V is not None:
        at_label_C1 = at_label_C1 + bias_V[label_C1]
    for tensor in (logits_CV, at_label_C1, label_C1, count_C1):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)  # one kernel for any number of rows
    settings = (needs_gradient, z_loss, label_smoothing)
    kernel = _kernel(logits_CV.shape[1], logits_CV.dtype, bias_V is None, *settings)
    try:
        return kernel(logits_CV, bias_V, at_label_C1, label_C1, count_C1, *settings)
    except (TorchDynamoException, FailOnRecompileLimitHit) as error:
        _failure = f"torch.compile failed ({' '.join(str(error).split()[:40])})"
        raise Unavailable(_failure) from error


def _softmax(logits_CV, bias_V, at_label_C1, label_C1, count_C1, needs_gradient, z_loss, label_smoothing):
    vocab_size = logits_CV.shape[1]
    x_CV = logits_CV.to(count_C1.dtype)
    if bias_V is not None:
        x_CV = x_CV + bias_V
    largest_C1 = x_CV.amax(dim=1, keepdim=True)
    total_C1 = (x_CV - largest_C1).exp().sum(dim=1, keepdim=True)
    log_total_C1 = total_C1.log()
    logsumexp_C1 = log_total_C1 + largest_C1
    has_target_C1 = count_C1 > 0
    plain_C1 = torch.where(has_target_C1, log_total_C1 - (at_label_C1 - largest_C1), 0)
    extra_C1 = None
    if z_loss or label_smoothing:
        extra_C1 = z_loss * logsumexp_C1.square()
        if label_smoothing:
            extra_C1 = extra_C1 + label_smoothing * (at_label_C1 - x_CV.mean(dim=1, keepdim=True))
        extra_C1 = torch.where(has_target_C1, extra_C1, 0)
    if needs_gradient:
        # d loss / d logits = softmax - one_hot(label), and 0 in rows without a target.
        scale_C1 = count_C1 / total_C1
        if z_loss:
            scale_C1 = scale_C1 * (1 + 2 * z_loss * logsumexp_C1)
        grad_CV = (x_CV - largest_C1).exp() * scale_C1
        if label_smoothing:
            grad_CV = grad_CV - count_C1 * (label_smoothing / vocab_size)
        is_label_CV = torch.arange(vocab_size, device=x_CV.device) == label_C1
        logits_CV.copy_(grad_CV - torch.where(is_label_CV, (1 - label_smoothing) * count_C1, 0))
    return plain_C1, extra_C1


@cache
def _kernel(*_: object) -> Callable:
    """A compiled copy of `_softmax` for each combination of what it is specialized for.

    With one function for all of them, a process that sees many would reach the limit of recompilations, which is one
    per code object.
    """
    copy = FunctionType(_softmax.__code__.replace(), globals(), _softmax.__name__)
    # Splitting the reduction of few, long rows would need a second kernel.
    return torch.compile(copy, fullgraph=True, dynamic=False, options={"split_reductions": False})


@torch.compiler.disable(reason="linear_cross_entropy compiles its own kernel")
def outside_of_graph(function, *args):
    """Calls a function from a compiled caller without tracing it."""
    return function(*args)
