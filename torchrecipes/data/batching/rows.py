"""`Rows`: what a `Loader` reads, and `RowBlock`: what it gets."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor, from_numpy

from torchrecipes.errors import UserError

NUMBER_BITS = 48  # of a row's number within its source; the bits above say which source it is


@dataclass(frozen=True)
class RowBlock:
    """B rows of S tokens, or of S + lookahead.

    Attributes:
        tokens: `[B, S]` int64.
        boundaries: int64, sorted: the flat positions in `[0, B * S)` at which a document (or padding) starts; the
            start of every row is among them.
        lengths: `[B]` int64: tokens of a row before its padding.
        source_ids: `[B]` int64, the place of each row's source in `Rows.source_names`, 0 for padding; None where there
            is one source.
        columns: what the corpus holds of its documents, by name: of the document at each of `boundaries`, an array as
            long as these; 0 for padding. {} for a corpus without.
    """

    tokens: np.ndarray
    boundaries: np.ndarray
    lengths: np.ndarray
    source_ids: np.ndarray | None = None
    columns: dict[str, np.ndarray] = field(default_factory=dict)


class Rows(Protocol):
    """Rows of equal length in an order that is arithmetic: one class for every kind of packing, and for mixtures.

    Attributes:
        seq_len: S, tokens per row.
        lookahead: tokens after a row that `rows` returns with it: 1 for a model that predicts the next token.
        pad_id: the padding token.
    """

    seq_len: int
    lookahead: int
    pad_id: int

    @property
    def num_rows(self) -> int:
        """Rows of an epoch. UserError (code `unfinished_stream`) where the text has not been read to its end."""

    @property
    def tokens_per_row(self) -> float:
        """Mean number of tokens that are not padding."""

    @property
    def num_available(self) -> float:
        """Positions from 0 that `locate` finds without waiting for a text that is still being tokenized."""

    @property
    def source_names(self) -> tuple[str, ...]:
        """The sources of a mixture; () where there is one."""

    def identity(self) -> dict[str, int | float | bool | str]:
        """What the rows and their order depend on; a checkpoint of other values is not resumed."""
        ...

    def check_trainable(self) -> None:
        """Raises UserError (code `too_little_text`) where the text does not fill one row."""

    def locate(self, positions: np.ndarray, seed: int, shuffle: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """The rows that a run reads at positions counted from its start, over all epochs. Pure arithmetic.

        Args:
            positions: integers of any shape, 0 or more.
            seed: selects the order.
            shuffle: False: rows in the order of the text.

        Returns:
            Numbers for `rows` and epochs from 0, int64 of the shape of `positions`. The lower `NUMBER_BITS` of a number
            are the row's number within its source.
        """

    def rows(self, numbers: np.ndarray) -> RowBlock:
        """The rows with these numbers, `[B]`, each with its lookahead; -1 is a row of padding."""


def join_blocks(parts: Sequence[tuple[np.ndarray, RowBlock]], source_ids: np.ndarray | None = None) -> RowBlock:
    """Joins rows that were read from several places.

    Args:
        parts: the places of some rows among all, int64, and the rows. Every place occurs once.
        source_ids: `[B]`, of the rows together.

    Raises:
        UserError: the documents of some have other columns than those of others (code `other_columns`).
    """
    num_rows, (_, row_len) = sum(len(where) for where, _ in parts), parts[0][1].tokens.shape
    tokens, lengths = np.empty((num_rows, row_len), np.int64), np.empty(num_rows, np.int64)
    boundaries = []
    for where, block in parts:
        tokens[where], lengths[where] = block.tokens, block.lengths
        row, column = np.divmod(block.boundaries, row_len)
        boundaries.append(where[row] * row_len + column)
    if len({tuple(sorted(block.columns)) for _, block in parts}) > 1:
        raise UserError(
            "only some of the text is a corpus with columns, such as the suffixes of domain names",
            key="data.source",
            hint="Prepare all of it alike: with sources of one kind and the same tokenizer.",
            code="other_columns",
        )
    joined = np.concatenate(boundaries)
    order = np.argsort(joined, kind="stable")
    columns = {name: np.concatenate([block.columns[name] for _, block in parts])[order] for name in parts[0][1].columns}
    return RowBlock(tokens, joined[order], lengths, source_ids, columns)


def number_in_source(numbers: np.ndarray) -> np.ndarray:
    """Row numbers without the bits that say which source it is, so that a source's masks do not depend on the others.

    Args:
        numbers: int64 of any shape; -1, padding, stays.
    """
    return np.where(numbers < 0, numbers, numbers & ((1 << NUMBER_BITS) - 1))


def source_fields(rows: Rows, block: RowBlock) -> dict[str, Tensor | tuple[str, ...] | None]:
    """Returns the fields of a `Batch` that say where its rows come from."""
    source_ids = None if block.source_ids is None else from_numpy(block.source_ids)
    return {"source_ids": source_ids, "source_names": rows.source_names}
