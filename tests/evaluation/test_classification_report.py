"""The end of a classifier's training."""

import numpy as np
import pytest
from scipy.special import expit

from torchrecipes.evaluation import calibrate, classification_metrics, report_classification

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(400, 3)) * 5
NAMES = ["red", "green", "blue"]


def test_one_label_gets_a_temperature_that_lowers_the_loss():
    labels = np.array([RNG.choice(3, p=np.exp(row) / np.exp(row).sum()) for row in LOGITS / 4])  # 4 times too sure
    found = calibrate(LOGITS, labels)
    assert found.keys() == {"temperature"} and found["temperature"] == pytest.approx(4, rel=0.2)
    before, after = classification_metrics(LOGITS, labels), classification_metrics(LOGITS, labels, **found)
    assert after["log_loss"] < before["log_loss"] and after["accuracy"] == before["accuracy"]


def test_several_labels_get_thresholds_for_the_probabilities_of_the_temperature():
    labels = (RNG.random((400, 3)) < expit(LOGITS / 4 - 1)).astype(np.float32)
    found = calibrate(LOGITS, labels, task="multi_label")
    assert found["temperature"] > 1.5 and len(found["thresholds"]) == 3
    tuned = classification_metrics(LOGITS, labels, task="multi_label", **found)
    for change in (-0.15, 0.15):
        moved = found | {"thresholds": [value + change for value in found["thresholds"]]}
        assert tuned["macro_f1"] > classification_metrics(LOGITS, labels, task="multi_label", **moved)["macro_f1"]


def test_a_number_needs_no_calibration():
    assert calibrate(LOGITS[:, :1], LOGITS[:, 0], task="regression") == {}


def test_pictures_and_a_table_for_every_set(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    labels = LOGITS.argmax(1)
    labels[:40] = (labels[:40] + 1) % 3
    report_classification(tmp_path, {"validation": (LOGITS, labels), "test": (LOGITS, labels)}, NAMES, temperature=2.0)
    sets = ("validation", "test")
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{kind}_{name}.png" for kind in ("confusion_matrix", "calibration") for name in sets
    }
    printed = capsys.readouterr().out
    assert printed.count("blue") == 2 and "test:" in printed


def test_several_labels_have_no_confusion_matrix(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    labels = (LOGITS > 1).astype(np.float32)
    thresholds = expit(np.full(3, 1.0))
    sets = {"validation": (LOGITS, labels)}
    report_classification(tmp_path, sets, NAMES, task="multi_label", thresholds=thresholds)
    assert [path.name for path in tmp_path.iterdir()] == ["calibration_validation.png"]
    assert capsys.readouterr().out.count("1.0000") >= 9  # these thresholds make no mistake


def test_without_matplotlib_there_is_a_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    report_classification(tmp_path, {"validation": (LOGITS, LOGITS.argmax(1))}, NAMES)
    printed = capsys.readouterr().out
    assert "green" in printed and "matplotlib" in printed and not list(tmp_path.iterdir())


def test_a_regression_has_nothing_to_report(tmp_path, capsys):
    report_classification(tmp_path, {"validation": (LOGITS[:, :1], LOGITS[:, 0])}, ["score"], task="regression")
    assert not capsys.readouterr().out and not list(tmp_path.iterdir())
