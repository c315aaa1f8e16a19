"""n-grams against a loop in float64 that knows nothing of sorted keys."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from torchrecipes.evaluation import ngrams as module
from torchrecipes.evaluation.ngrams import NGramModel

CLS, SEP = 0, 1
SPECIAL, VOCAB = [CLS, SEP, 2], 8


def make_corpus(documents):
    tokens = np.array([token for document in documents for token in document], dtype=np.uint16)
    starts = np.cumsum([0, *map(len, documents)])

    def boundaries(start, stop):
        return starts[(starts > start) & (starts < stop)]

    return SimpleNamespace(
        num_tokens=len(tokens), read=lambda start, stop: tokens[start:stop], boundaries=boundaries, documents=documents
    )


def make_documents(count, seed=0):
    rng = np.random.default_rng(seed)
    # Skewed, so that some contexts are frequent and others are never seen.
    shares = np.array([0.5, 0.25, 0.15, 0.09, 0.01])
    return [[CLS, *rng.choice(np.arange(3, 8), rng.integers(0, 9), p=shares).tolist(), SEP] for _ in range(count)]


def counted(documents, order):
    counts = Counter()
    for document in documents:
        for end, token in enumerate(document):
            if token not in SPECIAL:
                padded = [None] * order + document[: end + 1]
                for length in range(1, order + 1):
                    counts[tuple(padded[-length:])] += 1
    return counts


def witten_bell(counts, context, token):
    """The textbook's recursion, from the longest context down."""
    after = {w: counts[(*context, w)] for w in range(3, 8) if counts[(*context, w)]}
    lower = witten_bell(counts, context[1:], token) if context else 1 / 5
    if not after:
        return lower
    return (after.get(token, 0) + len(after) * lower) / (sum(after.values()) + len(after))


@pytest.mark.parametrize("pieces", [False, True])
def test_probabilities_equal_a_loop(monkeypatch, pieces):
    if pieces:  # a corpus larger than a piece: documents that cross its ends keep their contexts
        monkeypatch.setattr(module, "CHUNK", 7)
    # After 4 it is nearly always 3, after (7, 4) it has never been: yet 3 is the most probable there, too.
    documents = [*make_documents(60), *[[CLS, 4, 3, SEP]] * 40, [CLS, 7, 4, 5, SEP], [CLS, 7, 4, 6, SEP]]
    corpora = [make_corpus(documents[:40]), make_corpus(documents[40:])]
    order = 4
    model = NGramModel.train(corpora, order, SPECIAL, VOCAB)
    counts = counted(documents, order)

    held_out = [*make_documents(12, seed=1), [CLS, 7, 4, 3, SEP]]
    rows = torch.tensor([token for document in held_out for token in document])[None]
    position_ids = torch.cat([torch.arange(len(document)) for document in held_out])[None]
    targets = torch.tensor([i for i, token in enumerate(rows[0].tolist()) if token not in SPECIAL])
    labels = rows[0, targets]
    hidden = rows.clone()
    hidden[0, targets] = 2  # [MASK]: the context is of true tokens
    unused = torch.tensor([0])
    windows = model.windows(
        hidden, position_ids, torch.cat([targets, unused]), torch.cat([labels, torch.tensor([-100])])
    ).numpy()
    assert windows[-1] == -1 and model.last_tokens(windows[:-1]).tolist() == labels.tolist()

    for length, (probability, best) in enumerate(model.score(windows[:-1]), start=1):
        number = 0
        for document in held_out:
            for end, token in enumerate(document):
                if token not in SPECIAL:
                    context = tuple(([None] * order + document[:end])[1 - length :]) if length > 1 else ()
                    shares = {w: witten_bell(counts, context, w) for w in range(3, 8)}
                    assert sum(shares.values()) == pytest.approx(1)
                    assert probability[number] == pytest.approx(shares[token], rel=1e-12)
                    assert shares[best[number]] == pytest.approx(max(shares.values()), rel=1e-12)
                    number += 1
        assert number == len(probability)
    assert length == order and model.num_tokens == sum(counts[(w,)] for w in range(3, 8))


def test_a_large_corpus_is_read_in_evenly_spaced_pieces(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 10)
    pieces = module._pieces(1000, 50)
    assert len(pieces) == 5 and pieces[0] == (0, 10) and pieces[-1] == (990, 1000)
    assert module._pieces(45, 50) == [(0, 10), (10, 20), (20, 30), (30, 40), (40, 45)]


def test_what_was_never_seen():
    model = NGramModel.train([make_corpus([[CLS, SEP]])], 3, SPECIAL, VOCAB)
    probability, _ = list(model.score(np.array([5])))[-1]
    assert model.num_tokens == 0 and probability == pytest.approx([1 / 5])
    with pytest.raises(ValueError, match="63 bits"):
        NGramModel.train([make_corpus([[CLS, 3]])], 5, SPECIAL, 10_000)
