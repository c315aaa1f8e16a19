"""Hashes of words, n-grams, signatures and bands, against sets of strings."""

import re
import sys

import numpy as np
import pytest

from torchrecipes.data.cleaning import band_keys, estimated_jaccard, minhash
from torchrecipes.data.cleaning.ngrams import hash_words, ngram_hashes
from torchrecipes.data.cleaning.signatures import BANDS, NOTHING, ROWS

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the quick cat naps.",
    "the QUICK brown-fox jumps_over",
    "",
    "one",
    "!!! ...",
    "Grüße aus Österreich: naïve façade e\u0301tude 42 x2",
    "हिन्दी के शब्द",
    "日本語の文章 and English",
]


def ngrams_of(text, n):
    """The n-grams as tuples of words, or all words where there are fewer."""
    words = [word for run in re.findall(r"[\w\u0300-\u036f\u0900-\u097f]+", text.lower()) for word in split(run)]
    return [tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))] if words else []


def split(run):
    return re.findall(r"[\u3040-\u9fff]|[^\u3040-\u9fff]+", run)


@pytest.mark.parametrize("n", [1, 2, 5, 13])
def test_ngrams_are_those_of_a_loop(n):
    words = hash_words(TEXTS)
    hashes, offsets = ngram_hashes(words, n)
    wanted = [ngrams_of(text, n) for text in TEXTS]
    assert np.diff(offsets).tolist() == [len(ngrams) for ngrams in wanted]
    flat = [ngram for ngrams in wanted for ngram in ngrams]
    by_ngram = {}
    for ngram, value in zip(flat, hashes.tolist(), strict=True):
        assert by_ngram.setdefault(ngram, value) == value
    assert len(set(by_ngram.values())) == len(by_ngram)


def test_a_hash_does_not_depend_on_what_is_around():
    together = hash_words(TEXTS)
    apart = np.concatenate([hash_words([text]).hashes for text in TEXTS])
    assert np.array_equal(together.hashes, apart)
    # A constant of the file format: signatures of jobs on several machines are compared.
    assert hex(int(hash_words(["fox"]).hashes[0])) == hex(int(hash_words(["a Fox!"]).hashes[1]))


def random_texts(count, rng, length=(20, 400)):
    vocabulary = np.array([f"w{number}" for number in range(3_000)])
    return [" ".join(rng.choice(vocabulary, rng.integers(*length))) for _ in range(count)]


def test_signatures_do_not_depend_on_the_batch(monkeypatch):
    texts = [
        *random_texts(30, np.random.default_rng(0)),
        "",
        *TEXTS,
        random_texts(1, np.random.default_rng(1), (900, 901))[0],
    ]
    apart = np.concatenate([minhash([text]) for text in texts])
    assert np.array_equal(minhash(texts), apart)
    module = sys.modules[minhash.__module__]  # the package has a function of the same name
    monkeypatch.setattr(module, "_TILE", 64)
    monkeypatch.setattr("torchrecipes.data.cleaning.ngrams.BATCH_CHARACTERS", 500)
    assert np.array_equal(minhash(texts), apart)
    assert (apart[texts.index("")] == NOTHING).all() and minhash([]).shape == (0, 128)


def test_the_estimate_is_unbiased_and_as_exact_as_128_permutations_allow():
    rng = np.random.default_rng(0)
    errors = []
    for text in random_texts(60, rng, (150, 400)):
        words = text.split()
        start = int(rng.integers(0, len(words) // 2))
        other = words[:start] + [f"new{i}" for i in rng.integers(0, 1 << 30, rng.integers(1, 60))] + words[start:]
        first, second = set(ngrams_of(text, 5)), set(ngrams_of(" ".join(other), 5))
        exact = len(first & second) / len(first | second)
        estimate = estimated_jaccard(*minhash([text, " ".join(other)]))
        errors.append((estimate - exact) / np.sqrt(max(exact * (1 - exact), 1e-3) / 128))
    assert abs(np.mean(errors)) < 0.4 and 0.7 < np.std(errors) < 1.3


def test_band_keys_agree_when_the_rows_of_a_band_do():
    signatures = np.random.default_rng(0).integers(0, 1 << 63, (3, 128)).astype(np.uint64)
    signatures[1, ROWS : 2 * ROWS] = signatures[0, ROWS : 2 * ROWS]
    signatures[2] = NOTHING
    keys = band_keys(signatures)
    assert keys.shape == (BANDS, 3) and np.flatnonzero(keys[:, 0] == keys[:, 1]).tolist() == [1]
    assert (keys[:, 2] == 0).all() and (keys[:, :2] != 0).all()
