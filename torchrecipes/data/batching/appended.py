"""`AppendedRows`: rows of a corpus that text has been added to, some of it perhaps while a run was stopped.

1. What a run has read comes from the corpus as it was then: `Corpus.before_additions` gives it, and the order of its
   rows is arithmetic.
2. At the position where the run continues over the larger corpus, a new epoch begins, over all of it: every row comes
   once in the epoch, whatever was read before.
3. So the rows of a run are segments, (first position, fingerprint of the corpus), which checkpoints hold.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from torchrecipes.data.batching.rows import RowBlock, Rows, join_blocks
from torchrecipes.data.corpus.corpus import Corpus

SEGMENT_BIT = 40  # of a row's number: the bits from here on, below those of a mixture's source, are the segment


class _Segment(NamedTuple):
    first: int  # position in the run
    epoch: int  # its first epoch
    fingerprint: str
    rows: Rows


class AppendedRows:
    """Rows of a corpus with additions.

    Args:
        corpus: as it is now.
        make_rows: makes rows of a corpus: a packing with its arguments.

    Attributes:
        corpus: as given.
        seq_len, lookahead, pad_id, num_rows, tokens_per_row, num_available: those of the rows of all of it.
        source_names: (), one source.
    """

    source_names = ()

    def __init__(self, corpus: Corpus, make_rows: Callable[[Corpus], Rows]):
        self.corpus, self._make_rows = corpus, make_rows
        self._current = current = make_rows(corpus)
        self.seq_len, self.lookahead, self.pad_id = current.seq_len, current.lookahead, current.pad_id
        self.num_rows, self.tokens_per_row = current.num_rows, current.tokens_per_row
        self.num_available = current.num_available
        self._segments = [_Segment(0, 0, corpus.fingerprint, current)]

    def identity(self) -> dict[str, int | float | bool | str]:
        """What the rows and their order depend on, beside the segments."""
        return self._current.identity()

    def check_trainable(self) -> None:
        """Raises UserError (code `too_little_text`) where the text does not fill one row."""
        self._current.check_trainable()

    def locate(self, positions: np.ndarray, seed: int, shuffle: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Numbers and epochs of the rows at positions counted from a run's start (see `Rows`)."""
        positions = np.asarray(positions, dtype=np.int64)
        numbers, epochs = np.empty_like(positions), np.empty_like(positions)
        of_segment = np.searchsorted([segment.first for segment in self._segments], positions, "right") - 1
        for index in np.unique(of_segment).tolist():
            mine, segment = of_segment == index, self._segments[index]
            # As if the epochs before had been of this segment, too: each has an order of its own.
            within = positions[mine] - segment.first + segment.epoch * segment.rows.num_rows
            local, epochs[mine] = segment.rows.locate(within, seed, shuffle)
            numbers[mine] = local | index << SEGMENT_BIT
        return numbers, epochs

    def rows(self, numbers: np.ndarray) -> RowBlock:
        """The rows with these numbers, `[B]`, each with its lookahead; -1 is a row of padding."""
        numbers = np.asarray(numbers, dtype=np.int64)
        # Rows of padding go with those of the last segment.
        of_segment = np.where(numbers < 0, len(self._segments) - 1, numbers >> SEGMENT_BIT)
        local = np.where(numbers < 0, numbers, numbers & ((1 << SEGMENT_BIT) - 1))
        found = np.unique(of_segment).tolist()
        if len(found) == 1:
            return self._segments[found[0]].rows.rows(local)
        places = [(of_segment == index).nonzero()[0] for index in found]
        read = (self._segments[index].rows.rows(local[where]) for index, where in zip(found, places, strict=True))
        return join_blocks(list(zip(places, read, strict=True)))

    def state_dict(self) -> list[list[Any]]:
        """The segments, as [first position, fingerprint of the corpus]."""
        return [[segment.first, segment.fingerprint] for segment in self._segments]

    def free_to_differ(self, state: Mapping[str, Any]) -> set[str]:
        """Keys of `identity` that need not be those of a checkpoint whose corpus was this one before additions.

        Args:
            state: of a `Loader`.
        """
        fingerprints = [fingerprint for _, fingerprint in _saved_segments(state)]
        if not set(fingerprints) <= set(self.corpus.lineage):
            return set()
        earlier = self._make_rows(self.corpus.before_additions(fingerprints[-1])).identity()
        return set(earlier) if all(state.get(key) == value for key, value in earlier.items()) else set()

    def load_state_dict(self, state: Mapping[str, Any], first_row: int, *, rollback: bool = False) -> int:
        """Takes over the segments of a state, and continues over the whole corpus from a row of the run on.

        Args:
            state: of a `Loader`, for which `free_to_differ` allows another corpus.
            first_row: the row to continue with.
            rollback: what was read up to `first_row` are the segments of this object, not the state's.

        Returns:
            Documents that have been added since the state was taken; a new epoch begins if there are any.
        """
        saved = self.state_dict() if rollback else _saved_segments(state)
        past = [(first, fingerprint) for first, fingerprint in saved if first < first_row]
        since = self.corpus.before_additions(past[-1][1]).num_documents if past else self.corpus.num_documents
        if not past or past[-1][1] != self.corpus.fingerprint:
            past.append((first_row, self.corpus.fingerprint))
        self._segments = []
        for first, fingerprint in past:
            is_current = fingerprint == self.corpus.fingerprint
            rows = self._current if is_current else self._make_rows(self.corpus.before_additions(fingerprint))
            epoch = 0
            if self._segments:
                last = self._segments[-1]
                epoch = last.epoch + -(-(first - last.first) // last.rows.num_rows)
            self._segments.append(_Segment(first, epoch, fingerprint, rows))
        return self.corpus.num_documents - since

    def __str__(self) -> str:
        number = len(self.corpus.additions)
        return f"{self._current}; {number} addition{'s' * (number > 1)} included"


def rows_of_corpus(corpus: Corpus, make_rows: Callable[[Corpus], Rows]) -> Rows:
    """Makes the rows that a run trains on: `AppendedRows` where there are additions."""
    return AppendedRows(corpus, make_rows) if corpus.additions else make_rows(corpus)


def _saved_segments(state: Mapping[str, Any]) -> list[list[Any]]:
    return state.get("segments") or [[0, state.get("corpus")]]
