"""`STS`, against SciPy."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from tests.evaluation.encoders import HashEncoder
from torchrecipes.errors import UserError
from torchrecipes.evaluation import STS

stats = pytest.importorskip("scipy.stats")


def pairs(count=60):
    random = np.random.default_rng(1)
    return [
        SimpleNamespace(
            texts=(f"a {i % 7}", f"b {i % 11}"), values=(float(random.integers(6)),), label=None, source="x:1"
        )
        for i in range(count)
    ]


def test_it_equals_scipy_at_every_dimension():
    encoder, data = HashEncoder(), pairs()
    results = STS(data)(encoder, dims=(4, 8))
    assert encoder.calls == [("", 18)]  # equal sentences once
    first, second = (encoder.encode([pair.texts[side] for pair in data]).astype(np.float64) for side in (0, 1))
    scores = [pair.values[0] for pair in data]
    for suffix, dim in (("", 16), ("_dim4", 4), ("_dim8", 8)):
        a, b = first[:, :dim], second[:, :dim]
        cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert results[f"spearman{suffix}"] == pytest.approx(stats.spearmanr(cosines, scores)[0], abs=1e-9)
        assert results[f"pearson{suffix}"] == pytest.approx(stats.pearsonr(cosines, scores)[0], abs=1e-9)
    assert len(results) == 6


def test_by_dot_product():
    encoder, data = HashEncoder(), pairs()
    first, second = (encoder.encode([pair.texts[side] for pair in data]).astype(np.float64) for side in (0, 1))
    expected = stats.pearsonr((first * second).sum(1), [pair.values[0] for pair in data])[0]
    assert STS(data, similarity="dot")(encoder)["pearson"] == pytest.approx(expected, abs=1e-9)


def test_ties_in_cosines_share_their_rank():
    class Two:
        def encode(self, texts, prompt=""):
            return np.array([[1, 0] if text == "a" else [0, 1] for text in texts], np.float32)

    data = [SimpleNamespace(texts=texts, values=(v,), label=None, source="") for texts, v in DATA]
    cosines, scores = [1, 0, 1, 0, 0], [v for _, v in DATA]
    assert STS(data)(Two())["spearman"] == pytest.approx(stats.spearmanr(cosines, scores)[0], abs=1e-9)


DATA = [(("a", "a"), 3.0), (("a", "b"), 1.0), (("a", "a"), 3.0), (("b", "a"), 2.0), (("a", "b"), 0.0)]


def test_a_diverged_model_gives_nan():
    class Broken(HashEncoder):
        def encode(self, texts, prompt=""):
            return super().encode(texts) * np.nan

    assert all(math.isnan(value) for value in STS(pairs())(Broken(), dims=(8,)).values())


@pytest.mark.parametrize(
    ("data", "dims", "code"),
    [
        ([], (), "no_examples"),
        ([SimpleNamespace(texts=("a", "b"), values=(), label=None, source="x:1")], (), "not_scored_pairs"),
        ([SimpleNamespace(texts=("a", text), values=(1.0,), source="") for text in "bcd"], (), "one_score"),
        (pairs(), (17,), "out_of_range"),
        (pairs(), (0,), "out_of_range"),
    ],
)
def test_what_cannot_be_evaluated(data, dims, code):
    with pytest.raises(UserError) as error:
        STS(data)(HashEncoder(), dims=dims)
    assert error.value.code == code
