"""`FeatureCache`: a frozen encoder's outputs, computed once for every example."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from torchrecipes.data.batching.batch import Batch
from torchrecipes.data.batching.features import FeatureCollator, FeatureRows
from torchrecipes.evaluation.over_examples import map_examples
from torchrecipes.training.run import Run


class FeatureCache:
    """A collator whose batches hold what enters the head, in place of tokens: for a head on a frozen encoder.

        collator = FeatureCache(collator)
        collator.fill(model, [train, *eval_sets], run)  # when the model has its weights

    Frozen parts are in evaluation mode in training, too (`SequenceClassifier.train`): training is the same with and
    without the cache, but for rounding.

    Args:
        collator: makes batches of tokens.
    """

    def __init__(self, collator: Any):
        self.collator = collator
        self.sets: dict[str, FeatureRows] = {}  # by fingerprint

    def fill(self, model: nn.Module, sets: Sequence[Any], run: Run) -> None:
        """Computes the features of all examples; every rank computes a share, and all hold all.

        Args:
            model: has `features(batch)`, as `SequenceClassifier`.
            sets: `ExampleRows` for training and evaluation. Their features stay in memory: 4 bytes times the encoder's
                width for every example.
            run: the processes and the number format.

        Raises:
            UserError: the model has no features of a text (code `no_features`).
        """
        options = {"autocast": run.autocast, "name": "features of the frozen encoder"}
        for rows in sets:
            features = map_examples(model, model.features, rows, self.collator, **options)
            self.sets[rows.corpus.fingerprint] = FeatureRows(rows, features)
        size = sum(rows.features.nbytes for rows in self.sets.values()) / 2**20
        examples = sum(rows.num_rows for rows in self.sets.values())
        print(f"features of {examples:,} examples, computed once: {size:,.1f} MiB", flush=True)

    def batch(self, rows: Any, numbers: np.ndarray, keys: np.ndarray, step: int = 1) -> Batch:
        """The features and labels of some examples: see `FeatureCollator`; `rows` is one of the sets."""
        found = self.sets[rows.corpus.fingerprint]
        return FeatureCollator(found).batch(found, numbers, keys, step)
