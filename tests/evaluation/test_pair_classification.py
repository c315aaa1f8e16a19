"""`PairClassification`, against scikit-learn and a loop over all thresholds."""

from types import SimpleNamespace

import numpy as np
import pytest

from tests.evaluation.encoders import HashEncoder
from torchrecipes.errors import UserError
from torchrecipes.evaluation import PairClassification
from torchrecipes.evaluation.pair_classification import best_thresholds

metrics = pytest.importorskip("sklearn.metrics")


def pairs(labels):
    return [
        SimpleNamespace(texts=(f"a {i}", f"b {i}"), values=(), label=label, source=f"x:{i}")
        for i, label in enumerate(labels)
    ]


def test_average_precision_and_thresholds():
    labels = np.random.default_rng(2).integers(2, size=80)
    data, encoder = pairs(labels.tolist()), HashEncoder(4)
    results = PairClassification(data)(encoder, dims=(2,))
    first, second = (encoder.encode([pair.texts[side] for pair in data]) for side in (0, 1))
    for suffix, dim in (("", 4), ("_dim2", 2)):
        a, b = first[:, :dim].astype(np.float64), second[:, :dim].astype(np.float64)
        cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert results[f"average_precision{suffix}"] == pytest.approx(metrics.average_precision_score(labels, cosines))
        for name, score in (("accuracy", metrics.accuracy_score), ("f1", metrics.f1_score)):
            everything = [score(labels, cosines >= t) for t in (*cosines, 2)]
            assert results[f"{name}{suffix}"] == pytest.approx(max(everything))
            at_threshold = score(labels, cosines >= results[f"{name}_threshold{suffix}"])
            assert at_threshold == pytest.approx(max(everything))


def test_a_threshold_lies_between_two_scores():
    found = best_thresholds(np.array([0.9, 0.2, 0.7, -0.4]), np.array([1, 0, 1, 1]))
    expected = {"accuracy": 0.75, "accuracy_threshold": 0.45, "f1": 6 / 7, "precision": 0.75, "recall": 1.0}
    assert found == pytest.approx(expected | {"f1_threshold": -0.4})


def test_thresholds_equal_those_of_sentence_transformers():
    evaluation = pytest.importorskip("sentence_transformers.sentence_transformer.evaluation")
    theirs = evaluation.BinaryClassificationEvaluator
    random = np.random.default_rng(3)
    for count in (1, 2, 5, 40):
        for _ in range(20):
            scores = (random.integers(-8, 8, size=count) / 8).astype(np.float32)
            labels = random.integers(2, size=count)
            labels[0] = 1
            accuracy, accuracy_threshold = theirs.find_best_acc_and_threshold(scores, labels, True)
            f1, precision, recall, f1_threshold = theirs.find_best_f1_and_threshold(scores, labels, True)
            expected = {"accuracy": accuracy, "accuracy_threshold": accuracy_threshold, "f1": f1}
            expected |= {"f1_threshold": f1_threshold, "precision": precision, "recall": recall}
            assert best_thresholds(scores, labels) == pytest.approx(expected, abs=1e-6)


def test_labels_may_be_names_or_scores():
    labels = ["ENTAILMENT", "NEUTRAL", "ENTAILMENT", "CONTRADICTION"]
    named = PairClassification(pairs(labels), positive_label="ENTAILMENT")(HashEncoder())
    assert named == PairClassification(pairs([1, 0, 1, 0]))(HashEncoder())
    assert named == PairClassification(pairs(["1", "0", "1", "0"]))(HashEncoder())
    scored = [
        SimpleNamespace(texts=p.texts, values=(float(p.label),), label=None, source="") for p in pairs([1, 0, 1, 0])
    ]
    assert named == PairClassification(scored)(HashEncoder())


@pytest.mark.parametrize(
    ("data", "code"),
    [([], "no_examples"), (pairs([1, 1]), "one_class"), (pairs([1, 2]), "not_labeled_pairs")],
)
def test_what_cannot_be_evaluated(data, code):
    with pytest.raises(UserError) as error:
        PairClassification(data)(HashEncoder())
    assert error.value.code == code
