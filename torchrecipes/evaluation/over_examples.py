"""`map_examples`, `predict_examples`: what a model computes for every example of a set, in the order of the set."""

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from torchrecipes.distributed.collectives import all_reduce_sum_, rank, world_size
from torchrecipes.errors import UserError
from torchrecipes.evaluation.running import evaluation_mode

if TYPE_CHECKING:
    from torchrecipes.data.batching.batch import Batch
    from torchrecipes.data.batching.example_rows import ExampleRows

TOKENS_PER_BATCH = 8192


@torch.no_grad()
def map_examples(
    model: nn.Module,
    function: Callable[["Batch"], Tensor],
    rows: "ExampleRows",
    collator: Any,
    *,
    autocast: Callable[[], AbstractContextManager],
    tokens_per_batch: int = TOKENS_PER_BATCH,
    name: str = "",
) -> Tensor:
    """Computes `function(batch)` over all examples, in evaluation mode, without touching any random generator.

    Examples of similar length share a batch. The batches are the same on any number of ranks, which share them, so the
    results are, too.

    Args:
        model: its modules' training modes are restored afterwards.
        function: gives `[n, ...]` for the n examples of a batch, such as `model.classify`.
        rows: the examples.
        collator: makes their batches.
        autocast: makes the context to compute in.
        tokens_per_batch: about as many tokens are in a batch.
        name: of the set, for a bar on a terminal; "": none.

    Returns:
        `[E, ...]` float32, in the order of the set, on the CPU of every rank.

    Raises:
        UserError: the set is empty (code `no_examples`).
    """
    if not rows.num_rows:
        raise UserError(f"the set {name} has no examples", code="no_examples")
    device = next(model.parameters()).device
    batches = _by_length(rows.lengths(np.arange(rows.num_rows)), tokens_per_batch)
    shares = -(-len(batches) // world_size())
    mine = [batches[i] if i < len(batches) else None for i in range(rank(), shares * world_size(), world_size())]
    results: Tensor | None = None
    bar = tqdm(total=rows.num_rows, desc=name, leave=False, disable=not (name and rank() == 0 and sys.stderr.isatty()))
    with evaluation_mode(model), bar:
        for numbers in mine:
            # A sharded model needs every rank in each forward pass: one without a batch computes the first again.
            is_extra, numbers = numbers is None, batches[0] if numbers is None else numbers
            batch = collator.batch(rows, numbers, np.zeros(len(numbers), dtype=np.uint64))
            with autocast():
                result = function(batch.to(device)).float().cpu()
            if results is None:
                results = torch.zeros(rows.num_rows, *result.shape[1:])
            if not is_extra:
                results[numbers] = result
                bar.update(len(numbers))
    return all_reduce_sum_(results)  # every example is that of one rank, and the others add zeros


def predict_examples(
    model: nn.Module,
    sets: Mapping[str, "ExampleRows"],
    collator: Any,
    autocast: Callable[[], AbstractContextManager],
) -> dict[str, tuple[Tensor, np.ndarray]]:
    """Logits and labels of every example of some sets, by the name of the set: see `map_examples`.

    Args:
        model: has `classify(batch)`, as `SequenceClassifier`.
        sets: by name, with labels.
        collator: makes their batches.
        autocast: makes the context to compute in.
    """
    return {
        name: (map_examples(model, model.classify, rows, collator, autocast=autocast, name=name), rows.corpus.labels)
        for name, rows in sets.items()
    }


def _by_length(lengths: np.ndarray, tokens: int) -> list[np.ndarray]:
    """The numbers of examples, from the shortest to the longest, in batches of about as many tokens."""
    order = np.argsort(lengths, kind="stable")
    starts = np.cumsum(lengths[order]) - lengths[order]
    return np.split(order, np.flatnonzero(np.diff(starts // tokens)) + 1)
