"""Rows of equal length from a corpus of documents, packed in one of four ways.

`concat` fills every row and cuts documents at its end. `best_fit` and `next_fit` keep those whole that fit into a row
and leave some positions empty: the first chooses documents that fit together, the second takes them in order, for
billions of short ones. `none` gives each document a row. The datasets are `Rows` (rows.py). Nothing is truncated: what
is cut off a document is in another row, as a document of its own.
"""

import math
from operator import getitem
from typing import Annotated, Literal

import numpy as np

from torchrecipes.config.metadata import Formerly
from torchrecipes.data.batching import best_fit, next_fit
from torchrecipes.data.batching.rows import RowBlock
from torchrecipes.data.batching.shuffle import row_indices
from torchrecipes.data.corpus.corpus import Corpus
from torchrecipes.errors import UserError

Packing = Annotated[Literal["concat", "best_fit", "next_fit", "none"], Formerly(((True, "concat"), (False, "none")))]
SAMPLED_SHARDS = 32  # in which documents that are cut are counted


def make_rows(packing: Packing, corpus: Corpus, seq_len: int, pad_id: int, lookahead: int = 0) -> "PackedRows":
    """Makes rows of a corpus.

    Args:
        packing: `concat` (`PackedDataset`), `best_fit` (`BestFitDataset`), `next_fit` (`NextFitDataset`) or `none`
            (`PaddedDataset`).
        corpus: the documents.
        seq_len: tokens per row.
        pad_id: the padding token.
        lookahead: tokens after a row that `rows` returns with it: 1 for a model that predicts the next token.

    Raises:
        UserError: the corpus has columns, which describe complete documents, and some would be cut (code
            `documents_cut`).
    """
    kinds = {
        "concat": PackedDataset,
        "best_fit": BestFitDataset,
        "next_fit": NextFitDataset,
        "none": PaddedDataset,
    }
    return kinds[packing](corpus, seq_len, pad_id, lookahead)


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
        if corpus.column_names:
            raise UserError(
                f"{corpus.folder} describes each of its documents, and packing=concat cuts documents",
                key="data.packing",
                hint="Set data.packing=next_fit.",
                code="documents_cut",
            )
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


