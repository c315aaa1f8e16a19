"""`select_negatives`, against a loop."""

import numpy as np
import pytest

from torchrecipes.errors import UserError
from torchrecipes.mining import NegativeRules
from torchrecipes.mining.selection import RULES, select_negatives


def by_loop(rules, numbers, scores, positive, excluded):
    """What may be chosen of one example's candidates: their places."""
    rank, places, removed = -1, [], dict.fromkeys(RULES, 0)
    for place, (number, score, kind) in enumerate(zip(numbers, scores, excluded, strict=True)):
        if number < 0:
            continue
        if kind:
            removed["positive" if kind == 1 else "query"] += 1
            continue
        rank += 1
        if rank >= rules.range[1]:
            continue
        if rank < rules.range[0]:
            removed["rank"] += 1
        elif rules.absolute_margin is not None and score > positive - rules.absolute_margin:
            removed["absolute_margin"] += 1
        elif rules.relative_margin is not None and score > positive - rules.relative_margin * abs(positive):
            removed["relative_margin"] += 1
        elif rules.max_score is not None and score > rules.max_score:
            removed["max_score"] += 1
        elif rules.min_score is not None and score < rules.min_score:
            removed["min_score"] += 1
        else:
            places.append(place)
    return places, removed


def candidates(n=40, k=30, seed=0):
    random = np.random.default_rng(seed)
    scores = -np.sort(-random.uniform(-1, 1, size=(n, k)), axis=1).astype(np.float32)
    numbers = np.stack([random.permutation(100)[:k] for _ in range(n)])
    numbers[5, 20:], scores[5, 20:] = -1, -np.inf
    return numbers, scores, random.uniform(-1, 1, n).astype(np.float32), random.choice(3, (n, k), p=[0.8, 0.15, 0.05])


SETTINGS = [
    {"range": (0, 30)},
    {"range": (3, 12), "num_negatives": 4},
    {"range": (0, 30), "absolute_margin": 0.2},
    {"range": (2, 25), "relative_margin": 0.3},
    {"range": (0, 30), "max_score": 0.4, "min_score": -0.3},
    {"range": (1, 20), "absolute_margin": 0.05, "relative_margin": 0.1, "max_score": 0.9, "min_score": -0.9},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_top_equals_a_loop(settings):
    numbers, scores, positive, excluded = candidates()
    rules = NegativeRules(**settings)
    places, counts = select_negatives(rules, numbers, scores, positive, excluded, np.arange(40))
    total = dict.fromkeys(RULES, 0)
    for row in range(40):
        allowed, removed = by_loop(rules, numbers[row], scores[row], float(positive[row]), excluded[row])
        assert [place for place in places[row] if place >= 0] == allowed[: rules.num_negatives]
        total = {rule: total[rule] + removed[rule] for rule in RULES}
    assert dict(zip(RULES, counts.tolist(), strict=True)) == total


@pytest.mark.parametrize("settings", SETTINGS)
def test_random_takes_what_is_allowed(settings):
    numbers, scores, positive, excluded = candidates()
    rules = NegativeRules(**settings, strategy="random", seed=3)
    places, _ = select_negatives(rules, numbers, scores, positive, excluded, np.arange(40))
    different = 0
    for row in range(40):
        allowed, _ = by_loop(rules, numbers[row], scores[row], float(positive[row]), excluded[row])
        chosen = [place for place in places[row].tolist() if place >= 0]
        assert set(chosen) <= set(allowed) and len(chosen) == min(len(allowed), rules.num_negatives)
        assert chosen == sorted(chosen)  # by falling score
        different += chosen != allowed[: rules.num_negatives]
    assert different > 5


def test_random_depends_on_the_seed_and_the_example_only():
    numbers, scores, positive, excluded = candidates()

    def choose(seed, rows, first=0):
        rules = NegativeRules(range=(0, 30), strategy="random", seed=seed)
        rows = slice(rows.start, rows.stop)
        args = (numbers[rows], scores[rows], positive[rows], excluded[rows], np.arange(rows.start, rows.stop))
        return select_negatives(rules, *args)[0].tolist()

    everything = choose(0, slice(0, 40))
    assert choose(0, slice(0, 11)) + choose(0, slice(11, 40)) == everything
    assert choose(1, slice(0, 40)) != everything


def test_random_is_uniform():
    n = 4000
    numbers, scores = np.tile(np.arange(6), (n, 1)), np.tile(np.linspace(0.9, 0.4, 6, dtype=np.float32), (n, 1))
    rules = NegativeRules(range=(0, 6), num_negatives=2, strategy="random")
    places, _ = select_negatives(rules, numbers, scores, np.ones(n), np.zeros((n, 6), int), np.arange(n))
    shares = np.bincount(places.ravel(), minlength=6) / places.size
    assert np.abs(shares - 1 / 6).max() < 0.02


def test_the_relative_margin_keeps_its_direction_below_zero():
    """(1 - margin) * positive would be -0.19 here, above the positive, and let everything through."""
    numbers, scores = np.arange(4)[None], np.array([[-0.1, -0.195, -0.205, -0.3]], np.float32)
    rules = NegativeRules(range=(0, 4), num_negatives=4, relative_margin=0.05)
    places, _ = select_negatives(rules, numbers, scores, np.array([-0.2]), np.zeros((1, 4), int), np.arange(1))
    assert places.tolist() == [[3, -1, -1, -1]]  # at most -0.21


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"num_negatives": 0}, "num_negatives"),
        ({"range": (10, 12)}, "range"),
        ({"range": (-1, 12)}, "range"),
        ({"relative_margin": -0.1}, "relative_margin"),
        ({"absolute_margin": float("nan")}, "absolute_margin"),
        ({"max_score": float("inf")}, "max_score"),
        ({"max_score": 0.1, "min_score": 0.2}, "min_score"),
        ({"strategy": "best"}, "strategy"),
    ],
)
def test_values_out_of_range(settings, key):
    with pytest.raises(UserError) as error:
        NegativeRules(**settings)
    assert (error.value.key, error.value.code) == (key, "out_of_range")
