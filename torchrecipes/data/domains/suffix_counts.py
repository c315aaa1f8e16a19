"""Counts the names of a source by public suffix, in one pass: for the suffixes that get ids, and for the split."""

from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchrecipes.data.corpus.build import FEW, in_order, num_threads
from torchrecipes.data.domains.name_files import add_skipped, count_names
from torchrecipes.data.domains.suffix_keys import KeyTable, suffix_keys
from torchrecipes.data.progress import Progress
from torchrecipes.data.sources.records import ReadStats, require_documents

NO_HASH = np.uint64((1 << 64) - 1)
NO_HASHES = np.empty(0, np.uint64)


@dataclass(frozen=True)
class SuffixCounts:
    """The names of a source by public suffix.

    Attributes:
        suffixes: S of them, in alphabetical order.
        counts: int64 `[S]`, names of each.
        lowest: uint64 `[S]`, the lowest hash of a name of each.
        few_hashes: uint64 `[F]`, ascending: the hashes of all names of the suffixes with fewer than `FEW` names.
        few_suffixes: int64 `[F]`, the place of their suffixes in `suffixes`.
        num_held_out: names that an earlier split holds out.
    """

    suffixes: list[str]
    counts: np.ndarray
    lowest: np.ndarray
    few_hashes: np.ndarray
    few_suffixes: np.ndarray
    num_held_out: int = 0


# The latest result: a tokenizer's suffixes are counted, and then the split of the same source is chosen.
_latest: tuple[str, SuffixCounts] | None = None


def count_suffixes(source: Any, threads: int | None = None, earlier: Any = None) -> SuffixCounts:
    """Counts the names of a source by public suffix.

    The memory is a few numbers for every suffix and for every name of the suffixes with few names.

    Args:
        source: gives names in bulk: `blocks` and `parse`, as `domain_names` has them.
        threads: that parse names; None: one per core.
        earlier: the `NameSplit` of other names, to which these are added. Those of its `few_hashes` are counted, but
            are in neither `lowest` nor `few_hashes`.

    Raises:
        UserError: no names (code `no_documents`), or what the source raises.
    """
    global _latest
    if _latest is not None and _latest[0] == source.fingerprint and earlier is None:
        return _latest[1]
    counter = SuffixCounter(earlier)
    progress, report = Progress("counting suffixes", source.num_bytes, "names"), ReadStats()

    def work(block: Any) -> tuple[int, ReadStats, "_Found"]:
        parsed, skipped = source.parse(block), ReadStats()
        count_names(skipped, block, parsed)
        return (
            len(block.data),
            skipped,
            counter.look(parsed.characters, parsed.lengths, parsed.suffix_starts, parsed.hashes),
        )

    try:
        with closing(in_order(work, source.blocks(), num_threads(threads))) as results:
            for _, (size, skipped, found) in results:
                counter.add(found)
                report.documents += skipped.documents
                add_skipped(report, skipped)
                progress.add(skipped.documents, size)
    finally:
        progress.close()
    add_skipped(report, source.report)
    require_documents(source, report)
    counts = counter.counts()
    if earlier is None:
        _latest = source.fingerprint, counts
    return counts


@dataclass(frozen=True)
class _Found:
    """What is new in some names; suffixes are given by their keys."""

    keys: np.ndarray
    counts: np.ndarray
    lowest: np.ndarray
    names: dict[int, str]  # of suffixes that were not known
    few_keys: np.ndarray
    few_hashes: np.ndarray
    num_held_out: int


