import pickle

import numpy as np
import pytest

from torchrecipes.data.batching.best_fit import best_fit_decreasing, plan_rows
from torchrecipes.data.batching.packing import (
    BestFitDataset,
    NextFitDataset,
    PackedDataset,
    PaddedDataset,
    documents_cut,
    make_rows,
)
from torchrecipes.data.corpus.corpus import prepare_corpus
from torchrecipes.data.sources.text_files import files
from torchrecipes.data.tokenizers.load import train_wordpiece

KINDS = [PackedDataset, BestFitDataset, NextFitDataset, PaddedDataset]
ROW_LENGTHS = [4, 7, 16, 64, 1000]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A corpus of several small shards, and its documents as lists of ids."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("made")
    texts = [" ".join(rng.choice(["one", "two", "three", "four"], rng.integers(1, 60))) for _ in range(150)]
    (folder / "text.txt").write_text("\n".join(texts))
    source = files(str(folder / "text.txt"), sample_by="line")
    tokenizer = train_wordpiece(source, vocab_size=64)
    corpus, _ = prepare_corpus(
        folder / "c", source, tokenizer, validation_fraction=0, tokenizer_threads=0, shard_tokens=700
    )
    assert len(corpus.shards) > 3
    return corpus, tokenizer, [tokenizer.encode(text) for text in texts]


def segments(block):
    """The pieces of rows between boundaries, as lists."""
    flat = block.tokens.reshape(-1)
    return [piece.tolist() for piece in np.split(flat, block.boundaries[1:])]


@pytest.mark.parametrize("row_len", ROW_LENGTHS)
def test_packed_rows_hold_every_token_once_in_order(made, row_len):
    corpus, tokenizer, documents = made
    rows = PackedDataset(corpus, row_len, tokenizer.pad_id)
    stream = [token for document in documents for token in document]
    block = rows.rows(np.arange(rows.num_rows))
    flat = block.tokens.reshape(-1)
    assert flat[: len(stream)].tolist() == stream
    assert (flat[len(stream) :] == tokenizer.pad_id).all()
    assert rows.tokens_per_row == len(stream) / rows.num_rows

    starts = np.cumsum([0, *(len(document) for document in documents)])
    expected = set(starts.tolist()) | set(range(0, flat.size, row_len))
    assert block.boundaries.tolist() == sorted(b for b in expected if b < flat.size)


@pytest.mark.parametrize("row_len", ROW_LENGTHS)
def test_document_rows_hold_every_document_whole_and_nothing_else(made, row_len):
    corpus, tokenizer, documents = made
    rows = PaddedDataset(corpus, row_len, tokenizer.pad_id)
    expected = [document[i : i + row_len] for document in documents for i in range(0, len(document), row_len)]
    assert rows.num_rows == len(expected)
    block = rows.rows(np.arange(rows.num_rows))
    for row, piece in zip(block.tokens, expected, strict=True):
        assert row.tolist() == piece + [tokenizer.pad_id] * (row_len - len(piece))
    starts = [i * row_len for i in range(len(expected))]
    pads = [start + len(piece) for start, piece in zip(starts, expected, strict=True) if len(piece) < row_len]
    assert block.boundaries.tolist() == sorted(starts + pads)


def slow_best_fit(lengths, seq_len):
    """The rows as lists of pieces, placed one by one into the row with the least space that is enough."""
    rows, queues = [], {}
    for piece in sorted((n for n in range(len(lengths)) if lengths[n]), key=lambda n: -lengths[n]):
        space = min((s for s, queue in queues.items() if queue and s >= lengths[piece]), default=None)
        if space is None:
            rows.append([])
            row, space = len(rows) - 1, seq_len
        else:
            row = queues[space].pop(0)
        rows[row].append(piece)
        queues.setdefault(space - lengths[piece], []).append(row)
    return rows


