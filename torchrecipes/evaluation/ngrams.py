"""`NGramModel`: an interpolated n-gram model of a corpus, as a baseline with a context of a few characters.

The probability of a token w after the tokens h is that of Witten and Bell (1991), "The zero-frequency problem", method
C, interpolated as in Chen and Goodman (1999), "An empirical study of smoothing techniques", section 2.5:

    p(w | h) = (c(h, w) + T(h) p(w | h')) / (c(h) + T(h))

c counts, T(h) is the number of different tokens seen after h, and h' is h without its farthest token. Unigrams are
interpolated with the uniform distribution over ordinary tokens. After a context that was never seen p is p(w | h').

A window of n tokens is one integer, w + V' (last + V' (the one before + ...)), so that counting is sorting. Windows do
not cross documents: before a document, each position is a token of its own, V.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchrecipes.data.corpus.corpus import Corpus

MAX_TOKENS = 2**24  # that are counted: in seconds, with 400 MB of memory
CHUNK = 2**18  # tokens read at a time; of a larger corpus as many such pieces are read, evenly spaced


@dataclass(frozen=True, eq=False)
class _Order:
    """The n-grams of one length n that were seen, with their probabilities, and the contexts with their weights."""

    ngrams: np.ndarray  # int64, sorted
    probability: np.ndarray  # float64, of each: p(w | h)
    contexts: np.ndarray  # int64, sorted
    backoff: np.ndarray  # float64, of each context: what p(w | h') is multiplied by for w never seen after it
    best: np.ndarray  # int64, of each context: the most probable token
    best_probability: np.ndarray  # float64


class NGramModel:
    """Predicts a token from up to `order - 1` tokens before it. Made by `NGramModel.train`.

    Attributes:
        order: n.
        num_tokens: ordinary tokens that were counted.
    """

    def __init__(self, windows: np.ndarray, order: int, num_ordinary: int, vocab_size: int):
        self.order, self.num_tokens, self._base = order, len(windows), vocab_size + 1
        self._uniform = 1 / num_ordinary
        ngrams, counts = np.unique(windows, return_counts=True)
        counted = [(ngrams, counts)]
        for length in range(order - 1, 0, -1):
            ngrams, where = np.unique(counted[0][0] % self._base**length, return_inverse=True)
            counted.insert(0, (ngrams, np.bincount(where, counted[0][1])))
        self._orders: list[_Order] = []
        for ngrams, counts in counted:
            self._orders.append(self._estimate(ngrams, counts))

    @classmethod
    def train(
        cls,
        corpora: Sequence["Corpus"],
        order: int,
        special_ids: Sequence[int],
        vocab_size: int,
        max_tokens: int = MAX_TOKENS,
    ) -> "NGramModel":
        """Counts corpora.

        Args:
            corpora: each gives an equal share of `max_tokens` at most; of a larger one, evenly spaced pieces are read.
            order: n.
            special_ids: tokens that are context, and are not predicted.
            vocab_size: V; (V + 1) ** n is below 2**63.
            max_tokens: that are read.

        Raises:
            ValueError: the vocabulary is too large for this order.
        """
        if (vocab_size + 1) ** order >= 2**63:
            raise ValueError(f"{order}-grams of {vocab_size} tokens do not fit into 63 bits")
        is_ordinary = np.ones(vocab_size, dtype=bool)
        is_ordinary[list(special_ids)] = False
        parts = [
            _windows(corpus, start, stop, order, is_ordinary)
            for corpus in corpora
            for start, stop in _pieces(corpus.num_tokens, max_tokens // len(corpora))
        ]
        windows = np.concatenate([np.empty(0, np.int64), *parts])
        return cls(windows, order, int(is_ordinary.sum()), vocab_size)

    def windows(self, input_ids: Tensor, position_ids: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
        """The window that ends at each target, with the true tokens, as int64 `[M]`; -1 where there is no label.

        Nothing waits for the device.

        Args:
            input_ids, position_ids: `[B, S]`: rows in which targets are hidden, and positions in their documents.
            positions: `[M]` int64 into the flattened rows, all different.
            labels: `[M]` int64, the tokens that are hidden there; -100: none.
        """
        tokens, position_ids = input_ids.flatten().clone(), position_ids.flatten()[positions]
        tokens[positions] = torch.where(labels >= 0, labels, tokens[positions])
        windows, factor = tokens[positions], 1
        for distance in range(1, self.order):
            factor *= self._base
            before = tokens[(positions - distance).clamp(min=0)]
            windows = windows + factor * torch.where(position_ids >= distance, before, self._base - 1)
        return torch.where(labels >= 0, windows, -1)

    def last_tokens(self, windows: np.ndarray) -> np.ndarray:
        """The token that each window ends with."""
        return windows % self._base

    def score(self, windows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Predicts the last token of every window with n-grams of length 1, 2, ... up to the order.

        Args:
            windows: `[M]` int64.

        Yields:
            For each length the probability of the last token, `[M]` float64, and the most probable one, `[M]` int64.
        """
        probability = np.full(len(windows), self._uniform)
        best = np.zeros(len(windows), dtype=np.int64)
        for length, order in enumerate(self._orders, start=1):
            if self.num_tokens:
                context, context_seen = _find(order.contexts, windows // self._base % self._base ** (length - 1))
                ngram, ngram_seen = _find(order.ngrams, windows % self._base**length)
                probability = np.where(context_seen, order.backoff[context], 1) * probability
                probability = np.where(ngram_seen, order.probability[ngram], probability)
                best = np.where(context_seen, order.best[context], best)
            yield probability, best

    def _estimate(self, ngrams: np.ndarray, counts: np.ndarray) -> _Order:
        """The next longer n-grams, whose shorter ones are in `_orders`."""
        contexts, first = np.unique(ngrams // self._base, return_index=True)
        different = np.diff(first, append=len(ngrams))
        total = np.add.reduceat(counts, first)
        backoff = different / (total + different)
        lower, lower_best, lower_max = self._uniform, 0, 0.0
        if self._orders:
            shorter, size = self._orders[-1], self._base ** len(self._orders)
            lower = shorter.probability[shorter.ngrams.searchsorted(ngrams % size)]
            context = shorter.contexts.searchsorted(contexts % (size // self._base))
            lower_best, lower_max = shorter.best[context], shorter.best_probability[context]
        probability = counts / np.repeat(total + different, different) + np.repeat(backoff, different) * lower
        # A token that was not seen after a context is the most probable only if it is so without the farthest token.
        highest = np.maximum.reduceat(probability, first)
        is_highest = np.flatnonzero(probability == np.repeat(highest, different))
        best = ngrams[is_highest[is_highest.searchsorted(first)]] % self._base
        best = np.where(highest >= backoff * lower_max, best, lower_best)
        return _Order(ngrams, probability, contexts, backoff, best, np.maximum(highest, backoff * lower_max))


def _find(table: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where keys are in a sorted table, and whether they are there."""
    where = table.searchsorted(keys)
    where[where == len(table)] = 0
    return where, table[where] == keys


def _pieces(num_tokens: int, budget: int) -> list[tuple[int, int]]:
    """Ranges of tokens, `budget` together at most (one piece at least), evenly spaced."""
    starts = np.arange(0, num_tokens, CHUNK)
    if num_tokens > budget:
        starts = starts[np.linspace(0, len(starts) - 1, max(1, budget // CHUNK)).astype(np.int64)]
    return [(start, min(start + CHUNK, num_tokens)) for start in starts.tolist()]


def _windows(corpus: "Corpus", start: int, stop: int, order: int, is_ordinary: np.ndarray) -> np.ndarray:
    """The windows that end at the ordinary tokens from `start` up to `stop`: int64."""
    base = len(is_ordinary) + 1
    first = max(0, start - order + 1)
    tokens = corpus.read(first, stop).astype(np.int64)
    begins = np.zeros(len(tokens), dtype=np.int64)
    inside = corpus.boundaries(first, stop) - first
    begins[inside] = inside
    # Where a document began before `first`, the positions are too small, but not so for the tokens that count.
    position = np.arange(len(tokens)) - np.maximum.accumulate(begins)
    windows, factor = tokens.copy(), 1
    for distance in range(1, order):
        factor *= base
        before = np.roll(tokens, distance)
        windows += factor * np.where(position >= distance, before, base - 1)
    return windows[start - first :][is_ordinary[tokens[start - first :]]]
