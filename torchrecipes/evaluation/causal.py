"""Evaluation of causal language models: loss, perplexity and accuracy, beside a unigram baseline."""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import nn

from torchrecipes.evaluation.mlm import UnigramBaseline
from torchrecipes.losses.chunked_cross_entropy import default_chunk_size


@torch.no_grad()
def evaluate_causal(
    model: nn.Module,
    batches: Iterable,
    unpadded_vocab_size: int,
    baseline: UnigramBaseline,
    autocast: Callable[[], AbstractContextManager],
) -> dict[str, float]:
    """Evaluates `model` on `batches` in evaluation mode. No random generator is used.

    The loss is the plain cross-entropy, whatever is added to it in training.

    Args:
        model: returns hidden states `[B, S, D]` and has a `head`; its training mode is restored afterwards.
        batches: `Batch` objects with `labels`, on the model's device; in a process group each rank's share.
        unpadded_vocab_size: ids from here on are padding of the vocabulary and are never predicted.
        baseline: the unigram baseline of the same split. A label that it never saw (a document's end that is
            not stored in the corpus) counts as its rarest token.
        autocast: returns the context to compute in.

    Returns:
        `loss` (nats per token), `perplexity`, `accuracy` (share of tokens that the model's first guess gets right) and
        `unigram_loss`: the loss of the baseline on the same tokens. The same on all ranks.
    """
    device = next(model.parameters()).device
    log_probability = baseline.log_probability.to(device)
    log_probability = log_probability.clamp(min=log_probability[log_probability.isfinite()].min())
    # In fp64: a sum over millions of tokens must not depend on how they are spread over batches and ranks.
    loss, correct, unigram_loss, targets = sums = torch.zeros(4, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    for batch in batches:
        labels = batch.labels.flatten()
        with autocast():
            hidden = model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen).flatten(0, 1)
            rows_at_once = default_chunk_size(len(hidden), len(log_probability), torch.float32, device)
            for row, label in zip(hidden.split(rows_at_once), labels.split(rows_at_once), strict=True):
                logits = model.head(row)
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                loss += F.cross_entropy(logits, label, reduction="sum")
                correct += (logits[:, :unpadded_vocab_size].argmax(-1) == label).sum()
        unigram_loss -= torch.where(labels >= 0, log_probability[labels.clamp(min=0)], 0).sum(dtype=torch.float64)
        targets += batch.num_targets
    model.train(was_training)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    loss, correct, unigram_loss, targets = sums.tolist()
    return {
        "loss": loss / targets,
        "perplexity": math.exp(min(loss / targets, 700)),
        "accuracy": correct / targets,
        "unigram_loss": unigram_loss / targets,
    }
