"""Metrics of classification, against scikit-learn."""

import math
import warnings

import numpy as np
import pytest
import torch

from torchrecipes.errors import UserError
from torchrecipes.evaluation import class_scores, classification_metrics, confusion_matrix, format_report, glue_score
from torchrecipes.evaluation.classification import average_precision, expected_calibration_error, roc_auc

sklearn = pytest.importorskip("sklearn.metrics")
RANDOM = np.random.default_rng(0)


def softmax(logits):
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


@pytest.mark.parametrize("classes", [2, 5])
def test_single_label_equals_scikit_learn(classes):
    logits, labels = RANDOM.normal(size=(200, classes)), RANDOM.integers(classes, size=200)
    got = classification_metrics(torch.tensor(logits), torch.tensor(labels))
    predictions, probabilities = logits.argmax(1), softmax(logits)
    scores = probabilities[:, 1] if classes == 2 else probabilities
    expected = {
        "accuracy": sklearn.accuracy_score(labels, predictions),
        "macro_f1": sklearn.f1_score(labels, predictions, average="macro"),
        "matthews": sklearn.matthews_corrcoef(labels, predictions),
        "auc": sklearn.roc_auc_score(labels, scores, multi_class="ovr"),
        "log_loss": sklearn.log_loss(labels, probabilities),
        "ece": ece_by_loop(probabilities.max(1), predictions == labels),
    }
    if classes == 2:
        expected["f1"] = sklearn.f1_score(labels, predictions)
        expected["average_precision"] = sklearn.average_precision_score(labels, scores)
    assert got == pytest.approx(expected, abs=1e-9)


def test_multi_label_equals_scikit_learn():
    logits, labels = RANDOM.normal(size=(150, 6)), RANDOM.integers(2, size=(150, 6))
    thresholds = RANDOM.uniform(0.2, 0.8, 6)
    got = classification_metrics(logits, labels, task="multi_label", thresholds=thresholds)
    probabilities = 1 / (1 + np.exp(-logits))
    predictions = (probabilities >= thresholds).astype(int)
    per_label = [sklearn.log_loss(labels[:, c], probabilities[:, c]) for c in range(6)]
    expected = {
        "accuracy": sklearn.accuracy_score(labels, predictions),
        "macro_f1": sklearn.f1_score(labels, predictions, average="macro"),
        "micro_f1": sklearn.f1_score(labels, predictions, average="micro"),
        "auc": sklearn.roc_auc_score(labels, probabilities, average="macro"),
        "average_precision": sklearn.average_precision_score(labels, probabilities, average="macro"),
        "log_loss": np.mean(per_label),
        "ece": ece_by_loop(probabilities.ravel(), labels.ravel()),
    }
    assert got == pytest.approx(expected, abs=1e-9)


def test_regression_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    predictions, labels = RANDOM.normal(size=80).round(1), RANDOM.integers(6, size=80) / 2  # both with ties
    got = classification_metrics(predictions[:, None], labels, task="regression")
    expected = {
        "pearson": stats.pearsonr(predictions, labels)[0],
        "spearman": stats.spearmanr(predictions, labels)[0],
        "mse": sklearn.mean_squared_error(labels, predictions),
        "mae": sklearn.mean_absolute_error(labels, predictions),
    }
    assert got == pytest.approx(expected, abs=1e-9)
    constant = classification_metrics(np.ones(80), labels, task="regression")
    assert math.isnan(constant["pearson"]) and math.isnan(constant["spearman"])


def test_scores_with_ties():
    scores, labels = RANDOM.integers(4, size=100) / 4, RANDOM.integers(2, size=100)
    assert roc_auc(scores, labels) == pytest.approx(sklearn.roc_auc_score(labels, scores), abs=1e-12)
    expected = sklearn.average_precision_score(labels, scores)
    assert average_precision(scores, labels) == pytest.approx(expected, abs=1e-12)


def test_classes_that_never_occur_do_not_count():
    logits = np.eye(4)[[0, 1, 1, 0]] * 3
    labels = np.array([0, 1, 0, 0])
    got = classification_metrics(logits, labels)
    assert got["macro_f1"] == pytest.approx(sklearn.f1_score(labels, logits.argmax(1), average="macro"))
    assert got["auc"] == pytest.approx(np.mean([roc_auc(logits[:, c], labels == c) for c in (0, 1)]))


def test_undefined_metrics_are_nan():
    got = classification_metrics(np.array([[2.0, 1.0], [0.0, 1.0]]), np.array([0, 0]))
    assert math.isnan(got["auc"]) and math.isnan(got["average_precision"])
    assert got["accuracy"] == 0.5 and got["matthews"] == 0
    assert math.isnan(classification_metrics(np.zeros((3, 2)), np.zeros((3, 2)), task="multi_label")["auc"])


