"""Counts of a complete example corpus: duplicates, contradicting labels, lengths of texts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from torchrecipes.data.examples.shards import ExampleShard

PART = 1 << 23  # hashes that are sorted at once


def statistics(shards: Sequence[ExampleShard], columns: Sequence[str], max_length: int) -> dict[str, Any]:
    """Returns `duplicates`, `conflicts` and `lengths`, for `corpus.json`.

    Args:
        shards: all of them.
        columns: names of the texts of an example.
        max_length: tokens of a text at most.

    Returns:
        `duplicates`: examples whose texts an earlier one has; `conflicts`: those of them that have another class;
        `lengths`: of every column `[mean, median, 90 % quantile, longest]`, in tokens.
    """
    duplicates, conflicts = _duplicates(shards)
    width = max_length + 1
    histograms = np.zeros(len(columns) * width, np.int64)
    for shard in shards:
        column = np.minimum(shard.columns(), len(columns) - 1)
        histograms += np.bincount(column * width + np.diff(shard.text_offsets), minlength=len(histograms))
    lengths = {}
    for name, counts in zip(columns, histograms.reshape(-1, width), strict=True):
        if total := int(counts.sum()):
            cumulative = np.cumsum(counts)
            median, most = (int(cumulative.searchsorted(share * total)) for share in (0.5, 0.9))
            mean = float((counts * np.arange(width)).sum() / total)
            lengths[name] = [mean, median, most, int(np.flatnonzero(counts)[-1])]
    return {"duplicates": duplicates, "conflicts": conflicts, "lengths": lengths}


def _duplicates(shards: Sequence[ExampleShard]) -> tuple[int, int]:
    hashes = np.concatenate([_example_hashes(shard) for shard in shards])
    labels = None
    if shards[0].labels is not None and shards[0].labels.dtype == np.int64:
        labels = np.concatenate([shard.labels for shard in shards])
    parts = np.uint64(-(-len(hashes) // PART))
    duplicates = conflicts = 0
    for part in range(int(parts)):
        chosen = hashes % parts == part
        own = hashes[chosen]
        distinct, first = np.unique(own, return_inverse=True)
        duplicates += len(own) - len(distinct)
        if labels is not None:
            both = first * (int(labels.max()) + 1) + labels[chosen]
            conflicts += len(np.unique(both)) - len(distinct)
    return duplicates, conflicts


def _example_hashes(shard: ExampleShard) -> np.ndarray:
    """A hash of the texts of every example, uint64, in which their order counts."""
    # An odd factor per place, as in a polynomial hash; overflow is wanted.
    factors = shard.columns().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C14) + np.uint64(1)
    return np.add.reduceat(shard.text_hashes.view(np.uint64) * factors, shard.example_offsets[:-1])
