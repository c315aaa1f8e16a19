import pickle

import numpy as np
import pytest

from torchrecipes.data.batching.packing import PackedDataset, PaddedDataset
from torchrecipes.data.corpus.corpus import prepare_corpus
from torchrecipes.data.sources.text_files import files
from torchrecipes.data.tokenizers.load import train_wordpiece

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


@pytest.mark.parametrize("kind", [PackedDataset, PaddedDataset])
@pytest.mark.parametrize("row_len", ROW_LENGTHS)
def test_rows_are_the_same_alone_and_in_any_company(made, kind, row_len):
    corpus, tokenizer, _ = made
    rows = kind(corpus, row_len, tokenizer.pad_id)
    numbers = np.random.default_rng(1).permutation(rows.num_rows)[:40]
    block = rows.rows(numbers)
    together = segments(block)
    alone = [piece for number in numbers for piece in segments(rows.rows(np.array([number])))]
    assert together == alone


@pytest.mark.parametrize("kind", [PackedDataset, PaddedDataset])
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


@pytest.mark.parametrize("kind", [PackedDataset, PaddedDataset])
def test_a_worker_process_opens_the_corpus_by_its_path(made, kind):
    corpus, tokenizer, _ = made
    rows = kind(corpus, 16, tokenizer.pad_id, lookahead=1)
    data = pickle.dumps(rows)
    copy, numbers = pickle.loads(data), np.arange(-1, rows.num_rows)
    assert len(data) < 1000 < corpus.num_tokens
    for name in ("tokens", "boundaries", "lengths"):
        assert np.array_equal(getattr(copy.rows(numbers), name), getattr(rows.rows(numbers), name))
