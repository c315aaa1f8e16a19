"""Rows of a corpus whose shards hold numbers of every document."""

from itertools import pairwise

import numpy as np
import pytest

from torchrecipes.data.batching import MixtureRows, make_rows, next_fit
from torchrecipes.data.batching.packing import NextFitDataset
from torchrecipes.data.corpus import prepare_corpus
from torchrecipes.data.domains import DomainCollator, domain_names, domain_tokenizer
from torchrecipes.data.sources import files
from torchrecipes.data.tokenizers import train_wordpiece
from torchrecipes.errors import UserError

WHOLE = ("best_fit", "next_fit", "none")  # packings that cut no document that fits


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A corpus of names in several shards, its tokenizer, and its documents: tokens with their two numbers."""
    folder, rng = tmp_path_factory.mktemp("names"), np.random.default_rng(0)
    suffixes = rng.choice(["com", "co.uk", "org", "museum"], 200, p=[0.5, 0.2, 0.2, 0.1])
    labels = ["".join(rng.choice(list("abc123"), rng.integers(1, 20))) for _ in suffixes]
    names = [f"{label}x{i}.{suffix}" for i, (label, suffix) in enumerate(zip(labels, suffixes, strict=True))]
    (folder / "names.txt").write_text("\n".join(names))
    source = domain_names(str(folder / "names.txt"))
    tokenizer = domain_tokenizer(source)
    corpus, _ = prepare_corpus(folder / "c", source, tokenizer, 0, tokenizer_threads=0, shard_tokens=1000)
    assert len(corpus.shards) > 2 and set(corpus.column_names) == {"suffix_ids", "suffix_starts"}
    documents = {}
    for shard in corpus.shards:
        offsets = shard.document_offsets
        for index, (start, end) in enumerate(pairwise(offsets)):
            values = tuple(int(shard.columns[name][index]) for name in ("suffix_ids", "suffix_starts"))
            documents[tuple(shard.tokens[start:end].tolist())] = values
    return corpus, tokenizer, documents


def pieces(block):
    """Tokens of every document of a block, with its numbers; those of padding must be 0."""
    found, flat = [], block.tokens.reshape(-1)
    columns = [block.columns[name] for name in ("suffix_ids", "suffix_starts")]
    for index, piece in enumerate(np.split(flat, block.boundaries[1:])):
        values = tuple(int(column[index]) for column in columns)
        if piece.any():
            found.append((tuple(piece.tolist()), values))
        else:
            assert values == (0, 0)
    assert all(len(column) == len(block.boundaries) for column in columns)
    return found


@pytest.mark.parametrize("packing", WHOLE)
@pytest.mark.parametrize("row_len", [40, 128, 4096])
def test_every_document_of_a_row_has_its_numbers(made, packing, row_len):
    corpus, tokenizer, documents = made
    rows = make_rows(packing, corpus, row_len, tokenizer.pad_id)
    numbers = np.random.default_rng(1).permutation(np.arange(-1, rows.num_rows))
    found = pieces(rows.rows(numbers))
    assert len(found) == len(documents) and dict(found) == documents
    assert not pieces(rows.rows(np.array([-1, -1])))


def test_a_mixture_keeps_them(made):
    corpus, tokenizer, documents = made
    parts = {packing: make_rows(packing, corpus, 128, tokenizer.pad_id) for packing in ("next_fit", "best_fit")}
    mixture = MixtureRows(parts, {"next_fit": 1, "best_fit": 1})
    numbers, _ = mixture.locate(np.arange(30), seed=0)
    found = pieces(mixture.rows(numbers))
    assert len(found) > 100 and all(documents[tokens] == values for tokens, values in found)


def test_a_mixture_of_corpora_with_and_without_is_refused(made, tmp_path):
    corpus, tokenizer, _ = made
    (tmp_path / "text.txt").write_text("one two three four\n" * 40)
    source = files(str(tmp_path / "text.txt"), sample_by="line")
    text, _ = prepare_corpus(tmp_path / "c", source, train_wordpiece(source, vocab_size=64), 0, tokenizer_threads=0)
    parts = {"names": make_rows("next_fit", corpus, 128, 0), "text": make_rows("next_fit", text, 128, 0)}
    mixture = MixtureRows(parts, {"names": 1, "text": 1})
    with pytest.raises(UserError) as error:
        mixture.rows(mixture.locate(np.arange(30), seed=0)[0])
    assert error.value.code == "other_columns"
    with pytest.raises(UserError) as error:
        DomainCollator(tokenizer).batch(parts["text"], np.array([0]), np.zeros(1, np.uint64))
    assert error.value.code == "no_suffixes"


CUT = [("concat", 128, "data.packing"), *((packing, 16, "seq_len") for packing in WHOLE)]


@pytest.mark.parametrize(("packing", "row_len", "key"), CUT)
def test_documents_with_numbers_are_not_cut(made, packing, row_len, key):
    corpus, tokenizer, _ = made
    with pytest.raises(UserError) as error:
        make_rows(packing, corpus, row_len, tokenizer.pad_id)
    assert (error.value.key, error.value.code) == (key, "documents_cut")


def test_a_batch_of_names(made):
    corpus, tokenizer, _ = made
    rows = NextFitDataset(corpus, 128, tokenizer.pad_id)
    numbers, collator = np.arange(-1, 3), DomainCollator(tokenizer, suffix_probability=0.5)
    batch = collator.batch(rows, numbers, np.arange(4, dtype=np.uint64))
    tokens = batch.input_ids.flatten().clone()
    used = batch.masked_labels >= 0
    tokens[batch.masked_positions[used]] = batch.masked_labels[used]
    assert tokens.reshape(4, 128).tolist() == rows.rows(numbers).tokens.tolist()
    assert batch.num_targets == used.sum() > 0 and batch.max_seqlen == 128
    # What the tokenizer says of the masked names: inference sees them so, too. Without a suffix or the dot before it
    # the tokenizer cannot tell where the suffix starts, which the corpus says.
    ends = batch.cu_seqlens.diff().numpy()
    types = tokenizer.token_type_ids(tokens.numpy(), ends)
    shown = tokenizer.token_type_ids(batch.input_ids.flatten().numpy(), ends)
    hidden = set(batch.class_positions[batch.class_labels >= 0].tolist())
    assert len(hidden) > 5
    for start, size in zip(batch.cu_seqlens[:-1].tolist(), ends.tolist(), strict=True):
        found, expected = batch.token_type_ids.flatten()[start : start + size].tolist(), shown[start : start + size]
        kinds = types[start : start + size] % 4
        last_dot = start + max(np.flatnonzero(kinds == 3).tolist(), default=0)  # 0: padding is no name
        if start in hidden or batch.input_ids.flatten()[last_dot] == tokenizer.mask_id:
            assert [one % 4 == 2 for one in found] == (kinds == 2).tolist()
            assert {one // 4 for one in found} == {0 if start in hidden else types[start] // 4}
        else:
            assert found == expected.tolist()
    for start, label in zip(batch.class_positions.tolist(), batch.class_labels.tolist(), strict=True):
        assert label in (-100, types[start] // 4)


def test_the_plan_of_a_large_corpus_is_stored(made, monkeypatch):
    corpus, tokenizer, _ = made
    planned = NextFitDataset(corpus, 128, tokenizer.pad_id)
    monkeypatch.setattr(next_fit, "STORED", 1)
    first = NextFitDataset(corpus, 128, tokenizer.pad_id)
    monkeypatch.setattr(next_fit, "plan_rows", None)  # the stored one is used
    again = NextFitDataset(corpus, 128, tokenizer.pad_id)
    for rows in (first, again):
        assert np.array_equal(rows._plan, planned._plan) and np.array_equal(rows._first_row, planned._first_row)
    (path,) = corpus.folder.glob("rows-next_fit-128-*")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(TypeError):  # a plan that is not complete is made again
        NextFitDataset(corpus, 128, tokenizer.pad_id)
    path.unlink()
