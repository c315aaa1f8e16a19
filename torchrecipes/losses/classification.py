"""Losses of classifiers: sums over examples."""

import inspect
import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from torchrecipes.config import Component
from torchrecipes.config.components import resolve
from torchrecipes.errors import UserError


class CrossEntropy:
    """Cross-entropy of one class of several, with class weights, label smoothing and focal loss.

    Args:
        class_weights: a factor for every class; `balanced`: examples / (classes * examples of the class), so that every
            class has the same weight in the sum over the data (scikit-learn's rule). None: 1.
        label_smoothing: share of a target that is spread over the classes (Szegedy et al., 2015, arXiv:1512.00567, 7).
        focal_gamma: an example's loss is multiplied by (1 - p) ** gamma, where p is the probability of its class: less
            weight for what is right already (Lin et al., 2017, arXiv:1708.02002, equation 5, with 2). 0 is off.
        label_counts: examples of every class in the training data, for `balanced`.

    Raises:
        UserError: an argument that is out of range (code `invalid_loss`); `balanced` with a class that has no examples
            (`empty_class`).
    """

    def __init__(
        self,
        class_weights: list[float] | Literal["balanced"] | None = None,
        label_smoothing: float = 0.0,
        focal_gamma: float = 0.0,
        label_counts: Sequence[int] | None = None,
    ):
        if not 0 <= label_smoothing < 1:
            raise UserError(f"{label_smoothing} is not between 0 and 1", key="label_smoothing", code="invalid_loss")
        if not focal_gamma >= 0:
            raise UserError(f"{focal_gamma} is negative", key="focal_gamma", code="invalid_loss")
        if class_weights == "balanced":
            counts = _counts(label_counts, "class_weights")
            class_weights = [sum(counts) / (len(counts) * count) for count in counts]
        self.class_weights = _weights(class_weights, "class_weights")
        self.label_smoothing, self.focal_gamma = label_smoothing, focal_gamma

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the sum over the examples, in fp32 at least.

        Args:
            logits: `[n, C]`.
            labels: `[n]` int64, the classes.

        Raises:
            UserError: labels of another task (code `wrong_labels`), or as many class weights as there are classes are
                needed (`invalid_loss`).
        """
        _check_labels(
            type(self).__name__, labels.ndim == 1 and not labels.is_floating_point(), "one class of each example"
        )
        logits = _at_least_fp32(logits)
        weights = _for_classes(self.class_weights, logits, "class_weights")
        losses = F.cross_entropy(logits, labels, weights, label_smoothing=self.label_smoothing, reduction="none")
        if self.focal_gamma:
            # 1 - p as the sum of the other classes' probabilities: exact, and with a gradient, where p rounds to 1.
            others = logits.log_softmax(1).scatter(1, labels[:, None], -torch.inf).logsumexp(1)
            losses = losses * (self.focal_gamma * others).exp()
        return losses.sum()


class BinaryCrossEntropy:
    """Binary cross-entropy of labels that do not exclude each other, averaged over an example's labels.

    Args:
        pos_weight: a factor for the positive examples of every label; `balanced`: its negative examples / its positive
            ones. None: 1.
        label_counts: positive examples of every label in the training data, for `balanced`.
        num_examples: of the training data, for `balanced`.

    Raises:
        UserError: an argument that is out of range (code `invalid_loss`); `balanced` with a label that has no examples
            (`empty_class`).
    """

    def __init__(
        self,
        pos_weight: list[float] | Literal["balanced"] | None = None,
        label_counts: Sequence[int] | None = None,
        num_examples: int | None = None,
    ):
        if pos_weight == "balanced":
            if num_examples is None:
                raise UserError("balanced needs num_examples", key="pos_weight", code="invalid_loss")
            pos_weight = [(num_examples - count) / count for count in _counts(label_counts, "pos_weight")]
        self.pos_weight = _weights(pos_weight, "pos_weight")

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the sum over the examples, in fp32 at least.

        Args:
            logits: `[n, L]`.
            labels: `[n, L]` float32, 0 or 1.

        Raises:
            UserError: labels of another task (code `wrong_labels`), or as many weights as there are labels are needed
                (`invalid_loss`).
        """
        _check_labels(type(self).__name__, labels.ndim == 2, "0 or 1 for each label of an example")
        logits = _at_least_fp32(logits)
        weights = _for_classes(self.pos_weight, logits, "pos_weight")
        losses = F.binary_cross_entropy_with_logits(
            logits, labels.to(logits.dtype), pos_weight=weights, reduction="none"
        )
        return losses.mean(1).sum()


class MeanSquaredError:
    """Squared error of numbers."""

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the sum over the examples, in fp32 at least.

        Args:
            logits: `[n, 1]`, the predictions.
            labels: `[n]` floating point.

        Raises:
            UserError: labels of another task (code `wrong_labels`).
        """
        _check_labels(type(self).__name__, labels.ndim == logits.shape[1] == 1, "a number of each example")
        return (_at_least_fp32(logits)[:, 0] - labels).square().sum()


# The loss of each task, where nothing else is chosen.
CLASSIFICATION_LOSSES = {
    "single_label": CrossEntropy,
    "multi_label": BinaryCrossEntropy,
    "regression": MeanSquaredError,
}


def check_loss_of_logits(loss: Component | None) -> None:
    """Checks that a loss is one of a classifier.

    Args:
        loss: of a config; None: the one of the task.

    Raises:
        UserError: it compares embeddings (code `not_a_loss_of_logits`).
    """
    if loss and "examples" in inspect.signature(resolve(loss.path).__call__).parameters:
        problem, hint = (
            f"{loss.path} is a loss of embeddings",
            "Use CrossEntropy, or leave out loss for the task's own.",
        )
        raise UserError(problem, key="loss", hint=hint, code="not_a_loss_of_logits")


def _check_labels(name: str, are_right: bool, wanted: str) -> None:
    if not are_right:
        raise UserError(
            f"{name} takes {wanted}, and the labels are of another task",
            key="loss",
            hint="Leave out loss, which takes the one of the task, or set another task.",
            code="wrong_labels",
        )


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _counts(counts: Sequence[int] | None, key: str) -> Sequence[int]:
    if counts is None:
        raise UserError("balanced needs label_counts", key=key, code="invalid_loss")
    empty = [number for number, count in enumerate(counts) if count == 0]
    if empty:
        raise UserError(
            f"balanced cannot weight class {empty[0]}, of which the training data has no example",
            key=key,
            hint="List the weights, or remove the class.",
            code="empty_class",
        )
    return counts


def _weights(weights: Sequence[float] | None, key: str) -> Tensor | None:
    if weights is None:
        return None
    if not all(0 < weight < math.inf for weight in weights):
        raise UserError(f"{list(weights)} are not all positive and finite", key=key, code="invalid_loss")
    return torch.tensor(weights, dtype=torch.float64)


def _for_classes(weights: Tensor | None, logits: Tensor, key: str) -> Tensor | None:
    if weights is None:
        return None
    if len(weights) != logits.shape[1]:
        raise UserError(
            f"there are {len(weights)} weights for {logits.shape[1]} classes", key=f"loss.{key}", code="invalid_loss"
        )
    return weights.to(logits.device, logits.dtype)
