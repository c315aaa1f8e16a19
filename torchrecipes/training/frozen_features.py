"""`FeatureCache`: a frozen encoder's outputs, computed once for every example."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchrecipes.data.batching.batch import Batch
from torchrecipes.data.batching.examples import Examples
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
        self.sets: dict[str, tuple[Tensor, Tensor]] = {}  # features `[E, D]` and labels, by a set's fingerprint

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
            self.sets[rows.corpus.fingerprint] = map_examples(model, model.features, rows, self.collator, **options)
        size = sum(features.nbytes for features, _ in self.sets.values()) / 2**20
        examples = sum(len(features) for features, _ in self.sets.values())
        print(f"features of {examples:,} examples, computed once: {size:,.1f} MiB", flush=True)

    def batch(self, rows: Any, numbers: np.ndarray, keys: np.ndarray, step: int = 1) -> Batch:  # noqa: ARG002
        """The features and labels of some examples.

        Args:
            rows: one of the sets.
            numbers: `[n]`, the examples' numbers; -1 is left out.
            keys: `[n]` uint64, not used.
            step: the optimizer step, not used.
        """
        features, labels = self.sets[rows.corpus.fingerprint]
        chosen = torch.from_numpy(numbers[numbers >= 0])
        texts, none = torch.arange(len(chosen)), torch.zeros(1, 0, dtype=torch.int64)
        return Batch(
            input_ids=none,
            position_ids=none,
            document_ids=none.int(),
            cu_seqlens=torch.zeros(1, dtype=torch.int32),
            max_seqlen=0,
            num_targets=len(chosen),
            num_texts=len(chosen),
            examples=Examples(texts[:, None], texts, labels=labels[chosen]),
            features=features[chosen],
        )
