"""The quality of a masked language model, beside a baseline of token frequencies."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from torchrecipes.evaluation.position_loss import add_sums, loss_by_position, means_by_position
from torchrecipes.evaluation.running import evaluation_mode, means_over_ranks
from torchrecipes.losses import linear_cross_entropy

if TYPE_CHECKING:
    from torchrecipes.data.corpus.corpus import Corpus

CHUNK_SIZE = 2048  # masked positions whose logits are held at a time


@dataclass(frozen=True)
class UnigramBaseline:
    """The best prediction without context: the frequency of each token.

    Attributes:
        log_probability: `[V]` fp32, the natural logarithm of each token's share; -inf where it never occurs.
        most_frequent: the token that a constant prediction would choose.
    """

    log_probability: torch.Tensor
    most_frequent: int


def unigram_baseline(corpus: "Corpus", special_ids: Iterable[int], vocab_size: int) -> UnigramBaseline:
    """Counts the tokens of a corpus (a `torchrecipes.data.corpus.Corpus`) that are not special.

    A model whose loss is not below this baseline's has learned nothing but token frequencies.
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
    position_edges: Sequence[int] = (),
) -> dict[str, float]:
    """Evaluates a masked language model on `batches`, without touching any random generator.

    Args:
        model: gives `[B, S, D]` hidden states and has a `head`; its modules' training modes are restored afterwards.
        batches: `Batch` objects with masks, on the model's device; in a process group this rank's share.
        unpadded_vocab_size: ids from here on are padding of the vocabulary and are never predicted.
        baseline: of the same split.
        autocast: makes the context to compute in.
        position_edges: of ranges of positions whose losses are computed, too: see `loss_by_position`.

    Returns:
        `loss` (nats per masked token), `perplexity`, `accuracy` (share of masked tokens that are the model's first
        choice), and `unigram_loss`, `unigram_accuracy`: the same for the baseline; with `position_edges` `loss/0-511`,
        ... for the ranges that have a target. The same on all ranks; NaN where no token is masked.
    """
    device = next(model.parameters()).device
    log_probability = baseline.log_probability.to(device)
    # In fp64: a sum over millions of tokens must not depend on how they are spread over batches and ranks.
    zeros = torch.zeros(5, dtype=torch.float64, device=device)
    loss, correct, unigram_loss, unigram_correct, targets = zeros
    transform = getattr(model.head, "transform", nn.Identity())  # an nn.Linear has none
    by_position: dict[str, torch.Tensor] = {}
    with evaluation_mode(model):
        for batch in batches:
            with autocast():
                hidden = model(batch.input_ids, **batch.documents)
                rows = hidden.flatten(0, 1).index_select(0, batch.masked_positions)
                token_losses = []
                for row, label in zip(rows.split(CHUNK_SIZE), batch.masked_labels.split(CHUNK_SIZE), strict=True):
                    row = transform(row)
                    found, token_loss = linear_cross_entropy(
                        row, model.head.weight, label, model.head.bias, return_token_loss=True
                    )
                    loss += found
                    token_losses.append(token_loss)
                    logits = F.linear(row, model.head.weight, model.head.bias)
                    correct += (logits[:, :unpadded_vocab_size].argmax(-1) == label).sum()
            labels = batch.masked_labels
            if position_edges:
                positions = batch.position_ids.flatten()[batch.masked_positions]
                add_sums(by_position, loss_by_position(torch.cat(token_losses), positions, position_edges, labels))
            unigram_loss -= torch.where(labels >= 0, log_probability[labels.clamp(min=0)], 0).sum(dtype=torch.float64)
            unigram_correct += (labels == baseline.most_frequent).sum()
            targets += batch.num_targets
    sums = {"loss": loss, "accuracy": correct, "unigram_loss": unigram_loss, "unigram_accuracy": unigram_correct}
    return means_over_ranks(sums, targets) | means_by_position(by_position)
