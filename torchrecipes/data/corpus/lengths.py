"""Lengths of a corpus' documents: their distribution, and what rows of a given length would be filled with."""

from dataclasses import dataclass

import numpy as np

from torchrecipes.data.corpus.corpus import Corpus


@dataclass(frozen=True)
class Lengths:
    """How many documents have how many tokens, special ones included.

    Attributes:
        values: int64 `[L]`, the lengths that occur, ascending.
        counts: int64 `[L]`, the number of documents of each.
        shortest, longest: the number of the first document with the smallest and the largest length.
    """

    values: np.ndarray
    counts: np.ndarray
    shortest: int
    longest: int

    def quantile(self, share: float) -> int:
        """The smallest length that at least this share of the documents does not exceed."""
        cumulative = np.cumsum(self.counts)
        return int(self.values[cumulative.searchsorted(share * cumulative[-1])])

    def histogram(self) -> list[tuple[int, int, int, int]]:
        """Documents by length in powers of two: (from, up to, documents, tokens), without empty ends."""
        bins = np.floor(np.log2(self.values)).astype(np.int64)
        rows = []
        for power in range(int(bins[0]), int(bins[-1]) + 1):
            here = bins == power
            tokens = int((self.counts * self.values)[here].sum())
            rows.append((1 << power, (2 << power) - 1, int(self.counts[here].sum()), tokens))
        return rows


def document_lengths(corpus: Corpus) -> Lengths:
    """Counts the documents of a corpus by length, a shard at a time."""
    values, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    extremes = {np.argmin: (np.iinfo(np.int64).max, 0), np.argmax: (0, 0)}
    for shard in corpus.shards:
        lengths = np.diff(shard.document_offsets)
        here, count = np.unique(lengths, return_counts=True)
        values, inverse = np.unique(np.concatenate([values, here]), return_inverse=True)
        total = np.zeros(len(values), np.int64)
        np.add.at(total, inverse, np.concatenate([counts, count]))
        counts = total
        for find, (length, _) in extremes.items():
            index = int(find(lengths))
            if (lengths[index] < length) if find is np.argmin else (lengths[index] > length):
                extremes[find] = (int(lengths[index]), index + shard.document_offset)
    return Lengths(values, counts, extremes[np.argmin][1], extremes[np.argmax][1])


def cut_by_concatenation(corpus: Corpus, seq_len: int) -> int:
    """The documents that do not lie in one row if rows are `seq_len` tokens of the corpus one after the other."""
    cut = 0
    for shard in corpus.shards:
        offsets = np.asarray(shard.document_offsets) + shard.token_offset
        cut += int((offsets[:-1] // seq_len != (offsets[1:] - 1) // seq_len).sum())
    return cut
