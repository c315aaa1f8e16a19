"""Rows of equal length from a corpus of documents, packed or one document each.

The datasets are `Rows` (rows.py). Nothing is truncated: a document that is longer than what is left of its row
continues in another row, as a document of its own.
"""

import math

import numpy as np

from torchrecipes.data.batching.rows import RowBlock
from torchrecipes.data.batching.shuffle import row_indices
from torchrecipes.data.corpus.corpus import Corpus
from torchrecipes.errors import UserError


class PackedDataset:
    """Row i holds the tokens from `i * S` to `(i + 1) * S` of the corpus; the last row is filled with padding.

    Args:
        corpus: the documents.
        seq_len: S, tokens per row.
        pad_id: the padding token.
        lookahead: tokens after a row that `rows` returns with it: 1 for a model that predicts the next token.

    Attributes:
        num_rows: rows in the corpus.
        tokens_per_row: mean number of tokens that are not padding.
        source_names: (), one source.
    """

    source_names, num_available = (), math.inf

    def __init__(self, corpus: Corpus, seq_len: int, pad_id: int, lookahead: int = 0):
        self.corpus, self.seq_len, self.pad_id, self.lookahead = corpus, seq_len, pad_id, lookahead
        self.num_rows = -(-corpus.num_tokens // seq_len)
        self.tokens_per_row = corpus.num_tokens / self.num_rows
        self._open()

    def _open(self) -> None:
        # Plain arrays: a slice of a memmap object costs several microseconds.
        self._shards = [
            (np.asarray(shard.tokens), np.asarray(shard.document_offsets), shard.token_offset)
            for shard in self.corpus.shards
        ]
        self._first = np.array([offset for _, _, offset in self._shards])

    def __getstate__(self) -> dict:
        # A worker process opens the corpus by its path: pickled arrays would be a copy of it.
        return {name: value for name, value in self.__dict__.items() if name not in ("_shards", "_first")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()

    def identity(self) -> dict[str, int | float | bool | str]:
        """What the rows and their order depend on."""
        return _identity(self)

    def check_trainable(self) -> None:
        """Raises UserError (code `too_little_text`) where the text does not fill one row."""
        _check_fills_a_row(self)

    def locate(self, positions: np.ndarray, seed: int, shuffle: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Numbers and epochs of the rows at positions counted from a run's start (see `Rows`)."""
        return row_indices(positions, self.num_rows, seed, shuffle)

    def rows(self, numbers: np.ndarray) -> RowBlock:
        """The rows with these numbers, `[B]`, each with its lookahead; -1 is a row of padding."""
        row_len = self.seq_len + self.lookahead
        tokens = np.empty((len(numbers), row_len), dtype=np.int64)
        boundaries = [np.arange(len(numbers)) * row_len]
        starts = numbers * self.seq_len
        of_shard = self._first.searchsorted(starts, "right") - 1
        for index in set(of_shard.tolist()):
            ids, offsets, first = self._shards[max(index, 0)]
            inside = (of_shard == index) & (numbers >= 0) & (starts + row_len <= first + len(ids))
            where = inside.nonzero()[0]
            local = starts[where] - first
            for row, start in zip(where.tolist(), local.tolist(), strict=True):
                tokens[row] = ids[start : start + row_len]
            low, high = offsets.searchsorted(local, "right"), offsets.searchsorted(local + row_len)
            count = high - low
            total = int(count.sum())
            within = np.arange(total) - np.repeat(np.cumsum(count) - count, count)
            boundaries.append(offsets[within + np.repeat(low, count)] + np.repeat(where * row_len - local, count))
            of_shard[where] = -2  # done
        for row in (of_shard != -2).nonzero()[0].tolist():  # the few that cross into the next shard, the last, padding
            boundaries.append(self._read_slowly(tokens[row], int(numbers[row])) + row * row_len)
        lengths = np.where(numbers < 0, 0, np.clip(self.corpus.num_tokens - starts, 0, row_len))
        return RowBlock(tokens, np.sort(np.concatenate(boundaries)), lengths)

    def _read_slowly(self, out: np.ndarray, number: int) -> np.ndarray:
        """Writes a row into `out` and returns the boundaries inside it."""
        if number < 0:
            out[:] = self.pad_id
            return np.empty(0, dtype=np.int64)
        start = number * self.seq_len
        stop = min(start + len(out), self.corpus.num_tokens)
        out[: stop - start] = self.corpus.read(start, stop)
        out[stop - start :] = self.pad_id
        padding = [stop - start] if stop - start < len(out) else []
        return np.concatenate([self.corpus.boundaries(start, stop) - start, padding]).astype(np.int64)

    def __str__(self) -> str:
        return _describe(self)


class PaddedDataset:
    """Every row begins with a document and is filled with padding; a longer document takes several rows.

    Arguments and attributes are those of `PackedDataset`.
    """

    source_names, num_available = (), math.inf

    def __init__(self, corpus: Corpus, seq_len: int, pad_id: int, lookahead: int = 0):
        self.corpus, self.seq_len, self.pad_id, self.lookahead = corpus, seq_len, pad_id, lookahead
        self._open()
        self.num_rows = corpus.num_documents if self._last_row is None else int(self._last_row[-1])
        self.tokens_per_row = corpus.num_tokens / self.num_rows

    def _open(self) -> None:
        self._last_row = None  # of each document, exclusive; only where some document takes several rows
        if self.corpus.longest_document > self.seq_len:
            lengths = [np.diff(shard.document_offsets) for shard in self.corpus.shards]
            self._last_row = np.cumsum(-(-np.concatenate(lengths) // self.seq_len))

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_last_row"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()

    def identity(self) -> dict[str, int | float | bool | str]:
        """What the rows and their order depend on."""
        return _identity(self)

    def check_trainable(self) -> None:
        """Raises UserError (code `too_little_text`) where the text does not fill one row."""
        _check_fills_a_row(self)

    def locate(self, positions: np.ndarray, seed: int, shuffle: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Numbers and epochs of the rows at positions counted from a run's start (see `Rows`)."""
        return row_indices(positions, self.num_rows, seed, shuffle)

    def rows(self, numbers: np.ndarray) -> RowBlock:
        """The rows with these numbers, `[B]`, each with its lookahead; -1 is a row of padding."""
        row_len = self.seq_len + self.lookahead
        if self._last_row is None:
            documents, part = np.maximum(numbers, 0), 0
        else:
            documents = self._last_row.searchsorted(np.maximum(numbers, 0), "right")
            part = numbers - np.where(documents > 0, self._last_row[documents - 1], 0)
        starts, stops = self.corpus.spans(documents)
        starts = starts + part * self.seq_len
        length = np.where(numbers < 0, 0, np.minimum(stops - starts, row_len))
        tokens = np.full((len(numbers), row_len), self.pad_id, dtype=np.int64)
        for row, (start, size) in enumerate(zip(starts.tolist(), length.tolist(), strict=True)):
            if size:
                tokens[row, :size] = self.corpus.read(start, start + size)
        row_starts = np.arange(len(numbers)) * row_len
        padded = (length > 0) & (length < row_len)
        return RowBlock(tokens, np.sort(np.concatenate([row_starts, (row_starts + length)[padded]])), length)

    def __str__(self) -> str:
        return _describe(self)


def _identity(rows: PackedDataset | PaddedDataset) -> dict[str, int | float | bool | str]:
    kind = f"{type(rows).__name__}, {rows.num_rows} of {rows.seq_len} tokens"
    return {"corpus": rows.corpus.fingerprint, "rows": kind}


def _check_fills_a_row(rows: PackedDataset | PaddedDataset) -> None:
    if rows.corpus.num_tokens < rows.seq_len:
        raise UserError(
            f"{rows.corpus.folder}: {rows.corpus.num_tokens} tokens do not fill one row of seq_len={rows.seq_len}",
            key="seq_len",
            hint="Give more text, or lower seq_len.",
            code="too_little_text",
        )


def _describe(rows: PackedDataset | PaddedDataset) -> str:
    return (
        f"{rows.corpus.num_documents:,} documents, {rows.corpus.num_tokens:,} tokens, {rows.num_rows:,} rows of "
        f"{rows.seq_len}, {rows.tokens_per_row:.1f} tokens used per row ({rows.tokens_per_row / rows.seq_len:.1%})"
    )
