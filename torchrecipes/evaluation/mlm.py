"""Evaluation of masked language models: loss, perplexity and accuracy, beside a unigram baseline."""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from torchrecipes.losses import linear_cross_entropy

ROWS_AT_ONCE = 2048  # masked positions whose logits are held at a time


@dataclass(frozen=True)
class UnigramBaseline:
    """The best prediction without context: the frequency of each token.

    Attributes:
        log_probability: `[V]` fp32, the natural logarithm of each token's share; -inf where it never occurs.
        most_frequent: the most frequent token.
    """

    log_probability: torch.Tensor
    most_frequent: int


def unigram_baseline(corpus, special_ids: Iterable[int], vocab_size: int) -> UnigramBaseline:
    """Counts the tokens of a corpus that are not special.

    A model whose loss is not below that of this baseline has learned nothing but token frequencies.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    chunk = 1 << 24
    for start in range(0, corpus.num_tokens, chunk):
        tokens = corpus.read(start, min(start + chunk, corpus.num_tokens))
        counts += np.bincount(tokens, minlength=vocab_size)
    counts[list(special_ids)] = 0
    share = torch.from_numpy(counts / max(1, counts.sum()))
    return UnigramBaseline(share.log().float(), int(counts.argmax()))


@torch.no_grad()
def evaluate_mlm(
    model: nn.Module,
    batches: Iterable,
    unpadded_vocab_size: int,
    baseline: UnigramBaseline,
    autocast: Callable[[], AbstractContextManager],
) -> dict[str, float]:
    """Evaluates `model` on `batches` in evaluation mode. No random generator is used.

    Args:
        model: returns hidden states `[B, S, D]` and has a `head`; its training mode is restored afterwards.
        batches: `Batch` objects with masks, on the model's device; in a process group each rank's share.
        unpadded_vocab_size: ids from here on are vocabulary padding and are never predicted.
        baseline: the unigram baseline of the same split.
        autocast: returns the context to compute in.

    Returns:
        `loss` (nats per masked token), `perplexity`, `accuracy` (share of masked tokens that the model's first guess
        gets right), and `unigram_loss`, `unigram_accuracy`: the same for the baseline on the same masked tokens.
    """
    device = next(model.parameters()).device
    log_probability = baseline.log_probability.to(device)
    loss, correct, unigram_loss, unigram_correct, targets = (torch.zeros((), device=device) for _ in range(5))
    was_training = model.training
    model.eval()
    for batch in batches:
        with autocast():
            hidden = model(
                batch.input_ids,
                position_ids=batch.position_ids,
                cu_seqlens=batch.cu_seqlens,
                max_seqlen=batch.max_seqlen,
            )
            rows = hidden.flatten(0, 1).index_select(0, batch.masked_positions)
            for row, label in zip(rows.split(ROWS_AT_ONCE), batch.masked_labels.split(ROWS_AT_ONCE), strict=True):
                row = model.head.transform(row)
                loss += linear_cross_entropy(row, model.head.weight, label, model.head.bias)
                logits = nn.functional.linear(row, model.head.weight, model.head.bias)
                correct += (logits[:, :unpadded_vocab_size].argmax(-1) == label).sum()
        real = batch.masked_labels >= 0
        unigram_loss -= torch.where(real, log_probability[batch.masked_labels.clamp(min=0)], 0).sum()
        unigram_correct += (batch.masked_labels == baseline.most_frequent).sum()
        targets += batch.num_targets
    model.train(was_training)
    sums = torch.stack([loss, correct, unigram_loss, unigram_correct, targets])
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    loss, correct, unigram_loss, unigram_correct, targets = sums.tolist()
    return {
        "loss": loss / targets,
        "perplexity": math.exp(min(loss / targets, 700)),
        "accuracy": correct / targets,
        "unigram_loss": unigram_loss / targets,
        "unigram_accuracy": unigram_correct / targets,
    }
