"""Loss of every source of a mixture, from what the training step computes anyway."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchrecipes.losses.chunked_cross_entropy import IGNORED


def by_source(token_loss: Tensor, batch: Any) -> dict[str, Tensor]:
    """Sums of loss and targets for every source, for the dictionary that a recipe's `compute_loss` returns.

    `MetricLogger` divides each `loss/<name>` by its `targets/<name>`. All sources are in the result, also those without
    a row in this batch, so that ranks and micro-batches can be added up. Nothing waits for the device.

    Args:
        token_loss: `[B, S]` from `causal_lm_loss`, or `[M]` from `masked_lm_loss`, with `return_token_loss=True`.
        batch: the `Batch` that it was computed from.

    Returns:
        `loss/<name>` and `targets/<name>` of every source, scalars without gradient in the dtype of `token_loss`; empty
        where there is one source.
    """
    if batch.source_ids is None:
        return {}
    token_loss = token_loss.detach()
    if token_loss.ndim == 2:
        rows = batch.source_ids
        losses, targets = token_loss.sum(1), (batch.labels != IGNORED).sum(1)
    else:
        rows = batch.source_ids[batch.masked_positions // batch.input_ids.shape[1]]
        losses, targets = token_loss, batch.masked_labels != IGNORED
    # A product instead of index_add_, which on CUDA adds in an order that changes from run to run.
    sources = torch.arange(len(batch.source_names), device=rows.device)
    is_of_source = sources[:, None] == rows
    loss_sums = torch.where(is_of_source, losses, 0).sum(1)
    target_sums = torch.where(is_of_source, targets, 0).sum(1).to(token_loss.dtype)
    named = {f"loss/{name}": loss_sums[number] for number, name in enumerate(batch.source_names)}
    return named | {f"targets/{name}": target_sums[number] for number, name in enumerate(batch.source_names)}


def by_dataset(loss: Tensor, batches: Sequence[Any]) -> dict[str, Tensor]:
    """`by_source` for a step of examples that are all of one dataset (`DatasetBatches`).

    Args:
        loss: scalar, the sum over the examples of these batches.
        batches: this rank's batches of the step.

    Returns:
        `loss/<name>` and `targets/<name>` of every dataset, scalars without gradient in the dtype of `loss`, 0 where
        the step is of another dataset; empty where there is one dataset.
    """
    if batches[0].source_ids is None:
        return {}
    source_ids, names = torch.cat([batch.source_ids for batch in batches]), batches[0].source_names
    sources = torch.arange(len(names), device=source_ids.device)
    targets = (sources[:, None] == source_ids).sum(1).to(loss.dtype)
    losses = targets * (loss.detach() / max(1, len(source_ids)))
    named = {f"loss/{name}": losses[number] for number, name in enumerate(names)}
    return named | {f"targets/{name}": targets[number] for number, name in enumerate(names)}
