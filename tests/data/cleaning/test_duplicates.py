"""Clusters of duplicates against exact Jaccard similarities and all pairs of signatures."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from torchrecipes.data.cleaning import band_keys, duplicates, estimated_jaccard, find_duplicates, minhash
from torchrecipes.data.cleaning.duplicates import PieceFiles, sort_keys
from torchrecipes.data.cleaning.ngrams import hash_words, ngram_hashes


def write_piece(prefix, texts):
    signatures = minhash(texts)
    bands, band_order = sort_keys(band_keys(signatures))
    hashes = np.array([[hash(text) & 0xFFFFFFFF, hash(text) >> 32 & 0xFFFFFFFF] for text in texts], np.uint64)
    hashes = (hashes << np.uint64(32)).reshape(-1, 2).T
    high, hash_order = sort_keys(hashes[:1])
    arrays = {
        "signatures": signatures,
        "bands": bands,
        "band_order": band_order,
        "hashes": np.stack([high[0], hashes[1][hash_order[0]]]),
        "hash_order": hash_order,
    }
    for name, array in arrays.items():
        np.save(f"{prefix}.{name}.npy", array)
    return PieceFiles(len(texts), prefix)


def corpus(rng, originals=120, copies=90):
    """Texts, some of which are earlier ones with some words replaced, appended or cut."""
    vocabulary = np.array([f"word{number}" for number in range(2_000)])
    texts = [" ".join(rng.choice(vocabulary, rng.integers(8, 300))) for _ in range(originals)]
    for _ in range(copies):
        words = texts[rng.integers(0, len(texts))].split()
        for _ in range(rng.integers(0, 4)):
            words[rng.integers(0, len(words))] = "changed"
        texts.append(" ".join(words[: len(words) - rng.integers(0, 4)]))
    return [*texts, "", "...", "!"]


def clusters_of(pairs, count):
    """The first member of the cluster of each of `count` documents, where `pairs` are joined."""
    first = list(range(count))
    changed = True
    while changed:
        changed = False
        for one, other in pairs:
            low = min(first[one], first[other])
            if first[one] != low or first[other] != low:
                first[one] = first[other] = low
                changed = True
    return first


@pytest.mark.parametrize("limits", [(1 << 21, 1 << 15), (40, 8)])
def test_near_duplicates_are_those_of_all_pairs(tmp_path, monkeypatch, limits):
    monkeypatch.setattr(duplicates, "PARTITION_ROWS", limits[0])
    monkeypatch.setattr(duplicates, "CHUNK", limits[1])
    texts = corpus(np.random.default_rng(0))
    order = np.random.default_rng(1).permutation(len(texts))
    texts = [texts[number] for number in order]
    cuts = [0, 50, 50, 120, len(texts)]
    pieces = [write_piece(tmp_path / str(n), texts[a:b]) for n, (a, b) in enumerate(pairwise(cuts))]
    found = find_duplicates(pieces, exact=False, jaccard=0.8)
    signatures = minhash(texts)
    has_words = [any(character.isalnum() for character in text) for text in texts]
    similar = [
        pair
        for pair in combinations(range(len(texts)), 2)
        if has_words[pair[0]] and has_words[pair[1]] and estimated_jaccard(*signatures[list(pair)]) >= 0.8
    ]
    assert len(similar) > 50
    assert found.first.tolist() == clusters_of(similar, len(texts))
    assert not found.exact.any()


def test_recall_and_precision_against_exact_jaccard(tmp_path):
    texts = corpus(np.random.default_rng(2), 200, 200)
    ngrams, offsets = ngram_hashes(hash_words(texts), 5)
    sets = [set(ngrams[a:b].tolist()) for a, b in pairwise(offsets)]
    exact = {}
    for one, other in combinations(range(len(texts)), 2):
        if sets[one] and (both := len(sets[one] & sets[other])):
            exact[one, other] = both / len(sets[one] | sets[other])
    found = find_duplicates([write_piece(tmp_path / "0", texts)], exact=False).first
    clear = [pair for pair, jaccard in exact.items() if jaccard >= 0.9]
    assert len(clear) > 50 and all(found[one] == found[other] for one, other in clear)
    joined = clusters_of([pair for pair, jaccard in exact.items() if jaccard >= 0.65], len(texts))
    assert all(joined[number] == joined[first] for number, first in enumerate(found.tolist()))


@pytest.mark.parametrize("rows", [1 << 21, 20])
def test_exact_duplicates_come_first_and_the_first_is_kept(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(duplicates, "PARTITION_ROWS", rows)
    rng = np.random.default_rng(0)
    texts = [f"text {number} of a few words more" for number in rng.integers(0, 40, 100)]
    found = find_duplicates([write_piece(tmp_path / str(n), texts[n::1][:50]) for n in (0, 50)], jaccard=None)
    wanted = [texts.index(text) for text in texts]
    assert found.first.tolist() == wanted
    assert found.exact.tolist() == [first != number for number, first in enumerate(wanted)]


def test_a_chain_is_one_cluster_even_where_its_ends_differ(tmp_path):
    words = [f"w{number}" for number in range(200)]
    texts = [" ".join(words[step : step + 150]) for step in range(0, 45, 5)]
    signatures = minhash(texts)
    assert estimated_jaccard(signatures[0], signatures[-1]) < 0.7
    assert find_duplicates([write_piece(tmp_path / "0", texts)]).first.tolist() == [0] * len(texts)


def test_no_documents(tmp_path):
    assert find_duplicates([]).first.tolist() == []
    assert find_duplicates([write_piece(tmp_path / "0", [])]).first.tolist() == []