def test_matthews_of_opposite_predictions_is_negative():
    assert classification_metrics(np.eye(2)[[1, 0, 1, 0]], np.array([0, 1, 0, 1]))["matthews"] == -1


def test_extreme_logits_stay_finite():
    logits = np.array([[1e4, -1e4], [-1e4, 1e4]])
    assert classification_metrics(logits, np.array([0, 0]))["log_loss"] == pytest.approx(1e4)
    multi = classification_metrics(logits, np.array([[1, 0], [1, 0]]), task="multi_label")
    assert multi["log_loss"] == pytest.approx(5e3)


def test_the_temperature_divides_logits():
    logits, labels = RANDOM.normal(size=(50, 3)), RANDOM.integers(3, size=50)
    got = classification_metrics(logits, labels, temperature=2.5)
    assert got["log_loss"] == pytest.approx(sklearn.log_loss(labels, softmax(logits / 2.5)), abs=1e-9)


@pytest.mark.parametrize("labels", [[0, 3], [-1, 0], [[0, 1], [1, 0]]])
def test_labels_without_a_logit_are_refused(labels):
    with pytest.raises(UserError) as error:
        classification_metrics(np.zeros((2, 3)), np.array(labels))
    assert error.value.code == "unknown_label"


def test_no_examples_are_refused():
    with pytest.raises(UserError) as error:
        classification_metrics(np.zeros((0, 3)), np.zeros(0, int))
    assert error.value.code == "no_examples"


def test_bfloat16_logits():
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0]], dtype=torch.bfloat16)
    assert classification_metrics(logits, torch.tensor([1, 0]))["accuracy"] == 1


@pytest.mark.parametrize("multi", [False, True])
def test_the_table_equals_scikit_learn(multi):
    shape = (90, 4) if multi else 90
    high = 2 if multi else 4
    labels, predictions = RANDOM.integers(high, size=shape), RANDOM.integers(high, size=shape)
    if multi:
        predictions[:, 2] = 0  # never predicted
    else:
        predictions[predictions == 2] = 1
    rows = class_scores(predictions, labels, names=["a", "b", "c", "d"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = sklearn.precision_recall_fscore_support(labels, predictions)
    for index, row in enumerate(rows):
        got = (row.precision, row.recall, row.f1, row.support)
        assert got == pytest.approx([float(column[index]) for column in expected], abs=1e-9)
    assert rows[2].predicted == 0
    lines = format_report(rows).splitlines()
    assert len(lines) == 7 and lines[1].split()[0] == "a"
    macro = lines[5].split()[2:5]
    assert [float(number) for number in macro] == pytest.approx([np.mean(column) for column in expected[:3]], abs=1e-4)


def test_the_confusion_matrix_equals_scikit_learn():
    labels, predictions = RANDOM.integers(3, size=60), RANDOM.integers(3, size=60)
    assert (confusion_matrix(labels, predictions, 3) == sklearn.confusion_matrix(labels, predictions)).all()


def test_calibration_error_of_known_bins():
    # Two bins: confidence 0.95 with accuracy 0.5, and 0.55 with accuracy 1.
    assert expected_calibration_error([0.95, 0.95, 0.55, 0.55], [1, 0, 1, 1]) == pytest.approx((0.45 + 0.45) / 2)
    assert expected_calibration_error([1.0, 0.0], [1, 0]) == 0


def test_glue_scores():
    matched, mismatched = {"accuracy": 0.8, "f1": 0.1}, {"accuracy": 0.7}
    assert glue_score("mnli", matched, mismatched) == pytest.approx(0.75)
    assert glue_score("mrpc", {"accuracy": 0.9, "f1": 0.7}) == pytest.approx(0.8)
    assert glue_score("cola", {"matthews": -0.1, "accuracy": 1}) == pytest.approx(-0.1)


def ece_by_loop(confidence, correct, bins=15):
    total = 0.0
    for number in range(bins):
        low, high = number / bins, (number + 1) / bins
        members = [i for i, p in enumerate(confidence) if low < p <= high or (number == 0 and p == 0)]
        if members:
            gap = np.mean([confidence[i] for i in members]) - np.mean([float(correct[i]) for i in members])
            total += len(members) / len(confidence) * abs(gap)
    return total


@pytest.mark.parametrize("task", ["single_label", "multi_label", "regression"])
def test_a_diverged_model_gives_nan(task):
    logits = np.array([[1.0, math.nan], [math.inf, 0.0]])[:, : 1 if task == "regression" else 2]
    labels = np.array([[0, 1], [1, 0]]) if task == "multi_label" else np.array([0, 1])
    got = classification_metrics(logits, labels, task=task)
    assert got.keys() == classification_metrics(np.zeros_like(logits), labels, task=task).keys()
    assert all(math.isnan(value) for value in got.values())
