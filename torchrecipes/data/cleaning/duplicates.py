"""Finds exact and near duplicates among documents whose hashes and signatures lie on disk.

1. Documents are numbered in their order. The hashes, band keys and signatures of a piece of consecutive documents are
   in files of their own, the first two sorted.
2. Exact duplicates: equal 128-bit hashes. One range of values after the other is read from all pieces and sorted.
3. Near duplicates: for every band, one range of its keys after the other is read and sorted. Documents with an equal
   key are compared by their signatures, which are read from disk when needed.
4. Documents are joined to clusters (union-find); the first one of a cluster is kept.

Memory: 33 bytes per document for the clusters, and a fixed amount for the range that is sorted. Disk: 1.2 KB per
    document.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from torchrecipes.data.cleaning.signatures import BANDS, PERMUTATIONS, estimated_jaccard

PARTITION_ROWS = 1 << 21  # keys in memory at a time; with what sorting needs, 150 MB
CHUNK = 1 << 15  # signatures in memory at a time, 32 MiB
WINDOW = 1_000  # of documents with an equal key, each is compared with so many that follow it


@dataclass(frozen=True)
class PieceFiles:
    """The `.npy` files of a piece of consecutive documents, `PREFIX.hashes.npy` and so on.

    hashes         uint64 [2, documents]: the halves of the hash, sorted by the first
    hash_order     uint32 [1, documents]: the documents in that order
    bands          uint64 [21, documents]: the keys of every band, sorted
    band_order     uint32 [21, documents]: the documents in that order
    signatures     uint64 [documents, 128]
    """

    documents: int
    prefix: Path

    def load(self, name: str) -> np.ndarray:
        """Return a memory map of a file."""
        return np.load(f"{self.prefix}.{name}.npy", mmap_mode="r")


@dataclass(frozen=True)
class Clusters:
    """The duplicates among documents.

    Attributes:
        first: int64 `[documents]`: the first document of the cluster that a document belongs to; its own number if that
            is itself.
        exact: bool `[documents]`: the text occurred before.
    """

    first: np.ndarray
    exact: np.ndarray


def sort_keys(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the keys of each row (uint64 `[rows, documents]`) in their order, and that order (uint32)."""
    order = np.argsort(keys, axis=1, kind="stable").astype(np.uint32)
    return np.take_along_axis(keys, order.astype(np.int64), 1), order


def find_duplicates(
    pieces: Sequence[PieceFiles],
    *,
    exact: bool = True,
    jaccard: float | None = 0.8,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Clusters:
    """Return the clusters of duplicates.

    Args:
        pieces: the documents, in their order.
        exact: join equal hashes; the pieces have `hashes` and `hash_order`.
        jaccard: least estimated similarity of near duplicates; None: join none. The pieces have the other files.
        on_progress: called with the number of documents after each of the 22 passes.
    """
    starts = np.cumsum([0, *(piece.documents for piece in pieces)])
    parent, is_exact = np.arange(starts[-1]), np.zeros(starts[-1], bool)
    if exact:
        _join_exact(pieces, starts, parent, is_exact)
        on_progress(len(parent))
    for band in range(BANDS if jaccard is not None else 0):
        _join_band(pieces, starts, parent, is_exact, band, jaccard)
        on_progress(len(parent))
    return Clusters(_roots(parent, np.arange(len(parent))), is_exact)


def _join_exact(pieces: Sequence[PieceFiles], starts: np.ndarray, parent: np.ndarray, is_exact: np.ndarray) -> None:
    for ids, high, low in _ranges(pieces, starts, "hashes", "hash_order", [0, 1]):
        order = np.lexsort((ids, low, high))
        high, low, ids = high[order], low[order], ids[order]
        is_new = np.concatenate([[True], (high[1:] != high[:-1]) | (low[1:] != low[:-1])])
        parent[ids] = ids[is_new][np.cumsum(is_new) - 1]
        is_exact[ids[~is_new]] = True


def _join_band(
    pieces: Sequence[PieceFiles], starts: np.ndarray, parent: np.ndarray, exact: np.ndarray, band: int, jaccard: float
) -> None:
    for ids, keys in _ranges(pieces, starts, "bands", "band_order", [band]):
        wanted = ~exact[ids] & (keys != 0)
        keys, ids = keys[wanted], ids[wanted]
        if not len(ids):
            continue
        order = np.lexsort((ids, keys))
        keys, ids = keys[order], ids[order]
        edges = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1], [True]]))
        # Documents of one cluster need no comparison.
        roots = _roots(parent, ids)
        several = np.minimum.reduceat(roots, edges[:-1]) != np.maximum.reduceat(roots, edges[:-1])
        sizes = np.diff(edges)
        ids, sizes = ids[np.repeat(several, sizes)], sizes[several]
        stops, first = np.cumsum(sizes), 0
        while first < len(sizes):
            start = stops[first] - sizes[first]
            last = max(first + 1, int(np.searchsorted(stops, start + CHUNK, "right")))
            if sizes[first] > CHUNK:
                for part in np.split(ids[start : stops[first]], range(CHUNK, sizes[first], CHUNK)):
                    _join_groups(pieces, starts, parent, part, np.array([len(part)]), jaccard)
            else:
                _join_groups(pieces, starts, parent, ids[start : stops[last - 1]], sizes[first:last], jaccard)
            first = last


