"""Packs documents into rows without cutting those that fit (Ding et al. 2024, "Fewer Truncations Improve Language
Modeling", 2404.10830).

1. A document longer than a row is cut into full rows, and what remains of it is packed like a document.
2. From the longest to the shortest, each piece goes into the row with the least space that is enough, and else into a
   new row ("best fit decreasing").
3. Lengths are whole numbers up to `seq_len`, so rows with the same space left are one class, and all pieces of one
   length are placed at once: a row with space r takes r // length of them. The work is a few array operations for every
   length, however many documents there are.

A plan is of one shard: it does not depend on the others, so that a corpus that grows keeps its rows.
"""

from typing import NamedTuple

import numpy as np


class Plan(NamedTuple):
    """The rows of a shard: first the full rows of its long documents, in order, then the packed ones.

    Pieces of packed rows are the ends of documents, `length % seq_len` tokens. It takes 4 bytes for every document and
    for every packed row, and 12 more for every document that is longer than a row.

    Attributes:
        long_documents: `[K]` int32: the documents longer than a row.
        full_rows: `[K]` int64: how many full rows they and those before them have.
        pieces: `[M]` int32: the documents whose ends are packed, row by row.
        row_starts: `[R + 1]` int32: where each packed row begins in `pieces`.
    """

    long_documents: np.ndarray
    full_rows: np.ndarray
    pieces: np.ndarray
    row_starts: np.ndarray

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
    pieces = order[np.argsort(row_of, kind="stable")]
    row_starts = np.concatenate([[0], np.cumsum(np.bincount(row_of))]).astype(np.int32)
    return Plan(long_documents, full_rows, pieces, row_starts)


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
