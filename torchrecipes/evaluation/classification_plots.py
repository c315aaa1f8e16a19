"""Pictures of a classifier's mistakes: the confusion matrix, and how far its probabilities can be trusted."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from torchrecipes.errors import UserError
from torchrecipes.evaluation.classification import (
    Task,
    Values,
    expected_calibration_error,
    log_softmax,
    reliability,
    sigmoid,
    to_array,
    to_float64,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELLS_WITH_NUMBERS = 30  # classes; with more, the colors alone have to do
LONGEST_NAME = 24


def plot_confusion_matrix(matrix: np.ndarray, names: Sequence[str], path: str | Path) -> None:
    """Writes a picture of a confusion matrix; its colors are shares of the rows, its numbers are counts.

    Args:
        matrix: `[C, C]` of `confusion_matrix`: a row per class, a column per prediction.
        names: of the classes.
        path: of the picture; its suffix is the format.

    Raises:
        UserError: matplotlib is missing (code `missing_package`), or the file cannot be written (`not_writable`).
    """
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    count = len(matrix)
    side = min(16.0, 2.5 + 0.45 * count)
    figure = _figure(side, side)
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    every = -(-count // CELLS_WITH_NUMBERS)
    ticks = range(0, count, every)
    labels = [_short(names[number]) for number in ticks]
    axes.set_xticks(ticks, labels, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(ticks, labels)
    axes.set_xlabel("predicted")
    axes.set_ylabel("label")
    if count <= CELLS_WITH_NUMBERS:
        for row in range(count):
            for column in range(count):
                color = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, f"{matrix[row, column]:,}", ha="center", va="center", color=color, fontsize=8)
    accuracy = np.trace(matrix) / max(1, matrix.sum())
    axes.set_title(f"{matrix.sum():,} examples, accuracy {accuracy:.3f}", loc="left", fontsize=10)
    _save(figure, path)


def plot_calibration(
    logits: Values,
    labels: Values,
    path: str | Path,
    *,
    task: Task = "single_label",
    temperature: float = 1.0,
    bins: int = 15,
) -> None:
    """Writes a reliability diagram: how often predictions of a confidence are right, and how many there are.

    Args:
        logits: `[n, C]`.
        labels: `[n]` numbers of classes; `[n, C]` of 0 and 1 for `multi_label`.
        path: of the picture; its suffix is the format.
        task: `single_label`: the confidence is the highest probability; `multi_label`: the probability of each label.
        temperature: of `fit_temperature`; other than 1, the picture shows the probabilities before and after.
        bins: of the confidence.

    Raises:
        UserError: matplotlib is missing (code `missing_package`), or the file cannot be written (`not_writable`).
    """
    logits, labels = to_float64(logits), to_array(labels)
    figure = _figure(5, 5.5)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color="0.6", linestyle=":")
    names = {1.0: "temperature 1"} | ({} if temperature == 1 else {temperature: f"temperature {temperature:.3g}"})
    for number, (divisor, name) in enumerate(names.items()):
        confidence, correct = confidence_and_correctness(logits / divisor, labels, task)
        edges, means, shares, counts = reliability(confidence, correct, bins)
        error = expected_calibration_error(confidence, correct, bins)
        upper.plot(means, shares, color=f"C{number}", marker="o", markersize=4, label=f"{name}: error {error:.3f}")
        lower.stairs(counts / counts.sum(), edges, color=f"C{number}")
    upper.set_title("calibration", loc="left", fontsize=10)
    upper.set_ylabel("share that is right" if task == "single_label" else "share that is there")
    upper.legend(frameon=False, fontsize=8)
    lower.set_ylabel("predictions")
    lower.set_xlabel("confidence" if task == "single_label" else "probability")
    lower.set_xlim(0, 1)
    for axes in (upper, lower):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def confidence_and_correctness(logits: np.ndarray, labels: np.ndarray, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and whether what they stand for was so: of the predicted class, or of every label.

    Args:
        logits: `[n, C]` float64.
        labels: `[n]`, or `[n, C]` for `multi_label`.
        task: the kind of labels.

    Returns:
        Two arrays `[n]`, or `[n * C]` for `multi_label`.
    """
    if task == "multi_label":
        return sigmoid(logits).reshape(-1), labels.reshape(-1)
    return np.exp(log_softmax(logits).max(1)), logits.argmax(1) == labels


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError:
        hint = "Install it: pip install 'torchrecipes[plot]'"
        raise UserError("a picture needs matplotlib", hint=hint, code="missing_package") from None
    return Figure(figsize=(width, height), layout="constrained")  # without pyplot, which changes a notebook's backend


def _save(figure: "Figure", path: str | Path) -> None:
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}", code="not_writable") from None


def _short(name: str) -> str:
    # A dollar would begin a formula.
    name = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
    return name.replace("$", r"\$")
