"""Indexes, against all products in float64."""

import builtins

import numpy as np
import pytest

from torchrecipes.errors import UserError
from torchrecipes.mining import vector_index
from torchrecipes.mining.vector_index import ApproximateIndex, ExactIndex, build_index

RANDOM = np.random.default_rng(0)


def clusters(count, width=24, seed=0):
    """Vectors of length 1 that lie as embeddings do: in groups."""
    random = np.random.default_rng(seed)
    centers = random.normal(size=(60, width))
    vectors = centers[random.integers(60, size=count)] + 0.6 * random.normal(size=(count, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def best(vectors, queries, k):
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), order


def test_exact_search_in_chunks(monkeypatch, tmp_path):
    monkeypatch.setattr(vector_index, "CHUNK", 37)
    vectors, queries = clusters(500), clusters(20, seed=1)
    vectors.tofile(tmp_path / "v")
    mapped = np.memmap(tmp_path / "v", np.float32, "r", shape=vectors.shape)
    scores, numbers = ExactIndex(mapped).search(queries, 15)
    expected_scores, expected = best(vectors, queries, 15)
    assert (numbers == expected).all() and scores == pytest.approx(expected_scores, abs=1e-6)
    scores, numbers = ExactIndex(vectors[:3]).search(queries, 5)
    assert (numbers[:, 3:] == -1).all() and np.isneginf(scores[:, 3:]).all()


@pytest.mark.parametrize("kind", ["faiss", "usearch"])
def test_an_index_finds_most_with_exact_scores(kind):
    pytest.importorskip(kind)
    vectors, queries, lines = clusters(6000), clusters(64, seed=1), []
    index = build_index(vectors, kind, report=lines.append)
    scores, numbers = index.search(queries, 20)
    _, expected = best(vectors, queries, 20)
    found = np.mean([len(np.intersect1d(a, b)) / 20 for a, b in zip(numbers, expected, strict=True)])
    assert found >= 0.95 and index.recall >= 0.95
    assert scores == pytest.approx(np.einsum("qd,qkd->qk", queries, vectors[numbers]), abs=1e-5)
    assert (np.diff(scores, axis=1) <= 0).all()
    assert len(lines) == 2 and "95" not in lines[0]
    scores, numbers = build_index(vectors[:4], kind, report=lines.append).search(queries[:3], 6)
    assert (numbers[:, 4:] == -1).all() and (np.sort(numbers[:, :4]) == np.arange(4)).all()


def test_the_effort_is_raised_until_the_recall_is_there():
    vectors, queries, efforts = clusters(400), clusters(30, seed=1), []

    def find(asked, k, effort):  # looks at the first vectors only
        efforts.append(effort)
        return best(vectors[: effort * 10], asked, min(k, effort * 10))[1]

    index = ApproximateIndex(vectors, find, effort=5, highest=64, report=lambda _: None)
    index.search(queries, 10)
    assert index.recall >= vector_index.RECALL and index.effort == 40
    assert efforts == [5, 10, 20, 40, 40]
    index = ApproximateIndex(vectors, find, effort=5, highest=8, report=lambda _: None)
    index.search(queries, 10)
    assert index.effort == 8 and index.recall < vector_index.RECALL  # reported, and the search continues


def test_auto_is_exact_for_few_vectors(monkeypatch):
    assert isinstance(build_index(clusters(50)), ExactIndex)
    monkeypatch.setattr(vector_index, "EXACT_BELOW", 40)
    monkeypatch.setattr(vector_index, "_installed", lambda: "exact")
    lines = []
    assert isinstance(build_index(clusters(50), report=lines.append), ExactIndex) and "index" in lines[0]


def test_a_package_that_is_missing(monkeypatch):
    real = builtins.__import__
    monkeypatch.setattr(vector_index.importlib, "import_module", lambda name: real("no_such_package_here"))
    with pytest.raises(UserError) as error:
        build_index(clusters(50), "faiss")
    assert error.value.code == "missing_package" and "torchrecipes[index]" in error.value.hint
