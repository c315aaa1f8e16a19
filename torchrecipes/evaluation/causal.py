"""The quality of a causal language model's next-token predictions, beside a baseline of token frequencies."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchrecipes.devices import float64_device, to_float64
from torchrecipes.evaluation.mlm import UnigramBaseline
from torchrecipes.evaluation.position_loss import add_sums, loss_by_position, means_by_position
from torchrecipes.evaluation.running import evaluation_mode, means_over_ranks
from torchrecipes.losses.chunked_cross_entropy import default_chunk_size


@torch.no_grad()
def evaluate_causal(
    model: nn.Module,
    batches: Iterable,
    unpadded_vocab_size: int,
    baseline: UnigramBaseline,
    autocast: Callable[[], AbstractContextManager],
    position_edges: Sequence[int] = (),
) -> dict[str, float]:
    """Evaluates a causal language model on `batches`, without touching any random generator.

    The loss is the plain cross-entropy, whatever is added to it in training.

    Args:
        model: gives `[B, S, D]` hidden states and has a `head`; its modules' training modes are restored afterwards.
        batches: `Batch` objects with `labels`, on the model's device; in a process group this rank's share.
        unpadded_vocab_size: ids from here on are padding of the vocabulary and are never predicted.
        baseline: of the same split. A label that is not in it (the end of a document, which the corpus does not store)
            counts as its rarest token.
        autocast: makes the context to compute in.
        position_edges: of ranges of positions whose losses are computed, too: see `loss_by_position`.

    Returns:
        `loss` (nats per token), `perplexity`, `accuracy` (share of tokens that are the model's first choice) and
        `unigram_loss`, the baseline's, and with `position_edges` `loss/0-511`, ... for the ranges that have a target.
        The same on all ranks; NaN where there is no target.
    """
    device = next(model.parameters()).device
    log_probability = baseline.log_probability.to(device)
    if (finite := log_probability[log_probability.isfinite()]).numel():
        log_probability = log_probability.clamp(min=finite.min())
    # In fp64: a sum over millions of tokens must not depend on how they are spread over batches and ranks.
    loss, correct, unigram_loss, targets = torch.zeros(4, dtype=torch.float64, device=float64_device(device))
    by_position: dict[str, Tensor] = {}
    with evaluation_mode(model):
        for batch in batches:
            labels = batch.labels.flatten()
            with autocast():
                hidden = model(batch.input_ids, **batch.documents).flatten(0, 1)
                chunk_size = default_chunk_size(len(hidden), len(log_probability), torch.float32, device)
                token_losses = []
                for row, label in zip(hidden.split(chunk_size), labels.split(chunk_size), strict=True):
                    logits = model.head(row)
                    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                    token_losses.append(F.cross_entropy(logits, label, reduction="none"))
                    correct += to_float64((logits[:, :unpadded_vocab_size].argmax(-1) == label).sum())
            token_loss = torch.cat(token_losses)
            loss += to_float64(token_loss).sum()
            if position_edges:
                add_sums(
                    by_position, loss_by_position(token_loss, batch.position_ids.flatten(), position_edges, labels)
                )
            unigram_loss -= to_float64(torch.where(labels >= 0, log_probability[labels.clamp(min=0)], 0)).sum()
            targets += batch.num_targets
    means = means_over_ranks({"loss": loss, "accuracy": correct, "unigram_loss": unigram_loss}, targets)
    return means | means_by_position(by_position)
