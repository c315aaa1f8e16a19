"""`PairClassification`: how well similarity separates pairs that belong together from others."""

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from torchrecipes.data.examples import ExampleSource
from torchrecipes.errors import UserError
from torchrecipes.evaluation.classification import average_precision
from torchrecipes.evaluation.embeddings import (
    Encoder,
    Similarity,
    by_dimension,
    encode_pairs,
    finite_or_nan,
    pair_scores,
)

LABELS = {"1": 1, "0": 0, "1.0": 1, "0.0": 0, "True": 1, "False": 0}


class PairClassification:
    """Average precision of similarities, and the thresholds with the best accuracy and the best F1.

    Args:
        data: examples of two texts with the label 1 (they belong together) or 0, as `labeled_texts` or `scored_pairs`
            of `torchrecipes.data.examples` read them.
        positive_label: the label that is 1, where labels are names; any other is 0. None: labels are 0 and 1.
        similarity: `cosine`, or `dot` for a model that was trained on dot products without normalization.
    """

    def __init__(
        self, data: ExampleSource, positive_label: str | int | None = None, *, similarity: Similarity = "cosine"
    ):
        self.data, self.positive_label, self.similarity = data, positive_label, similarity

    def __call__(self, encoder: Encoder, dims: Sequence[int] = ()) -> dict[str, float]:
        """Evaluates an encoder.

        Args:
            encoder: has a method `encode`, as `TextEncoder`.
            dims: Matryoshka dimensions to evaluate beside the full one.

        Returns:
            `average_precision`, and what `best_thresholds` returns; with `_dim<d>` after the name for every Matryoshka
            dimension.

        Raises:
            UserError: there are no pairs, or none of a class; a label is neither 0 nor 1; a dimension is out of range.
        """
        first, second, labels = self._pairs
        first, second = encode_pairs(encoder, first, second)

        def measure(dim: int | None) -> dict[str, float]:
            scores = pair_scores(first, second, dim, self.similarity)
            return {"average_precision": average_precision(scores, labels)} | best_thresholds(scores, labels)

        return finite_or_nan(by_dimension(measure, dims, first.shape[1]), first, second)

    @cached_property
    def _pairs(self) -> tuple[list[str], list[str], np.ndarray]:
        first, second, labels = [], [], []
        for example in self.data:
            label = example.label if example.label is not None else next(iter(example.values), None)
            if self.positive_label is not None:
                label = int(str(label) == str(self.positive_label))
            if len(example.texts) != 2 or str(label) not in LABELS:
                problem = f"{example.source}: {len(example.texts)} texts with the label {label!r}, not 2 with 0 or 1"
                hint = "positive_label names the label of pairs that belong together."
                raise UserError(problem, key="data", hint=hint, code="not_labeled_pairs")
            first.append(example.texts[0])
            second.append(example.texts[1])
            labels.append(LABELS[str(label)])
        if len(set(labels)) < 2:
            problem = f"{len(labels)} pairs, all with the label {labels[0]}" if labels else "there are no pairs"
            hint = "Average precision needs pairs of both labels."
            raise UserError(problem, key="data", hint=hint, code="one_class" if labels else "no_examples")
        return first, second, np.array(labels)


def best_thresholds(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The thresholds with the highest accuracy and the highest F1; a score at or above the threshold means 1.

    A threshold is the middle between two neighbouring scores, as in sentence-transformers; of equally good ones, the
    highest.

    Args:
        scores: `[n]`.
        labels: `[n]` of 0 and 1.

    Returns:
        `accuracy` and its `accuracy_threshold`; `f1`, `precision`, `recall` and their `f1_threshold`.
    """
    order = np.argsort(-scores, kind="stable")
    scores, labels = scores[order].astype(np.float64), labels[order]
    ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))  # the last of equal scores
    true_positives, predicted = np.cumsum(labels)[ends], ends + 1
    positives, total = labels.sum(), len(labels)
    following = np.append(scores[ends[1:]], scores[-1])
    thresholds = np.append(math.nextafter(scores[0], math.inf), (scores[ends] + following) / 2)
    accuracy = np.append(total - positives, 2 * true_positives - predicted + total - positives) / total
    f1 = 2 * true_positives / (predicted + positives)
    most, best = int(accuracy.argmax()), int(f1.argmax())
    return {
        "accuracy": float(accuracy[most]),
        "accuracy_threshold": float(thresholds[most]),
        "f1": float(f1[best]),
        "f1_threshold": float(thresholds[best + 1]),
        "precision": float(true_positives[best] / predicted[best]),
        "recall": float(true_positives[best] / positives),
    }
