"""Temperature scaling, and thresholds for several labels per example; both are fitted on validation data."""

import math

import numpy as np

from torchrecipes.evaluation.classification import (
    Task,
    Values,
    check_labels,
    log_softmax,
    sigmoid,
    to_array,
    to_float64,
)

LOWEST, HIGHEST = 1 / 64, 64.0  # temperatures: without an error in the validation data, the best would be 0


def fit_temperature(logits: Values, labels: Values, task: Task = "single_label") -> float:
    """The temperature by which logits are divided for the lowest log loss; predictions stay the same.

    The loss is convex in 1 / temperature, and Newton's method finds its minimum (Guo et al. 2017, "On Calibration of
    Modern Neural Networks", arXiv 1706.04599). It is never above that of temperature 1.

    Args:
        logits: `[n, C]`, of validation data that the weights were not trained on.
        labels: `[n]` numbers of classes; `[n, C]` of 0 and 1 for `multi_label`.
        task: `single_label` or `multi_label`.

    Returns:
        Between 1/64 and 64; 1 where there is nothing to fit: no examples, or logits that are not finite.

    Raises:
        UserError: a label has no logit (code `unknown_label`).
    """
    logits, labels = to_float64(logits), to_array(labels)
    if not len(labels) or not np.isfinite(logits).all():
        return 1.0
    check_labels(labels, logits.shape[1], task)
    one_hot = labels if task == "multi_label" else np.eye(logits.shape[1])[labels]

    def loss(scale: float) -> float:
        if task == "multi_label":
            return float(np.mean(np.logaddexp(0, scale * logits) - one_hot * scale * logits))
        return float(-np.mean((one_hot * log_softmax(scale * logits)).sum(1)))

    def slope_and_curvature(scale: float) -> tuple[float, float]:
        if task == "multi_label":
            probability = sigmoid(scale * logits)
            return float(np.mean((probability - one_hot) * logits)), float(
                np.mean(probability * (1 - probability) * logits**2)
            )
        probability = np.exp(log_softmax(scale * logits))
        expected = (probability * logits).sum(1)
        variance = (probability * (logits - expected[:, None]) ** 2).sum(1)
        return float(np.mean(expected - (one_hot * logits).sum(1))), float(variance.mean())

    low, high, scale = 1 / HIGHEST, 1 / LOWEST, 1.0
    for _ in range(60):
        slope, curvature = slope_and_curvature(scale)
        low, high = (low, scale) if slope > 0 else (scale, high)
        step = scale - slope / curvature if curvature > 0 else math.nan
        new = step if low < step < high else math.sqrt(low * high)  # halves the interval where Newton leaves it
        if abs(new - scale) <= 1e-12 * scale:
            break
        scale = new
    return 1 / scale if loss(scale) < loss(1.0) else 1.0


def tune_thresholds(logits: Values, labels: Values, temperature: float = 1.0) -> np.ndarray:
    """For every label, the probability from which it is predicted for the highest F1.

    A threshold lies in the middle between two neighbouring probabilities; of equally good ones it is the one closest to
    0.5. A label that no example or every example has keeps 0.5: there is nothing to tune it on.

    Args:
        logits: `[n, C]`, of validation data.
        labels: `[n, C]` of 0 and 1.
        temperature: logits are divided by it first.

    Returns:
        `[C]` float64 between 0 and 1.

    Raises:
        UserError: the labels are not 0 and 1, or do not go with the logits (code `unknown_label`).
    """
    logits, labels = to_float64(logits), to_array(labels)
    check_labels(labels, logits.shape[1], "multi_label")
    probabilities = sigmoid(logits / temperature)
    return np.array([_best_threshold(probabilities[:, c], labels[:, c]) for c in range(labels.shape[1])])


def _best_threshold(probabilities: np.ndarray, labels: np.ndarray) -> float:
    positives = labels.sum()
    if positives in (0, len(labels)) or not np.isfinite(probabilities).all():
        return 0.5
    order = np.argsort(-probabilities, kind="stable")
    probabilities, labels = probabilities[order], labels[order]
    ends = np.flatnonzero(np.append(probabilities[1:] != probabilities[:-1], True))  # the last of equal ones
    f1 = 2 * np.cumsum(labels)[ends] / (ends + 1 + positives)
    thresholds = (probabilities[ends] + np.append(probabilities[ends[1:]], 0)) / 2
    best = np.flatnonzero(f1 >= f1.max() - 1e-12)
    return float(thresholds[best[np.abs(thresholds[best] - 0.5).argmin()]])
