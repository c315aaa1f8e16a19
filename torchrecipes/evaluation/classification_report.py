"""The end of a classifier's training: its calibration, and what it gets right and wrong by label."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchrecipes.errors import UserError
from torchrecipes.evaluation.calibration import fit_temperature, tune_thresholds
from torchrecipes.evaluation.classification import (
    Task,
    Values,
    class_scores,
    confusion_matrix,
    format_report,
    sigmoid,
    to_array,
    to_float64,
)
from torchrecipes.evaluation.classification_plots import plot_calibration, plot_confusion_matrix


def calibrate(logits: Values, labels: Values, *, task: Task = "single_label") -> dict[str, Any]:
    """Fits on validation data what turns logits into predictions.

    Args:
        logits: `[n, C]`.
        labels: as for `classification_metrics`.
        task: the kind of labels.

    Returns:
        `temperature`, and for `multi_label` the `thresholds` of the probabilities that it gives: arguments of
        `classification_metrics`. Empty for a regression.
    """
    if task == "regression":
        return {}
    temperature = fit_temperature(logits, labels, task)
    if task == "single_label":
        return {"temperature": temperature}
    return {"temperature": temperature, "thresholds": tune_thresholds(logits, labels, temperature).tolist()}


def report_classification(
    folder: Path,
    predictions: Mapping[str, tuple[Values, Values]],
    names: Sequence[str],
    *,
    task: Task = "single_label",
    temperature: float = 1.0,
    thresholds: Sequence[float] | None = None,
) -> None:
    """Prints the scores of every label, and writes `confusion_matrix_<set>.png` and `calibration_<set>.png`.

    Without matplotlib there are no pictures, which is said. A regression has no labels to report.

    Args:
        folder: of the pictures.
        predictions: by the name of the set, logits `[n, C]` and labels.
        names: of the labels.
        task, temperature, thresholds: as for `classification_metrics`.
    """
    if task == "regression":
        return
    try:
        for name, (logits, labels) in predictions.items():
            scaled, labels = to_float64(logits) / temperature, to_array(labels)
            if task == "single_label":
                predicted = scaled.argmax(1)
            else:
                predicted = sigmoid(scaled) >= (0.5 if thresholds is None else to_float64(thresholds))
            print(f"{name}:\n{format_report(class_scores(predicted, labels, names))}", flush=True)
            if task == "single_label":
                matrix = confusion_matrix(labels, predicted, len(names))
                plot_confusion_matrix(matrix, names, folder / f"confusion_matrix_{name}.png")
            plot_calibration(logits, labels, folder / f"calibration_{name}.png", task=task, temperature=temperature)
    except UserError as error:
        if error.code != "missing_package":
            raise
        print(f"no pictures: {error}", flush=True)