class BestFitDataset:
    """Documents that fit into a row are never cut (best_fit.py); longer ones fill rows, and their ends are packed.

    The plan is made when the rows are opened, at millions of documents a second. It takes 4 bytes of memory for every
    document and packed row, and 12 more for a document longer than a row. Workers make it for themselves. Without
    shuffling, rows come in the order of the plan: those of a shard's long documents first, then its longest pieces.

    Arguments and attributes are those of `PackedDataset`.
    """

    source_names = ()
    num_available = math.inf

    def __init__(self, corpus: Corpus, seq_len: int, pad_id: int, lookahead: int = 0):
        self.corpus, self.seq_len, self.pad_id, self.lookahead = corpus, seq_len, pad_id, lookahead
        _check_documents_fit(corpus, seq_len)
        self._open()
        self.num_rows = int(self._first_row[-1])
        self.tokens_per_row = corpus.num_tokens / self.num_rows

    def _open(self) -> None:
        self._shards = [(shard.tokens, shard.document_offsets) for shard in self.corpus.shards]
        self._plans = [best_fit.plan_rows(offsets, self.seq_len) for _, offsets in self._shards]
        self._first_row = np.cumsum([0, *(plan.num_rows for plan in self._plans)])

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ("_shards", "_plans", "_first_row")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()

    def rows(self, numbers: np.ndarray) -> RowBlock:
        """The rows with these numbers, `[B]`, each with its lookahead; -1 is a row of padding."""
        row_len = self.seq_len + self.lookahead
        tokens = np.full((len(numbers), row_len), self.pad_id, dtype=np.int64)
        flat = tokens.reshape(-1)
        lengths = np.zeros(len(numbers), dtype=np.int64)
        boundaries, documents = [], []
        of_shard = self._first_row.searchsorted(numbers, "right") - 1
        for index in np.unique(of_shard[numbers >= 0]).tolist():
            where = ((of_shard == index) & (numbers >= 0)).nonzero()[0]
            ids, _ = self._shards[index]
            row, document, start, length = self._pieces(index, numbers[where] - self._first_row[index])
            row = where[row]
            before = np.cumsum(length) - length  # tokens of all pieces before a piece
            within = before - before[np.searchsorted(row, row)]  # tokens of its row before it
            target = row * row_len + within
            for to, at, size in zip(target.tolist(), start.tolist(), length.tolist(), strict=True):
                flat[to : to + size] = ids[at : at + size]
            lengths[where] = np.bincount(row, length, len(numbers))[where]
            boundaries.append(target)
            documents.append(document + self.corpus.shards[index].document_offset)
        return _row_block(self.corpus, tokens, lengths, boundaries, documents)

    def _pieces(self, index: int, numbers: np.ndarray) -> tuple[np.ndarray, ...]:
        """The pieces of rows of a shard, row by row.

        Returns:
            Which of `numbers` they are in, their document and start in the shard, and their length.
        """
        plan, (_, offsets) = self._plans[index], self._shards[index]
        is_full = numbers < plan.num_full_rows
        packed = numbers - plan.num_full_rows
        count = np.ones_like(numbers)
        count[~is_full] = plan.row_starts[packed[~is_full] + 1] - plan.row_starts[packed[~is_full]]
        row = np.repeat(np.arange(len(numbers)), count)
        place = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        documents, start, length = (np.empty_like(row) for _ in range(3))

        full = is_full[row]
        long = plan.full_rows.searchsorted(numbers[is_full], "right")
        part = numbers[is_full] - np.where(long > 0, plan.full_rows[long - 1], 0)
        document = documents[full] = plan.long_documents[long]
        start[full] = offsets[document] + part * self.seq_len
        length[full] = np.minimum(offsets[document + 1] - start[full], self.seq_len + self.lookahead)

        piece = plan.row_starts[packed[row[~full]]] + place[~full]
        document = documents[~full] = plan.pieces[piece]
        stop = offsets[document + 1]
        whole = stop - offsets[document]
        size = np.where(whole > self.seq_len, whole % self.seq_len, whole)
        begin = stop - size
        if len(plan.cut_places):
            cut = np.minimum(plan.cut_places.searchsorted(piece), len(plan.cut_places) - 1)
            is_cut = plan.cut_places[cut] == piece
            begin += np.where(is_cut, plan.cut_starts[cut], 0)
            # The token after a part that is not the last of its document is after its row, too.
            size = np.where(is_cut, np.minimum(stop - begin, plan.cut_lengths[cut] + self.lookahead), size)
        start[~full], length[~full] = begin, size
        return row, documents, start, length

    def identity(self) -> dict[str, int | float | bool | str]:
        """What the rows and their order depend on."""
        return _identity(self)

    def check_trainable(self) -> None:
        """Raises UserError (code `too_little_text`) where the text does not fill one row."""
        _check_fills_a_row(self)

    def locate(self, positions: np.ndarray, seed: int, shuffle: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Numbers and epochs of the rows at positions counted from a run's start (see `Rows`)."""
        return row_indices(positions, self.num_rows, seed, shuffle)

    def __str__(self) -> str:
        return _describe(self)


class NextFitDataset:
    """Documents in the order of the corpus, in each row until the next does not fit (next_fit.py).

    The plan is made when the rows are opened, in half a microsecond for each, and takes 4 bytes of memory for it. That
    of a corpus of more than 16 million documents is stored beside it.

    Arguments and attributes are those of `PackedDataset`.
    """

    source_names, num_available = (), math.inf

    def __init__(self, corpus: Corpus, seq_len: int, pad_id: int, lookahead: int = 0):
        self.corpus, self.seq_len, self.pad_id, self.lookahead = corpus, seq_len, pad_id, lookahead
        _check_documents_fit(corpus, seq_len)
        self._open()
        self.num_rows = int(self._first_row[-1])
        self.tokens_per_row = corpus.num_tokens / self.num_rows

    def _open(self) -> None:
        # Plain arrays: a slice of a memmap object costs several microseconds.
        shards = self.corpus.shards
        self._arrays = {
            "tokens": [np.asarray(shard.tokens) for shard in shards],
            "document_offsets": [np.asarray(shard.document_offsets) for shard in shards],
        }
        self._columns = {name: [shard.columns[name] for shard in shards] for name in self.corpus.column_names}
        self._plan, self._first_row = next_fit.plan_corpus(self.corpus, self.seq_len)

    def __getstate__(self) -> dict:
        opened = ("_arrays", "_columns", "_plan", "_first_row")
        return {name: value for name, value in self.__dict__.items() if name not in opened}

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
        numbers = np.asarray(numbers, np.int64)
        of_shard = self._first_row.searchsorted(numbers, "right") - 1  # -1 for a row of padding
        place = numbers + of_shard
        # A row of padding has no documents; one inside a long document has a part of that alone.
        firsts = self._plan[place]
        counts = np.maximum(self._plan[place + 1] - firsts, 1) * (numbers >= 0)

        # Where the documents of a row start and the last one ends, row by row.
        places = _join(self._arrays["document_offsets"], of_shard, firsts, counts + 1)
        ends = np.cumsum(counts + 1) - 1
        starts = places[ends - counts]
        boundaries = places - np.repeat(starts, counts + 1)
        if self.corpus.longest_document > self.seq_len:
            starts += self._parts(numbers, of_shard, place, firsts) * self.seq_len
            boundaries = np.maximum(places - np.repeat(starts, counts + 1), 0)
        lengths = np.minimum(boundaries[ends], row_len)
        tokens = _join(self._arrays["tokens"], of_shard, starts, np.full_like(starts, row_len))
        tokens = tokens.reshape(len(numbers), row_len)
        np.copyto(tokens, self.pad_id, where=np.arange(row_len) >= lengths[:, None])

        boundaries += np.repeat(np.arange(len(numbers)) * row_len, counts + 1)
        columns = {}
        for name, column in self._columns.items():
            columns[name] = _join(column, of_shard, firsts, counts + 1)
            columns[name][ends] = 0
        full = ends[lengths == row_len]
        if len(full):  # without padding at its end
            kept = np.ones(len(boundaries), dtype=bool)
            kept[full] = False
            boundaries, columns = boundaries[kept], {name: column[kept] for name, column in columns.items()}
        return RowBlock(tokens.astype(np.int64), boundaries, lengths, None, columns)

    def _parts(self, numbers: np.ndarray, of_shard: np.ndarray, place: np.ndarray, firsts: np.ndarray) -> np.ndarray:
        """The rows before each in which its first document begins or continues."""
        parts = np.zeros_like(numbers)
        for row in np.flatnonzero(numbers >= 0).tolist():
            begin = self._first_row[of_shard[row]] + of_shard[row]
            parts[row] = place[row] - begin - self._plan[begin : place[row]].searchsorted(firsts[row])
        return parts

    def __str__(self) -> str:
        return _describe(self)


class PaddedDataset:
    """Every row begins with a document and is filled with padding; a longer document takes several rows.

    Arguments and attributes are those of `PackedDataset`.
    """

    source_names, num_available = (), math.inf

    def __init__(self, corpus: Corpus, seq_len: int, pad_id: int, lookahead: int = 0):
        self.corpus, self.seq_len, self.pad_id, self.lookahead = corpus, seq_len, pad_id, lookahead
        _check_documents_fit(corpus, seq_len)
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
        held = length > 0
        return _row_block(self.corpus, tokens, length, [np.flatnonzero(held) * row_len], [documents[held]])

    def __str__(self) -> str:
        return _describe(self)


PackedRows = PackedDataset | BestFitDataset | NextFitDataset | PaddedDataset


def documents_cut(rows: PackedRows) -> float:
    """The share of the documents that are in more than one row. Counted in some shards of a corpus that has many."""
    if not isinstance(rows, PackedDataset) and rows.corpus.longest_document <= rows.seq_len:
        return 0.0
    shards = rows.corpus.shards[:: -(-len(rows.corpus.shards) // SAMPLED_SHARDS)]
    cut = total = 0
    for shard in shards:
        ends = np.asarray(shard.document_offsets)
        if isinstance(rows, PackedDataset):
            ends = ends + shard.token_offset
            cut += int(((ends[1:] - 1) // rows.seq_len > ends[:-1] // rows.seq_len).sum())
        else:
            cut += int((np.diff(ends) > rows.seq_len).sum())
        total += len(ends) - 1
    return cut / total


def _join(arrays: list[np.ndarray], which: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """A piece of some arrays after the other; 0 for what is beyond the end of an array.

    Args:
        arrays: of one type.
        which, starts, sizes: `[B]`, of every piece: its array, start and size.
    """
    # Without a loop in Python, and joined at once, for speed: a slice takes as long as its content.
    chosen = map(arrays.__getitem__, which.tolist())
    pieces = list(map(getitem, chosen, map(slice, starts.tolist(), (starts + sizes).tolist())))
    joined = np.concatenate(pieces)
    if len(joined) < sizes.sum():
        gaps = [np.zeros(size - len(piece), piece.dtype) for size, piece in zip(sizes.tolist(), pieces, strict=True)]
        joined = np.concatenate([part for both in zip(pieces, gaps, strict=True) for part in both])
    return joined


def _row_block(
    corpus: Corpus,
    tokens: np.ndarray,
    lengths: np.ndarray,
    boundaries: list[np.ndarray],
    documents: list[np.ndarray],
) -> RowBlock:
    """The block of some rows.

    Args:
        corpus: where they come from.
        tokens: `[B, L]` int64, padded.
        lengths: `[B]`, tokens of each row before its padding.
        boundaries: where documents start, in any order.
        documents: the numbers of these.
    """
    row_starts = np.arange(len(lengths)) * tokens.shape[1]
    padded = (row_starts + lengths)[lengths < tokens.shape[1]]
    starts = np.concatenate([*boundaries, padded])
    order = np.argsort(starts, kind="stable")
    numbers, columns = np.concatenate([np.empty(0, np.int64), *documents]), {}
    for name in corpus.column_names:
        values = np.zeros(len(starts), corpus.shards[0].columns[name].dtype)
        values[: len(starts) - len(padded)] = _column_values(corpus, name, numbers)
        columns[name] = values[order]
    return RowBlock(tokens, starts[order], lengths, None, columns)


def _column_values(corpus: Corpus, name: str, documents: np.ndarray) -> np.ndarray:
    firsts = np.array([shard.document_offset for shard in corpus.shards])
    of_shard = firsts.searchsorted(documents, "right") - 1
    values = np.empty(len(documents), corpus.shards[0].columns[name].dtype)
    for index in np.unique(of_shard).tolist():
        mine = of_shard == index
        values[mine] = corpus.shards[index].columns[name][documents[mine] - firsts[index]]
    return values


def _check_documents_fit(corpus: Corpus, seq_len: int) -> None:
    """Columns describe complete documents."""
    if corpus.column_names and corpus.longest_document > seq_len:
        raise UserError(
            f"{corpus.folder} describes each of its documents, and the longest, {corpus.longest_document} tokens, "
            f"would be cut to rows of {seq_len}",
            key="seq_len",
            hint=f"Set seq_len={corpus.longest_document} or more.",
            code="documents_cut",
        )


def _identity(rows: PackedRows) -> dict[str, int | float | bool | str]:
    kind = f"{type(rows).__name__}, {rows.num_rows} of {rows.seq_len} tokens"
    return {"corpus": rows.corpus.fingerprint, "rows": kind}


def _check_fills_a_row(rows: PackedRows) -> None:
    if rows.corpus.num_tokens < rows.seq_len:
        raise UserError(
            f"{rows.corpus.folder}: {rows.corpus.num_tokens} tokens do not fill one row of seq_len={rows.seq_len}",
            key="seq_len",
            hint="Give more text, or lower seq_len.",
            code="too_little_text",
        )


def _describe(rows: PackedRows) -> str:
    return (
        f"{rows.corpus.num_documents:,} documents, {rows.corpus.num_tokens:,} tokens, {rows.num_rows:,} rows of "
        f"{rows.seq_len}, {rows.tokens_per_row:.1f} tokens used per row ({rows.tokens_per_row / rows.seq_len:.1%}), "
        f"{documents_cut(rows):.1%} of the documents cut"
    )
