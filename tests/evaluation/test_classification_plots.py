"""The pictures are there and show what they should."""

import sys

import numpy as np
import pytest

from torchrecipes.errors import UserError
from torchrecipes.evaluation import confusion_matrix, plot_calibration, plot_confusion_matrix

image = pytest.importorskip("matplotlib.image")
RANDOM = np.random.default_rng(0)


def colors(path):
    return len(np.unique((image.imread(path) * 255).astype(np.uint8).view(np.uint32)))


@pytest.mark.parametrize("classes", [2, 45])
def test_a_confusion_matrix(tmp_path, classes):
    labels, predictions = RANDOM.integers(classes, size=200), RANDOM.integers(classes, size=200)
    names = [f"a name with $ and a lot of other characters {number}" for number in range(classes)]
    path = tmp_path / "new" / "matrix.png"
    plot_confusion_matrix(confusion_matrix(labels, predictions, classes), names, path)
    assert path.read_bytes()[:4] == b"\x89PNG" and colors(path) > 50


def test_a_class_that_never_occurs(tmp_path):
    plot_confusion_matrix(np.array([[0, 0], [1, 3]]), ["a", "b"], tmp_path / "matrix.png")
    assert colors(tmp_path / "matrix.png") > 20


@pytest.mark.parametrize(("task", "temperature"), [("single_label", 1.0), ("single_label", 2.0), ("multi_label", 0.7)])
def test_a_calibration_plot(tmp_path, task, temperature):
    logits = RANDOM.normal(size=(100, 3)) * 3
    labels = RANDOM.integers(2, size=(100, 3)) if task == "multi_label" else RANDOM.integers(3, size=100)
    path = tmp_path / "calibration.png"
    plot_calibration(logits, labels, path, task=task, temperature=temperature)
    assert colors(path) > 50


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError) as error:
        plot_confusion_matrix(np.eye(2, dtype=int), ["a", "b"], tmp_path / "matrix.png")
    assert error.value.code == "missing_package" and "torchrecipes[plot]" in error.value.hint


def test_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as error:
        plot_confusion_matrix(np.eye(2, dtype=int), ["a", "b"], tmp_path / "file" / "matrix.png")
    assert error.value.code == "not_writable"