@pytest.mark.parametrize("seq_len", [1, 2, 7, 16, 33])
def test_the_plan_is_that_of_best_fit_decreasing(seq_len):
    rng = np.random.default_rng(seq_len)
    for count in (0, 1, 3, 20, 150, 400):
        skew = rng.choice([0.3, 1, 3])
        lengths = np.floor(rng.random(count) ** skew * (seq_len + 1)).astype(np.int64)
        row_of, order = best_fit_decreasing(lengths, seq_len)
        found = [order[row_of == row].tolist() for row in range(max(row_of, default=-1) + 1)]
        assert found == slow_best_fit(lengths.tolist(), seq_len)


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("row_len", [*ROW_LENGTHS, 33, 40])
def test_best_fit_rows_hold_every_token_once_and_cut_only_documents_that_do_not_fit(made, row_len, lookahead):
    corpus, tokenizer, documents = made
    rows = BestFitDataset(corpus, row_len, tokenizer.pad_id, lookahead)
    block = rows.rows(np.arange(rows.num_rows))
    shards = [(index, shard.token_offset) for index, shard in enumerate(corpus.shards)]
    pieces = [
        (first + start, size)
        for index, first in shards
        for _, _, start, size in zip(*rows._pieces(index, np.arange(rows._plans[index].num_rows)), strict=True)
    ]
    stops = np.cumsum([len(document) for document in documents])
    starts_at, found = dict(pieces), []
    for tokens, length in zip(block.tokens, block.lengths.tolist(), strict=True):
        assert tokens[length:].tolist() == [tokenizer.pad_id] * (row_len + lookahead - length)
        held = min(length, row_len)
        while held > 0:
            start, size = pieces[len(found)]
            found.append(start)
            inside = min(size, held)
            assert tokens[min(length, row_len) - held :][:size].tolist() == corpus.read(start, start + size).tolist()
            held -= inside
            document = int(stops.searchsorted(start, "right"))
            assert start + size <= stops[document]
            is_whole = inside == len(documents[document])
            assert is_whole or len(documents[document]) > row_len
            # Where a document continues, its next token is there: after the end of the row.
            assert inside + (lookahead if start + inside < stops[document] else 0) == size
            starts_at[start] = inside
    assert len(found) == len(pieces)
    covered = 0
    for start in sorted(starts_at):
        assert start == covered
        covered += starts_at[start]
    assert covered == corpus.num_tokens
    assert rows.tokens_per_row * rows.num_rows == pytest.approx(corpus.num_tokens)


