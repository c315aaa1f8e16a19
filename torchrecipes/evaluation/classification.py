"""Metrics of classification and regression, from logits and labels.

All are computed in float64 with NumPy, and equal scikit-learn's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from torchrecipes.errors import UserError
from torchrecipes.evaluation.correlation import average_ranks, pearson, spearman

Task = Literal["single_label", "multi_label", "regression"]
Values = np.ndarray | Tensor | Sequence


def classification_metrics(
    logits: Values,
    labels: Values,
    *,
    task: Task = "single_label",
    thresholds: Values | None = None,
    temperature: float = 1.0,
) -> dict[str, float]:
    """The metrics that fit a task. One that is undefined, as an AUC with labels of one class, is NaN.

    Args:
        logits: `[n, C]` of any float type; for regression `[n]` or `[n, 1]` predictions.
        labels: `[n]` numbers of classes; `[n, C]` of 0 and 1 for `multi_label`; `[n]` values for regression.
        task: the kind of labels.
        thresholds: `[C]` probabilities from which a label of `multi_label` is predicted (`tune_thresholds`); None: 0.5.
        temperature: logits are divided by it (`fit_temperature`).

    Returns:
        For `single_label`: `accuracy`, `macro_f1` (over the classes that occur in labels or predictions), `matthews`,
        `auc` (of class 1 for two classes, else the mean of one class against the others), `log_loss` (nats), `ece`; for
        two classes also `f1` and `average_precision` of class 1.
        For `multi_label`: `accuracy` (all labels of an example right), `macro_f1`, `micro_f1`, `auc` and
        `average_precision` (means over the labels for which they are defined), `log_loss` (nats per label), `ece`.
        For `regression`: `pearson`, `spearman`, `mse`, `mae`.
        NaN for all of them where a logit is not finite, as after a run has diverged.

    Raises:
        UserError: there are no examples (code `no_examples`), or labels that the logits have no class for
            (`unknown_label`).
    """
    logits, labels = to_float64(logits), to_array(labels)
    if not len(labels):
        raise UserError("there are no examples to evaluate", code="no_examples")
    is_finite = bool(np.isfinite(logits).all())
    logits = np.nan_to_num(logits, posinf=0, neginf=0)
    if task == "regression":
        results = _regression_metrics(logits.reshape(len(labels)), labels.astype(np.float64).reshape(-1))
    else:
        check_labels(labels, logits.shape[1], task)
        if task == "multi_label":
            results = _multi_label_metrics(logits / temperature, labels, thresholds)
        else:
            results = _single_label_metrics(logits / temperature, labels)
    return results if is_finite else dict.fromkeys(results, math.nan)


def _regression_metrics(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    error = predictions - labels
    return {
        "pearson": pearson(predictions, labels),
        "spearman": spearman(predictions, labels),
        "mse": float(np.mean(error**2)),
        "mae": float(np.mean(np.abs(error))),
    }


def _single_label_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    predictions, classes = logits.argmax(1), logits.shape[1]
    log_probabilities = log_softmax(logits)
    probabilities = np.exp(log_probabilities)
    matrix = confusion_matrix(labels, predictions, classes)
    table = _scores_of(matrix)
    occurring = matrix.sum(0) + matrix.sum(1) > 0
    if classes == 2:
        auc = roc_auc(probabilities[:, 1], labels)
    else:
        auc = _mean([roc_auc(probabilities[:, c], labels == c) for c in range(classes)])
    results = {
        "accuracy": float(np.mean(predictions == labels)),
        "macro_f1": float(table["f1"][occurring].mean()),
        "matthews": matthews(matrix),
        "auc": auc,
        "log_loss": float(-log_probabilities[np.arange(len(labels)), labels].mean()),
        "ece": expected_calibration_error(probabilities.max(1), predictions == labels),
    }
    if classes == 2:
        results["f1"] = float(table["f1"][1])
        results["average_precision"] = average_precision(probabilities[:, 1], labels)
    return results


def _multi_label_metrics(logits: np.ndarray, labels: np.ndarray, thresholds: Values | None) -> dict[str, float]:
    probabilities = sigmoid(logits)
    predictions = probabilities >= (0.5 if thresholds is None else to_float64(thresholds))
    truth = labels.astype(bool)
    right, predicted, actual = (truth & predictions).sum(0), predictions.sum(0), truth.sum(0)
    return {
        "accuracy": float((predictions == truth).all(1).mean()),
        "macro_f1": float(_ratio(2 * right, predicted + actual).mean()),
        "micro_f1": float(_ratio(2 * right.sum(), predicted.sum() + actual.sum())),
        "auc": _mean([roc_auc(probabilities[:, c], truth[:, c]) for c in range(truth.shape[1])]),
        "average_precision": _mean(
            [average_precision(probabilities[:, c], truth[:, c]) for c in range(truth.shape[1])]
        ),
        # log(1 + exp(x)) - y x, without overflow
        "log_loss": float(np.mean(np.logaddexp(0, logits) - labels * logits)),
        "ece": expected_calibration_error(probabilities.reshape(-1), truth.reshape(-1)),
    }


@dataclass(frozen=True)
class ClassScores:
    """The scores of one class.

    Attributes:
        name: of the class.
        precision: right among predicted; 0 where it was never predicted.
        recall: right among actual; 0 where it never occurs.
        f1: the harmonic mean of both.
        support: examples that have this label.
        predicted: examples for which it was predicted.
    """

    name: str
    precision: float
    recall: float
    f1: float
    support: int
    predicted: int


def class_scores(
    predictions: Values, labels: Values, names: Sequence[str] | None = None, num_classes: int | None = None
) -> list[ClassScores]:
    """Precision, recall and F1 of every class.

    Args:
        predictions: `[n]` numbers of classes, or `[n, C]` of 0 and 1 for several labels per example.
        labels: as `predictions`.
        names: of the classes; None: their numbers.
        num_classes: `C`, where neither `names` nor the shape says it.
    """
    predictions, labels = to_array(predictions), to_array(labels)
    if labels.ndim == 2:
        truth, predicted = labels.astype(bool), predictions.astype(bool)
        right, predicted, actual = (truth & predicted).sum(0), predicted.sum(0), truth.sum(0)
        table = _table(right, predicted, actual)
    else:
        count = num_classes or (len(names) if names else int(max(predictions.max(), labels.max())) + 1)
        table = _scores_of(confusion_matrix(labels, predictions, count))
    names = names or [str(number) for number in range(len(table["f1"]))]
    columns = [table[key].tolist() for key in ("precision", "recall", "f1", "support", "predicted")]
    return [ClassScores(*row) for row in zip(names, *columns, strict=True)]


def format_report(scores: Sequence[ClassScores], width: int = 32) -> str:
    """A table of `class_scores` for the terminal: a line per class, and the means.

    Args:
        scores: of all classes.
        width: characters that a name may take; a longer one is cut.
    """
    names = [score.name if len(score.name) <= width else score.name[: width - 1] + "…" for score in scores]
    pad = max(map(len, [*names, "weighted mean"]))
    lines = [f"{'':{pad}} {'precision':>9} {'recall':>9} {'F1':>9} {'support':>9} {'predicted':>9}"]
    for name, score in zip(names, scores, strict=True):
        numbers = f"{score.precision:9.4f} {score.recall:9.4f} {score.f1:9.4f} {score.support:9,} {score.predicted:9,}"
        lines.append(f"{name:{pad}} {numbers}")
    total, predicted = sum(score.support for score in scores), sum(score.predicted for score in scores)
    for name, weights in (
        ("macro mean", [1.0] * len(scores)),
        ("weighted mean", [float(score.support) for score in scores]),
    ):
        means = [
            np.average([getattr(score, key) for score in scores], weights=weights if sum(weights) else None)
            for key in ("precision", "recall", "f1")
        ]
        lines.append(f"{name:{pad}} {' '.join(f'{mean:9.4f}' for mean in means)} {total:9,} {predicted:9,}")
    return "\n".join(lines)


def confusion_matrix(labels: Values, predictions: Values, num_classes: int) -> np.ndarray:
    """How many examples of every class (rows) were predicted as which class (columns).

    Args:
        labels: `[n]` numbers of classes.
        predictions: `[n]` numbers of classes.
        num_classes: `C`.

    Returns:
        `[C, C]` int64.
    """
    pairs = to_array(labels).astype(np.int64) * num_classes + to_array(predictions).astype(np.int64)
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def matthews(matrix: np.ndarray) -> float:
    """Matthews' correlation coefficient for any number of classes (Gorodkin 2004); 0 where a side is constant.

    Args:
        matrix: `[C, C]`, from `confusion_matrix`.
    """
    matrix = matrix.astype(np.float64)
    actual, predicted, total = matrix.sum(1), matrix.sum(0), matrix.sum()
    covariance = np.trace(matrix) * total - actual @ predicted
    spread = (total**2 - actual @ actual) * (total**2 - predicted @ predicted)
    return float(covariance / math.sqrt(spread)) if spread > 0 else 0.0


def roc_auc(scores: Values, labels: Values) -> float:
    """The area under the ROC curve: the share of pairs of a positive and a negative that are in the right order.

    Equal scores count half (Mann and Whitney's U). NaN where all labels are equal.

    Args:
        scores: `[n]`.
        labels: `[n]` of 0 and 1.
    """
    labels = to_array(labels).astype(bool)
    positives, negatives = int(labels.sum()), int((~labels).sum())
    if not positives or not negatives:
        return math.nan
    ranks = average_ranks(to_array(scores))
    return float((ranks[labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def average_precision(scores: Values, labels: Values) -> float:
    """The mean of the precision over the positives, in the order of falling scores; NaN without positives.

    Equal scores are one threshold; nothing is interpolated.

    Args:
        scores: `[n]`.
        labels: `[n]` of 0 and 1.
    """
    scores, labels = to_array(scores), to_array(labels).astype(np.int64)
    if not labels.sum():
        return math.nan
    order = np.argsort(-scores, kind="stable")
    scores, labels = scores[order], labels[order]
    ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    right = np.cumsum(labels)[ends]
    return float((np.diff(right, prepend=0) * right / (ends + 1)).sum() / labels.sum())


def expected_calibration_error(confidence: Values, correct: Values, bins: int = 15) -> float:
    """The mean distance between confidence and accuracy over bins of equal width (Guo et al. 2017, arXiv 1706.04599).

    Args:
        confidence: `[n]` probabilities.
        correct: `[n]` of 0 and 1: whether what they are the probability of was so.
        bins: between 0 and 1; each holds its upper edge.
    """
    _, confidences, accuracies, counts = reliability(confidence, correct, bins)
    used = counts > 0
    return float((counts[used] * np.abs(accuracies[used] - confidences[used])).sum() / counts.sum())


def reliability(
    confidence: Values, correct: Values, bins: int = 15
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean confidence and accuracy in bins of equal width, for `expected_calibration_error` and the calibration plot.

    Returns:
        Edges `[bins + 1]`, mean confidence, share of the correct (both NaN in an empty bin), and counts, `[bins]` each.
    """
    confidence, correct = to_float64(confidence), to_float64(correct)
    edges = np.linspace(0, 1, bins + 1)
    number = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    counts = np.bincount(number, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(number, weights, bins) / counts for weights in (confidence, correct)]
    return edges, *means, counts


# The metrics of every task (Wang et al. 2019, "GLUE"); its score is their mean, in MNLI over both validation sets.
GLUE_METRICS = {
    "cola": ("matthews",),
    "sst2": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    "stsb": ("pearson", "spearman"),
    "mnli": ("accuracy",),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
    "wnli": ("accuracy",),
    "ax": ("matthews",),
}


def glue_score(task: str, *results: dict[str, float]) -> float:
    """The score of a GLUE task, between 0 and 1 (the leaderboard shows 100 times as much): the mean of its metrics.

    Args:
        task: one of `GLUE_METRICS`.
        results: from `classification_metrics`, one for every validation set: for `mnli` the matched and the mismatched.
    """
    return float(np.mean([result[metric] for result in results for metric in GLUE_METRICS[task]]))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logarithms of the softmax over the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """The logistic function, without overflow."""
    return np.exp(-np.logaddexp(0, -logits))


def check_labels(labels: np.ndarray, num_classes: int, task: Task) -> None:
    """Raises a UserError (code `unknown_label`) unless the labels go with `num_classes` logits."""
    if task == "multi_label":
        if labels.shape != (len(labels), num_classes) or not np.isin(labels, (0, 1)).all():
            problem = f"labels of shape {labels.shape} for {num_classes} logits: not [n, {num_classes}] of 0 and 1"
            raise UserError(problem, code="unknown_label")
    elif labels.ndim != 1 or labels.min() < 0 or labels.max() >= num_classes:
        problem = f"labels from {labels.min()} to {labels.max()} for {num_classes} classes"
        raise UserError(problem, hint=f"Classes are numbered from 0 to {num_classes - 1}.", code="unknown_label")


def to_float64(values: Values) -> np.ndarray:
    """An array or a tensor of any float type and device, as float64."""
    return to_array(values).astype(np.float64)


def to_array(values: Values) -> np.ndarray:
    """An array or a tensor of any type and device, as a NumPy array."""
    if isinstance(values, Tensor):
        values = values.detach()
        return (values.float() if values.dtype == torch.bfloat16 else values).cpu().numpy()
    return np.asarray(values)


def _scores_of(matrix: np.ndarray) -> dict[str, np.ndarray]:
    return _table(np.diag(matrix), matrix.sum(0), matrix.sum(1))


def _table(right: np.ndarray, predicted: np.ndarray, actual: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "precision": _ratio(right, predicted),
        "recall": _ratio(right, actual),
        "f1": _ratio(2 * right, predicted + actual),
        "support": actual,
        "predicted": predicted,
    }


def _ratio(part: np.ndarray, of: np.ndarray) -> np.ndarray:
    """`part / of`, and 0 where both are 0."""
    return part / np.maximum(of, 1)


def _mean(values: Sequence[float]) -> float:
    """The mean of those that are defined."""
    defined = [value for value in values if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan
