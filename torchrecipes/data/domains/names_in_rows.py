"""The names in rows of tokens: where each of them is, and its token types."""

from typing import NamedTuple

import numpy as np

from torchrecipes.data.batching.rows import RowBlock
from torchrecipes.data.domains.encoding import DOT, NUM_KINDS, SEPARATOR, SUBDOMAIN, SUFFIX, UNK


class NamesInRows(NamedTuple):
    """The D names of B rows of S tokens; padding is one more at the end of its row, without characters.

    Positions count over the flattened tokens.

    Attributes:
        ids: `[B * S]` uint8, the tokens.
        starts, suffixes, ends: `[D]`: the first token, the first of the suffix, and the one after the last.
        lengths: `[D]`: tokens.
        parts: `[2 * D]`: tokens of every name before its suffix and from there on.
        suffix_sizes, count: `[D]`: characters in the suffix and before it, the latter without `[UNK]`.
        suffix_ids: `[D]`.
        row, row_starts: `[D]`: the row and its first token.
        in_row, number: `[D]`: the place of the first token in its row, and the number of the name in it.
        first_of_row: `[B]`: the first name of each row.
        unknown: `[U]`: the `[UNK]` among the tokens.
    """

    ids: np.ndarray
    starts: np.ndarray
    suffixes: np.ndarray
    ends: np.ndarray
    lengths: np.ndarray
    parts: np.ndarray
    suffix_sizes: np.ndarray
    count: np.ndarray
    suffix_ids: np.ndarray
    row: np.ndarray
    row_starts: np.ndarray
    in_row: np.ndarray
    number: np.ndarray
    first_of_row: np.ndarray
    unknown: np.ndarray

    @staticmethod
    def of(block: RowBlock, rows: slice) -> "NamesInRows":
        """The names of some rows of a block."""
        row_len = block.tokens.shape[1]
        ids = block.tokens[rows].astype(np.uint8).reshape(-1)
        first = rows.start * row_len
        bounds = block.boundaries.searchsorted(np.arange(first, first + len(ids) + 1, row_len))
        first_of_row, per_row, entries = bounds[:-1] - bounds[0], np.diff(bounds), slice(bounds[0], bounds[-1])
        starts = block.boundaries[entries] - first
        row = np.repeat(np.arange(len(per_row)), per_row)
        row_starts, number = row * row_len, np.arange(len(starts)) - first_of_row[row]
        ends = np.append(starts[1:], len(ids))
        lengths = ends - starts
        before, suffix_ids = (block.columns[name][entries].astype(np.int64) for name in ("suffix_starts", "suffix_ids"))
        # A name is `[CLS] characters [SEP]`. Of padding, 0 tokens are before the suffix.
        count = np.maximum(before, 1) - 1
        suffix_sizes = (lengths - before - 1) * (before > 0)
        suffixes = starts + before
        unknown = np.flatnonzero(ids == UNK)
        if len(unknown):
            name = starts.searchsorted(unknown, "right") - 1
            count -= np.bincount(name[unknown < suffixes[name]], minlength=len(starts))
        parts = np.empty((len(starts), 2), dtype=np.int64)
        parts[:, 0], parts[:, 1] = before, lengths - before
        sizes = (lengths, parts.reshape(-1), suffix_sizes, count)
        places = (row, row_starts, starts - row_starts, number, first_of_row)
        return NamesInRows(ids, starts, suffixes, ends, *sizes, suffix_ids, *places, unknown)

    def repeat(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """A value for every token of a name, `[B * S]`: one before the suffix and another from there on."""
        values = np.empty((len(self.starts), 2), dtype=before.dtype)
        values[:, 0], values[:, 1] = before, after
        return np.repeat(values.reshape(-1), self.parts)


def fill_token_types(names: NamesInRows, ids: np.ndarray, has_class: np.ndarray, types: np.ndarray) -> None:
    """Fills the token types of all tokens, `[B, S]`: see `DomainEncoding.token_type_ids`.

    They are those of the names as the model sees them, `ids` `[B * S]`: the kind of a hidden dot would give it away.
    """
    first = np.where(has_class, 0, NUM_KINDS * names.suffix_ids).astype(np.int32)
    is_name = names.suffixes > names.starts
    flat = names.repeat(first, first + is_name * np.int32(SUFFIX))
    flat[names.ends[is_name] - 1] -= SUFFIX  # `[SEP]`
    # Nearly all dots are inside a suffix or stand before one. What is before another one is a subdomain.
    is_dot = ids == DOT
    last = (names.suffixes - 1)[is_name]
    last = last[is_dot[last]]
    is_dot[last] = False
    flat[last] += SEPARATOR
    dots = np.flatnonzero(is_dot)
    name = names.starts.searchsorted(dots, "right") - 1
    is_inner = dots < names.suffixes[name]
    dots, name = dots[is_inner], name[is_inner]
    begin = np.maximum(names.starts[name], np.append(-1, dots)[:-1]) + 1
    flat[ranges(begin, dots - begin)] += SUBDOMAIN
    flat[dots] += SEPARATOR
    types[:] = flat.reshape(types.shape)


def ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The numbers from each start on, as many as its size, one after the other: int64."""
    ends = np.cumsum(sizes)
    numbers = np.repeat(starts - ends + sizes, sizes)
    numbers += np.arange(len(numbers))
    return numbers
