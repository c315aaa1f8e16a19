"""Temperature and thresholds, against an optimizer and a search over all thresholds."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from torchrecipes.evaluation import classification_metrics, fit_temperature, tune_thresholds

RANDOM = np.random.default_rng(0)


def by_lbfgs(logits, labels, task):
    """As Guo et al. do it, but over the logarithm: from 1 to 0.3 their step overshoots to below 0."""
    logits, logarithm = torch.tensor(logits), torch.zeros((), dtype=torch.float64, requires_grad=True)
    settings = {"max_iter": 200, "tolerance_grad": 1e-12, "tolerance_change": 1e-14}
    optimizer = torch.optim.LBFGS([logarithm], line_search_fn="strong_wolfe", **settings)

    def closure():
        optimizer.zero_grad()
        temperature = logarithm.exp()
        if task == "multi_label":
            loss = F.binary_cross_entropy_with_logits(logits / temperature, torch.tensor(labels, dtype=torch.float64))
        else:
            loss = F.cross_entropy(logits / temperature, torch.tensor(labels))
        loss.backward()
        return loss

    optimizer.step(closure)
    return logarithm.exp().item()


@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("task", ["single_label", "multi_label"])
def test_the_temperature_is_the_optimum(task, scale):
    logits = RANDOM.normal(size=(300, 4)) * 2
    if task == "multi_label":
        labels = (RANDOM.random((300, 4)) < 1 / (1 + np.exp(-logits))).astype(int)
    else:
        gumbel = RANDOM.gumbel(size=logits.shape)  # labels drawn with the probabilities of the logits
        labels = (logits + gumbel).argmax(1)
    found = fit_temperature(logits * scale, labels, task)
    assert found == pytest.approx(by_lbfgs(logits * scale, labels, task), rel=1e-5)
    assert found == pytest.approx(scale, rel=0.25)
    before = classification_metrics(logits * scale, labels, task=task)
    after = classification_metrics(logits * scale, labels, task=task, temperature=found)
    assert after["log_loss"] <= before["log_loss"] and after["accuracy"] == before["accuracy"]
    if scale == 5:
        assert after["ece"] < before["ece"] / 2


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (np.eye(3) * 5, np.arange(3)),  # no error: the lower the better
        (np.eye(3) * 5, np.array([1, 2, 0])),  # all wrong: the higher the better
        (np.zeros((4, 3)), np.array([0, 1, 2, 0])),  # no information
        (np.eye(2) * 1e6, np.array([0, 0])),
        (np.full((2, 2), np.nan), np.array([0, 1])),
        (np.zeros((0, 2)), np.zeros(0, int)),
    ],
)
def test_a_temperature_is_never_worse_than_none(logits, labels):
    found = fit_temperature(logits, labels)
    assert 1 / 64 <= found <= 64
    if len(labels) and np.isfinite(logits).all():
        before, after = (classification_metrics(logits, labels, temperature=t)["log_loss"] for t in (1, found))
        assert after <= before
    if not logits.any() or not np.isfinite(logits).all():
        assert found == 1


def test_thresholds_have_the_highest_f1():
    metrics = pytest.importorskip("sklearn.metrics")
    logits = RANDOM.normal(size=(120, 5)).round(1)  # with ties
    labels = (RANDOM.random((120, 5)) < 1 / (1 + np.exp(1.5 - logits))).astype(int)
    thresholds = tune_thresholds(logits, labels)
    probabilities = 1 / (1 + np.exp(-logits))
    for c in range(5):
        scores = [metrics.f1_score(labels[:, c], probabilities[:, c] >= t) for t in probabilities[:, c]]
        found = metrics.f1_score(labels[:, c], probabilities[:, c] >= thresholds[c])
        assert found == pytest.approx(max(scores), abs=1e-12)
        assert not np.isclose(probabilities[:, c], thresholds[c], atol=1e-9).any()  # between two, not on one
    tuned = classification_metrics(logits, labels, task="multi_label", thresholds=thresholds)
    assert tuned["macro_f1"] > classification_metrics(logits, labels, task="multi_label")["macro_f1"]
    cooler = tune_thresholds(logits, labels, temperature=2.0)
    assert cooler == pytest.approx(tune_thresholds(logits / 2, labels))


def test_labels_without_positives_or_negatives_keep_one_half():
    logits = RANDOM.normal(size=(20, 3))
    labels = np.stack([np.zeros(20, int), np.ones(20, int), RANDOM.integers(2, size=20)], 1)
    assert tune_thresholds(logits, labels)[:2].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [([0.95, 0.9, 0.8, 0.6, 0.1], 0.35), ([0.55, 0.3, 0.25, 0.2, 0.1], 0.425)],  # the other one is 0.925, or 0.15
)
def test_of_equally_good_thresholds_the_one_closest_to_one_half(probabilities, expected):
    logits = np.log(np.array(probabilities) / (1 - np.array(probabilities)))[:, None]
    assert tune_thresholds(logits, np.array([1, 0, 0, 1, 0])[:, None])[0] == pytest.approx(expected)
