"""`FeatureRows` and `FeatureCollator`: outputs of a frozen encoder in the place of texts."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, from_numpy

from torchrecipes.data.batching.batch import Batch
from torchrecipes.data.batching.example_rows import ExampleRows
from torchrecipes.data.batching.examples import Examples
from torchrecipes.data.batching.rows import RowBlock


class FeatureRows:
    """Examples whose texts an encoder has been through already, in the order of the examples themselves.

    They have the same `identity`: a run may be resumed with or without features.

    Args:
        rows: the examples. Their corpus gives the labels.
        features: `[E, ...]`, one for every example of the corpus, in its order.

    Raises:
        ValueError: there are more or fewer features than examples.
    """

    num_available, lookahead = math.inf, 0

    def __init__(self, rows: ExampleRows, features: Tensor):
        if len(features) != rows.num_rows:
            raise ValueError(f"there are {len(features)} features for {rows.num_rows} examples")
        self._rows, self.features, self.corpus = rows, features, rows.corpus
        self.seq_len, self.pad_id, self.source_names = rows.seq_len, rows.pad_id, rows.source_names
        self.num_rows, self.tokens_per_row = rows.num_rows, rows.tokens_per_row
        labels = rows.corpus.labels
        self.labels = None if labels is None else from_numpy(np.asarray(labels))

    def identity(self) -> dict[str, int | float | bool | str]:
        """What the examples and their order depend on."""
        return self._rows.identity()

    def check_trainable(self) -> None:
        """Raises UserError (code `too_little_text`) where there is no example."""
        self._rows.check_trainable()

    def locate(self, positions: np.ndarray, seed: int, shuffle: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Numbers and epochs of the examples at positions counted from a run's start (see `Rows`)."""
        return self._rows.locate(positions, seed, shuffle)

    def rows(self, numbers: np.ndarray) -> RowBlock:
        """Raises TypeError: the collator is one for text."""
        return self._rows.rows(numbers)

    def __str__(self) -> str:
        return f"{self._rows}; outputs of the frozen encoder, {list(self.features.shape[1:])} for each"


class FeatureCollator:
    """Batches of features, with labels.

    Args:
        rows: whose features have the shape of those in a batch of made-up ones.
    """

    def __init__(self, rows: FeatureRows):
        self._like = rows.features[:1], None if rows.labels is None else rows.labels[:1]

    def batch(self, rows: FeatureRows, numbers: np.ndarray, keys: np.ndarray, step: int = 1) -> Batch:  # noqa: ARG002
        """Reads features. Nothing is drawn.

        Args:
            rows: the examples.
            numbers: `[n]`, the examples' numbers; -1 is left out.
            keys: `[n]` uint64, not used.
            step: the optimizer step, not used.
        """
        index = from_numpy(numbers[numbers >= 0])
        return _batch(rows.features[index], None if rows.labels is None else rows.labels[index])

    def example_batch(self, num_rows: int, seq_len: int) -> Batch:  # noqa: ARG002
        """A batch of the features and the label of the first example, `num_rows` times."""
        features, labels = (x if x is None else x.expand(num_rows, *x.shape[1:]).clone() for x in self._like)
        return _batch(features, labels)


def _batch(features: Tensor, labels: Tensor | None) -> Batch:
    count = len(features)
    no_tokens: dict[str, Any] = {name: torch.zeros(1, 0, dtype=torch.int64) for name in ("input_ids", "position_ids")}
    no_documents = {"document_ids": None, "cu_seqlens": None, "max_seqlen": 0}
    examples = Examples(texts=torch.arange(count)[:, None], hashes=torch.arange(count), labels=labels)
    return Batch(num_targets=count, examples=examples, features=features, **no_tokens, **no_documents)