def _ranges(
    pieces: Sequence[PieceFiles], starts: np.ndarray, keys_file: str, order_file: str, rows: list[int]
) -> Iterator[list[np.ndarray]]:
    """Yield documents and rows of `keys_file`, for one range of the values of the first of these after the other."""
    count = max(1, math.ceil(int(starts[-1]) / PARTITION_ROWS))
    begins = [0] * len(pieces)
    for number in range(1, count + 1):
        found = []
        for piece, files in enumerate(pieces):
            keys, order = files.load(keys_file), files.load(order_file)
            begin, end = begins[piece], files.documents
            if number < count:
                end = int(np.searchsorted(keys[rows[0]], np.uint64(number * (1 << 64) // count)))
            begins[piece] = end
            found.append([order[rows[0], begin:end] + starts[piece], *(keys[row, begin:end] for row in rows)])
        if any(len(ids) for ids, *_ in found):
            yield [np.concatenate(arrays) for arrays in zip(*found, strict=True)]


def _join_groups(
    pieces: Sequence[PieceFiles],
    starts: np.ndarray,
    parent: np.ndarray,
    ids: np.ndarray,
    sizes: np.ndarray,
    jaccard: float,
) -> None:
    """Joins the similar documents of groups: the first `sizes[0]` of `ids`, the next `sizes[1]`, ..."""
    unique, where = np.unique(ids, return_inverse=True)
    signatures = _signatures(pieces, starts, unique)
    # Neighbours first, of all groups at once: that is all there is to compare in a pair, the most common group by far.
    groups = np.repeat(np.arange(len(sizes)), sizes)
    neighbours = np.flatnonzero(groups[1:] == groups[:-1])
    for first in range(0, len(neighbours), 4096):
        pair = neighbours[first : first + 4096]
        similar = estimated_jaccard(signatures[where[pair]], signatures[where[pair + 1]]) >= jaccard
        for position in pair[similar]:
            _join(parent, int(ids[position]), int(ids[position + 1]))
    stops = np.cumsum(sizes)
    for number in np.flatnonzero(sizes > 2):
        group = slice(stops[number] - sizes[number], stops[number])
        _join_group(parent, ids[group], signatures[where[group]], jaccard)


def _join_group(parent: np.ndarray, ids: np.ndarray, signatures: np.ndarray, jaccard: float) -> None:
    roots = _roots(parent, ids)
    for position in range(len(ids) - 1):
        following = slice(position + 1, position + 1 + WINDOW)
        others = position + 1 + np.flatnonzero(roots[following] != roots[position])
        if not len(others):
            continue
        similar = others[estimated_jaccard(signatures[others], signatures[position]) >= jaccard]
        for other in similar:
            _join(parent, int(ids[position]), int(ids[other]))
        if len(similar):
            roots = _roots(parent, ids)


def _signatures(pieces: Sequence[PieceFiles], starts: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return the signatures of the documents `ids`, which are sorted."""
    signatures = np.empty((len(ids), PERMUTATIONS), np.uint64)
    owner = np.searchsorted(starts, ids, "right") - 1
    for number in np.unique(owner):
        here = slice(*np.searchsorted(owner, [number, number + 1]))
        signatures[here] = pieces[number].load("signatures")[ids[here] - starts[number]]
    return signatures


def _roots(parent: np.ndarray, ids: np.ndarray) -> np.ndarray:
    roots = parent[ids]
    while True:
        above = parent[roots]
        if np.array_equal(above, roots):
            return roots
        roots = above


def _join(parent: np.ndarray, one: int, other: int) -> None:
    # The root of a cluster is its first document.
    one, other = _root(parent, one), _root(parent, other)
    if one != other:
        parent[max(one, other)] = min(one, other)


def _root(parent: np.ndarray, document: int) -> int:
    while parent[document] != document:
        parent[document] = parent[parent[document]]
        document = int(parent[document])
    return document
