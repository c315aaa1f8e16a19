"""Packs documents into rows without cutting those that fit (Ding et al. 2024, "Fewer Truncations Improve Language
Modeling", 2404.10830).

1. A document longer than a row is cut into full rows, and what remains of it is packed like a document.
2. From the longest to the shortest, each piece goes into the row with the least space that is enough, and else into a
   new row ("best fit decreasing").
3. Lengths are whole numbers up to `seq_len`, so rows with the same space left are one class, and all pieces of one
   length are placed at once: a row with space r takes r // length of them. The work is a few array operations for every
   length, however many documents there are.
4. Where less than 99 % of the positions are filled, rows that hold ends of long documents alone are emptied, as few as
   it takes: the ends are cut again and fill the space in other rows. No other document is cut, and each cut is at the
   end of a row.

A plan is of one shard: it does not depend on the others, so that a corpus that grows keeps its rows.
"""

from typing import NamedTuple

import numpy as np

FULL = 0.99  # of the positions
SMALLEST = 16  # a space is filled where it is at least this part of a row: seq_len // SMALLEST tokens


class Plan(NamedTuple):
    """The rows of a shard: first the full rows of its long documents, in order, then the packed ones.

    Pieces of packed rows are the ends of documents, `length % seq_len` tokens, or parts of these. A plan takes 4 bytes
    for every document and for every packed row, and 12 more for every document that is longer than a row.

    Attributes:
        long_documents: `[K]` int32: the documents longer than a row.
        full_rows: `[K]` int64: how many full rows they and those before them have.
        pieces: `[M]` int32: the documents whose ends are packed, row by row.
        row_starts: `[R + 1]` int32: where each packed row begins in `pieces`.
        cut_places: `[C]` int32, sorted: the pieces that are a part of an end.
        cut_starts, cut_lengths: `[C]` int32: the tokens of the end before them, and their own.
    """

    long_documents: np.ndarray
    full_rows: np.ndarray
    pieces: np.ndarray
    row_starts: np.ndarray
    cut_places: np.ndarray
    cut_starts: np.ndarray
    cut_lengths: np.ndarray

    @property
    def num_full_rows(self) -> int:
        """Rows that one long document fills."""
        return int(self.full_rows[-1]) if len(self.full_rows) else 0

    @property
    def num_rows(self) -> int:
        """Rows of the shard."""
        return self.num_full_rows + len(self.row_starts) - 1


