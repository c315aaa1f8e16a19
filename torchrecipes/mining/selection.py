"""Which of the passages that a model finds for a query become its negatives."""

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from torchrecipes.data.batching.shuffle import fold_in
from torchrecipes.errors import UserError

RULES = ("positive", "query", "rank", "absolute_margin", "relative_margin", "max_score", "min_score")


@dataclass(frozen=True)
class NegativeRules:
    """Which candidates may be negatives, and how many of them are taken.

    With `p` the score of the positive and `s` that of a candidate, a candidate stays where all of these hold that are
    set. They keep their direction where scores are negative.

        absolute_margin   s <= p - absolute_margin
        relative_margin   s <= p - relative_margin * |p|
        max_score         s <= max_score
        min_score         s >= min_score

    A relative margin of 0.05 is the "95 % of the positive" of NV-Retriever (Moreira et al. 2024, arXiv 2407.15831) for
    positive scores. `s <= (1 - m) p`, as it is often written, would let candidates through that score higher than the
    positive where p < 0.

    Args:
        range: ranks that are candidates, from the first up to but without the second; the best passage that is no
            positive has rank 0. (10, 50) leaves out the ten best, which often are positives without a label.
        num_negatives: negatives per example, at most.
        absolute_margin: in units of the score; None: no such rule.
        relative_margin: a share of the positive's score; None: no such rule.
        max_score: None: no such rule.
        min_score: None: no such rule.
        strategy: `top` takes the candidates with the highest scores, `random` any, with equal probability.
        seed: of the random choice, which depends on it and the number of the example only.

    Raises:
        UserError: a value is out of range (code `out_of_range`).
    """

    range: tuple[int, int] = (10, 50)
    num_negatives: int = 5
    absolute_margin: float | None = None
    relative_margin: float | None = None
    max_score: float | None = None
    min_score: float | None = None
    strategy: Literal["top", "random"] = "top"
    seed: int = 0

    def __post_init__(self) -> None:
        first, last = self.range
        if self.num_negatives < 1:
            raise UserError(f"{self.num_negatives} is not 1 or more", key="num_negatives", code="out_of_range")
        if first < 0 or last - first < self.num_negatives:
            problem = f"ranks {first} to {last} do not hold {self.num_negatives} candidates"
            hint = "Give two ranks that are further apart, as in 10 50."
            raise UserError(problem, key="range", hint=hint, code="out_of_range")
        for key in ("absolute_margin", "relative_margin"):
            margin = getattr(self, key)
            if margin is not None and not margin >= 0:
                raise UserError(f"{margin} is not 0 or more", key=key, code="out_of_range")
        if self.strategy not in ("top", "random"):
            raise UserError(f"{self.strategy!r} is not one of top, random", key="strategy", code="out_of_range")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not np.isfinite(value):
                raise UserError(f"{value} is not a number", key=field.name, code="out_of_range")
        if None not in (self.min_score, self.max_score) and self.min_score > self.max_score:
            problem = f"{self.min_score} is above max_score, {self.max_score}: no candidate is left"
            raise UserError(problem, key="min_score", code="out_of_range")


def select_negatives(
    rules: NegativeRules,
    numbers: np.ndarray,
    scores: np.ndarray,
    positive_scores: np.ndarray,
    excluded: np.ndarray,
    examples: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return which candidates become negatives, and how many each rule has removed.

    Args:
        rules: which may.
        numbers: `[n, K]` passages per example, by falling score of the search; -1: none.
        scores: `[n, K]` float32, by which the rules judge.
        positive_scores: `[n]` float32.
        excluded: `[n, K]` int: 0 a candidate, 1 a positive of the query, 2 the query itself.
        examples: `[n]` int64: the number of every example in the data, for the random choice.

    Returns:
        `[n, num_negatives]` int64: places among the K, by falling score; -1: no more. And `[len(RULES)]` int64 counts:
        a candidate counts for the first rule that removes it.
    """
    first, last = rules.range
    there = (numbers >= 0) & np.isfinite(scores)
    candidate = there & (excluded == 0)
    rank = np.cumsum(candidate, axis=1) - 1
    positive = positive_scores[:, None].astype(np.float64)
    s = scores.astype(np.float64)
    removed = {
        "positive": there & (excluded == 1),
        "query": there & (excluded == 2),
        "rank": candidate & (rank < first),
    }
    if rules.absolute_margin is not None:
        removed["absolute_margin"] = s > positive - rules.absolute_margin
    if rules.relative_margin is not None:
        removed["relative_margin"] = s > positive - rules.relative_margin * np.abs(positive)
    if rules.max_score is not None:
        removed["max_score"] = s > rules.max_score
    if rules.min_score is not None:
        removed["min_score"] = s < rules.min_score
    left = there & (~candidate | (rank < last))
    counts = np.zeros(len(RULES), np.int64)
    for index, rule in enumerate(RULES):
        if rule in removed:
            hit = left & removed[rule]
            counts[index] = hit.sum()
            left &= ~hit
    if rules.strategy == "random":
        draw = fold_in(rules.seed, np.repeat(examples, s.shape[1]), np.tile(np.arange(s.shape[1]), len(s)))
        order = np.lexsort((draw.reshape(s.shape), ~left), axis=1)
    else:
        order = np.lexsort((-s, ~left), axis=1)
    chosen = order[:, : rules.num_negatives]
    kept = np.take_along_axis(left, chosen, 1)
    # By falling score, whatever the order they were drawn in.
    by_score = np.lexsort((-np.take_along_axis(s, chosen, 1), ~kept), axis=1)
    chosen, kept = np.take_along_axis(chosen, by_score, 1), np.take_along_axis(kept, by_score, 1)
    places = np.where(kept, chosen, -1)
    short = rules.num_negatives - places.shape[1]
    return np.pad(places, ((0, 0), (0, max(0, short))), constant_values=-1), counts