def slow_next_fit(documents, seq_len, lookahead, first_of_shards):
    """The rows as lists of pieces; a piece that continues shows its next tokens."""
    rows, used = [], seq_len
    for number, document in enumerate(documents):
        if used + len(document) > seq_len or number in first_of_shards:
            rows.append([])
            used = 0
        while len(document) > seq_len:
            rows[-1].append(document[: seq_len + lookahead])
            rows.append([])
            document = document[seq_len:]
        rows[-1].append(document)
        used += len(document)
    return rows


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("row_len", ROW_LENGTHS)
def test_next_fit_rows_take_documents_in_order_until_one_does_not_fit(made, row_len, lookahead):
    corpus, tokenizer, documents = made
    rows = NextFitDataset(corpus, row_len, tokenizer.pad_id, lookahead)
    expected = slow_next_fit(documents, row_len, lookahead, {shard.document_offset for shard in corpus.shards})
    assert rows.num_rows == len(expected)
    block, width = rows.rows(np.arange(rows.num_rows)), row_len + lookahead
    found = [[] for _ in expected]
    for start, piece in zip(block.boundaries.tolist(), segments(block), strict=True):
        found[start // width].append(piece)
    for row, pieces, length in zip(found, expected, block.lengths.tolist(), strict=True):
        held = sum(map(len, pieces))
        assert length == held and row == pieces + ([[tokenizer.pad_id] * (width - held)] if held < width else [])


@pytest.mark.parametrize("longest", [1.9, 3.0])
def test_ends_of_long_documents_fill_what_best_fit_leaves(longest):
    # None of these fits beside another: best fit alone leaves a quarter of the positions.
    lengths = np.random.default_rng(0).uniform(0.6, longest, 2000) * 512
    offsets = np.concatenate([[0], np.cumsum(lengths.astype(np.int64))])
    plan = plan_rows(offsets, 512)
    ends = np.diff(offsets)
    ends = np.where(ends > 512, ends % 512, ends)
    unfilled = len(np.unique(best_fit_decreasing(ends, 512)[0])) + plan.num_full_rows
    assert offsets[-1] / (unfilled * 512) < 0.985 < 0.99 <= offsets[-1] / (plan.num_rows * 512)


def test_a_document_of_whole_rows_leaves_nothing_to_pack():
    plan = plan_rows(np.array([0, 8, 12, 24]), 4)
    assert plan.num_full_rows == 5 and plan.num_rows == 6 and plan.pieces.tolist() == [1]
    alone = plan_rows(np.array([0, 8]), 4)
    assert alone.num_rows == 2 and len(alone.pieces) == 0


def test_a_plan_is_full_and_small():
    lengths = np.random.default_rng(0).lognormal(5, 1, 50_000).astype(np.int64) + 1
    plan = plan_rows(np.concatenate([[0], np.cumsum(lengths)]), 512)
    assert lengths.sum() / (plan.num_rows * 512) > 0.999
    is_long = lengths > 512
    assert sum(array.nbytes for array in plan) <= 4 * (len(lengths) + plan.num_rows + 1) + 12 * is_long.sum()


@pytest.mark.parametrize("kind", KINDS)
def test_the_share_of_documents_that_are_cut(made, kind):
    corpus, tokenizer, documents = made
    rows = kind(corpus, 64, tokenizer.pad_id)
    start, cut = 0, 0
    for document in documents:
        stop = start + len(document)
        cut += len(document) > 64 if kind is not PackedDataset else start // 64 != (stop - 1) // 64
        start = stop
    assert documents_cut(rows) == cut / len(documents)
    assert f"{cut / len(documents):.1%}" in str(rows)


@pytest.mark.parametrize(("packing", "kind"), [*zip(["concat", "best_fit", "next_fit", "none"], KINDS, strict=True)])
def test_rows_by_the_name_of_their_packing(made, packing, kind):
    corpus, tokenizer, _ = made
    rows = make_rows(packing, corpus, 16, tokenizer.pad_id, lookahead=1)
    assert type(rows) is kind and (rows.seq_len, rows.pad_id, rows.lookahead) == (16, tokenizer.pad_id, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row_len", ROW_LENGTHS)
def test_rows_are_the_same_alone_and_in_any_company(made, kind, row_len):
    corpus, tokenizer, _ = made
    rows = kind(corpus, row_len, tokenizer.pad_id)
    numbers = np.random.default_rng(1).permutation(rows.num_rows)[:40]
    block = rows.rows(numbers)
    together = segments(block)
    alone = [piece for number in numbers for piece in segments(rows.rows(np.array([number])))]
    assert together == alone


@pytest.mark.parametrize("kind", KINDS)
def test_row_minus_one_is_padding(made, kind):
    corpus, tokenizer, _ = made
    rows = kind(corpus, 16, tokenizer.pad_id)
    block = rows.rows(np.array([3, -1]))
    assert (block.tokens[1] == tokenizer.pad_id).all()
    assert block.boundaries[block.boundaries >= 16].tolist() == [16]


def test_it_says_what_it_holds(made):
    corpus, tokenizer, _ = made
    text = str(PackedDataset(corpus, 16, tokenizer.pad_id))
    assert "150 documents" in text and "rows of 16" in text and "tokens used per row" in text


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_process_opens_the_corpus_by_its_path(made, kind):
    corpus, tokenizer, _ = made
    rows = kind(corpus, 16, tokenizer.pad_id, lookahead=1)
    data = pickle.dumps(rows)
    copy, numbers = pickle.loads(data), np.arange(-1, rows.num_rows)
    assert len(data) < 1000 < corpus.num_tokens
    for name in ("tokens", "boundaries", "lengths"):
        assert np.array_equal(getattr(copy.rows(numbers), name), getattr(rows.rows(numbers), name))