def plan_rows(document_offsets: np.ndarray, seq_len: int) -> Plan:
    """Plans the rows of a shard.

    Args:
        document_offsets: `[N + 1]` integers: where its documents begin, and the end.
        seq_len: tokens per row.
    """
    lengths = np.diff(document_offsets)
    long_documents = np.flatnonzero(lengths > seq_len).astype(np.int32)
    full_rows = np.cumsum(lengths[long_documents] // seq_len)
    # What remains of a document: all of one that fits, nothing of a multiple of `seq_len` above it.
    ends = np.where(lengths > seq_len, lengths % seq_len, lengths)
    row_of, order = best_fit_decreasing(ends, seq_len)
    is_long = lengths > seq_len
    fewest = max(-(-int(lengths.sum()) // seq_len), int(lengths.sum() / (FULL * seq_len)))
    excess = int(full_rows[-1:].sum()) + int(row_of.max(initial=-1)) + 1 - fewest
    parts = _cut_ends(order, row_of, ends, is_long, seq_len, excess) if excess > 0 else _Parts.none()

    kept = np.ones(len(order), dtype=bool)
    kept[parts.replaced] = False
    rows = np.concatenate([row_of[kept], parts.rows])
    _, rows = np.unique(rows, return_inverse=True)  # rows that have become empty are left out
    by_row = np.argsort(rows, kind="stable")
    is_part = by_row >= kept.sum()
    which = by_row[is_part] - kept.sum()
    return Plan(
        long_documents,
        full_rows,
        np.concatenate([order[kept], parts.documents])[by_row],
        np.concatenate([[0], np.cumsum(np.bincount(rows))]).astype(np.int32),
        np.flatnonzero(is_part).astype(np.int32),
        parts.starts[which].astype(np.int32),
        parts.lengths[which].astype(np.int32),
    )


class _Parts(NamedTuple):
    """Parts of ends, in the order of the rows that they fill, and the pieces that they replace."""

    replaced: np.ndarray
    documents: np.ndarray
    rows: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @staticmethod
    def none() -> "_Parts":
        return _Parts(*(np.empty(0, dtype=np.int32) for _ in range(5)))


def _cut_ends(
    order: np.ndarray, row_of: np.ndarray, ends: np.ndarray, is_long: np.ndarray, seq_len: int, excess: int
) -> _Parts:
    """Empties up to `excess` rows that hold ends of long documents alone into the spaces of other rows."""
    used = np.bincount(row_of, ends[order]).astype(np.int64)
    spaces = seq_len - used
    spaces[spaces < max(1, seq_len // SMALLEST)] = 0
    others = np.bincount(row_of, ~is_long[order])
    rows = np.flatnonzero(others == 0)
    rows = rows[np.argsort(used[rows], kind="stable")][:excess]  # the emptiest first
    # The more rows are emptied, the less space there is for what was in them.
    rows = rows[np.cumsum(used[rows]) <= spaces.sum() - np.cumsum(spaces[rows])]
    if not len(rows):
        return _Parts.none()
    spaces[rows] = 0
    replaced = np.flatnonzero(np.isin(row_of, rows))
    sizes = ends[order[replaced]]
    filled = np.argsort(-spaces, kind="stable")[: np.count_nonzero(spaces)]  # the largest space first
    space_stops, size_stops = np.cumsum(spaces[filled]), np.cumsum(sizes)
    stops = np.unique(np.concatenate([space_stops[space_stops < size_stops[-1]], size_stops]))
    starts = np.concatenate([[0], stops[:-1]])
    end = size_stops.searchsorted(starts, "right")
    into = filled[space_stops.searchsorted(starts, "right")]
    return _Parts(replaced, order[replaced][end], into, starts - (size_stops - sizes)[end], stops - starts)


def best_fit_decreasing(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Assigns pieces to rows. Of rows with equal space the one that has had it longest comes first.

    Args:
        lengths: `[N]` integers, 0 to `seq_len`; pieces of 0 tokens go nowhere.
        seq_len: tokens of a row.

    Returns:
        For every piece, from the longest to the shortest: its row from 0, and its number, int32.
    """
    counts = np.bincount(lengths, minlength=seq_len + 1)
    total = len(lengths) - int(counts[0])
    # Equal lengths keep their order. A stable sort of 16-bit keys counts them instead of comparing.
    key = (seq_len - lengths).astype(np.uint16 if seq_len < 2**16 else np.int64)
    order = np.argsort(key, kind="stable")[:total].astype(np.int32)
    row_of = np.empty(total, dtype=np.int32)
    # Pieces above half a row have one of their own: no two fit, and no row before has that much space.
    num_rows = at = int(counts[seq_len // 2 + 1 :].sum())
    row_of[:num_rows] = np.arange(num_rows)
    waiting: list[list[np.ndarray]] = [[] for _ in range(seq_len)]  # rows by the space they have left
    spaces = 0  # bit r is set where rows with space r are waiting

    def put(rows: np.ndarray, space: int) -> None:
        nonlocal spaces
        if len(rows) and space:
            waiting[space].append(rows)
            spaces |= 1 << space

    first = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        if length > seq_len // 2:
            put(row_of[first : first + left], seq_len - length)
            first += left
            continue
        while left and length:
            enough = spaces >> length
            if enough:
                space = length + (enough & -enough).bit_length() - 1
                rows = waiting[space][0] if len(waiting[space]) == 1 else np.concatenate(waiting[space])
                waiting[space], spaces = [], spaces ^ (1 << space)
            else:
                space = seq_len
                rows = np.arange(num_rows, num_rows - (-left // (seq_len // length)), dtype=np.int32)
                num_rows += len(rows)
            each = space // length
            full, rest = divmod(min(left, len(rows) * each), each)
            placed = full * each + rest
            row_of[at : at + placed] = np.repeat(rows[: full + (rest > 0)], each)[:placed]
            put(rows[full + (rest > 0) :], space)
            put(rows[:full], space - each * length)
            put(rows[full : full + (rest > 0)], space - rest * length)
            at, left = at + placed, left - placed
    return row_of, order
