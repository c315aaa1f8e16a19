"""`Rows`: what a `Loader` reads, and `RowBlock`: what it gets."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor, from_numpy

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
    """

    tokens: np.ndarray
    boundaries: np.ndarray
    lengths: np.ndarray
    source_ids: np.ndarray | None = None


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