class SuffixCounter:
    """Adds up what is found in batches of names. `look` is for many threads, `add` for one.

    Args:
        earlier: as for `count_suffixes`.
    """

    def __init__(self, earlier: Any = None):
        self._earlier, self._num_held_out = earlier, 0
        self._known: tuple[KeyTable, np.ndarray, np.ndarray] = (
            KeyTable(np.empty(0, np.uint64)), np.empty(0, np.int64), np.empty(0, np.uint64)
        )  # fmt: skip
        self._names: dict[int, str] = {}
        self._few: list[tuple[np.ndarray, np.ndarray]] = []
        self._num_few, self._most_few = 0, 1 << 20

    def look(
        self, characters: np.ndarray, lengths: np.ndarray, suffix_starts: np.ndarray, hashes: np.ndarray
    ) -> _Found:
        """Counts a batch of names, and picks the few that may matter; arguments as in `ParsedNames`."""
        table, counts, lowest = self._known
        known = len(counts)
        ends = np.cumsum(lengths)
        keys = suffix_keys(characters, ends, lengths - suffix_starts)
        places = table.find(keys)
        new = np.flatnonzero(places < 0)
        new_keys, first, inverse = np.unique(keys[new], return_index=True, return_inverse=True)
        places[new] = known + inverse
        first = new[first]
        starts = (ends - lengths + suffix_starts)[first].tolist()
        spans = zip(new_keys.tolist(), starts, ends[first].tolist(), strict=True)
        names = {key: characters[start:end].tobytes().decode() for key, start, end in spans}
        keys = np.concatenate([table.keys, new_keys])
        number = np.bincount(places, minlength=len(keys))
        # Almost no name is the lowest so far, or of a suffix with few names.
        bounds = np.concatenate([lowest, np.full(len(new_keys), NO_HASH)])
        low = self._left(np.flatnonzero(hashes < bounds[places]), hashes)
        minima = np.full(len(keys), NO_HASH)
        np.minimum.at(minima, places[low], hashes[low])
        is_few = np.concatenate([counts < FEW, np.ones(len(new_keys), bool)])
        few = self._left(np.flatnonzero(is_few[places]), hashes)
        there = np.flatnonzero(number)
        held_out = 0 if self._earlier is None else int(self._earlier.holds_out(hashes).sum())
        return _Found(keys[there], number[there], minima[there], names, keys[places[few]], hashes[few], held_out)

    def _left(self, numbers: np.ndarray, hashes: np.ndarray) -> np.ndarray:
        return numbers if self._earlier is None else numbers[~np.isin(hashes[numbers], self._earlier.few_hashes)]

    def add(self, found: _Found) -> None:
        """Adds what `look` found."""
        table, counts, lowest = self._known
        new = np.flatnonzero(table.find(found.keys) < 0)
        if len(new):
            table = KeyTable(np.concatenate([table.keys, found.keys[new]]))
            self._names |= {key: found.names[key] for key in found.keys[new].tolist()}
        counts = np.concatenate([counts, np.zeros(len(new), np.int64)])
        lowest = np.concatenate([lowest, np.full(len(new), NO_HASH)])
        places = table.find(found.keys)
        counts[places] += found.counts
        lowest[places] = np.minimum(lowest[places], found.lowest)
        self._known = table, counts, lowest
        self._num_held_out += found.num_held_out
        if len(found.few_hashes):
            self._few.append((found.few_keys, found.few_hashes))
            self._num_few += len(found.few_hashes)
            if self._num_few > self._most_few:
                self._few = [self._of_few()]
                self._num_few = len(self._few[0][0])
                self._most_few = max(1 << 20, 2 * self._num_few)

    def _of_few(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys and hashes of the names whose suffix has few of them still."""
        table, counts, _ = self._known
        keys, hashes = (np.concatenate([NO_HASHES, *(one[i] for one in self._few)]) for i in range(2))
        few = counts[table.find(keys)] < FEW if len(keys) else np.empty(0, bool)
        return keys[few], hashes[few]

    def counts(self) -> SuffixCounts:
        """The counts of all names that were added."""
        table, counts, lowest = self._known
        names = [self._names[key] for key in table.keys.tolist()]
        order = np.array(sorted(range(len(names)), key=names.__getitem__), np.int64)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        keys, hashes = self._of_few()
        suffixes = rank[table.find(keys)]
        few = np.lexsort((suffixes, hashes))
        return SuffixCounts(
            [names[i] for i in order], counts[order], lowest[order], hashes[few], suffixes[few], self._num_held_out
        )
