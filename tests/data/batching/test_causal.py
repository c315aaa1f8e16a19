"""Labels, positions and boundaries of causal batches, against plain loops over the documents."""

from collections import Counter

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import AddedToken, models, pre_tokenizers

from torchrecipes.data.batching.causal import CausalLMCollator
from torchrecipes.data.batching.loader import Loader, evaluation_batches
from torchrecipes.data.batching.packing import BestFitDataset, PackedDataset, PaddedDataset
from torchrecipes.data.corpus.corpus import prepare_corpus
from torchrecipes.data.sources.text_files import files
from torchrecipes.data.tokenizers.tokenizer import make_tokenizer
from torchrecipes.errors import UserError

WORDS = ["one", "two", "three", "four"]


def word_tokenizer(bos, eos):
    """Ids of words; `bos text`, and `eos` behind it where the two differ."""
    vocabulary = {name: i for i, name in enumerate(dict.fromkeys([bos, eos, *WORDS]))}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=bos))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {role: AddedToken(name, special=True) for role, name in (("bos", bos), ("eos", eos), ("pad", eos))}
    return make_tokenizer(backend, special, pad_vocab_to_multiple_of=1, causal=True)


def test_rows_without_the_token_behind_them_are_refused(made):
    with pytest.raises(ValueError, match=r"lookahead=0; next tokens need PackedDataset\(..., lookahead=1\)"):
        CausalLMCollator(eos_id=1).batch(PackedDataset(made[0], 8, pad_id=1), np.array([0]), np.array([0]))


@pytest.fixture(scope="module", params=["E E", "B E"])
def made(request, tmp_path_factory):
    """A corpus of several small shards, its tokenizer, and its documents as lists of ids."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("made")
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 60))) for _ in range(150)]
    (folder / "text.txt").write_text("\n".join(texts))
    source, tokenizer = files(str(folder / "text.txt"), sample_by="line"), word_tokenizer(*request.param.split())
    corpus, _ = prepare_corpus(
        folder / "c", source, tokenizer, validation_fraction=0, tokenizer_threads=0, shard_tokens=700
    )
    assert len(corpus.shards) > 3
    return corpus, tokenizer, [tokenizer.encode(text) for text in texts]


def batch_of_all(made, kind, row_len, cross):
    corpus, tokenizer, documents = made
    rows = kind(corpus, row_len, tokenizer.pad_id, lookahead=1)
    numbers = np.append(np.arange(rows.num_rows), -1)
    targets = CausalLMCollator(tokenizer.eos_id, cross_document_attention=cross)
    return targets.batch(rows, numbers, None), tokenizer.eos_id, documents


def labels_of(document, eos):
    """What the tokens of one document predict."""
    return [*document[1:], -100 if document[-1] == eos else eos]


@pytest.mark.parametrize("row_len", [4, 7, 16, 64, 1000])
@pytest.mark.parametrize("kind", [PackedDataset, PaddedDataset])
def test_every_token_predicts_the_next_of_its_document(made, kind, row_len):
    batch, eos, documents = batch_of_all(made, kind, row_len, cross=False)
    if kind is PackedDataset:
        tokens = [token for document in documents for token in document]
        labels = [label for document in documents for label in labels_of(document, eos)]
        filled = -len(tokens) % row_len
        expected_tokens, expected_labels = tokens + [eos] * filled, labels + [-100] * filled
    else:
        expected_tokens, expected_labels = [], []
        for document in documents:
            filled = -len(document) % row_len
            expected_tokens += document + [eos] * filled
            expected_labels += labels_of(document, eos) + [-100] * filled
    assert batch.input_ids.flatten().tolist() == expected_tokens + [eos] * row_len
    assert batch.labels.flatten().tolist() == expected_labels + [-100] * row_len
    assert batch.num_targets == sum(label != -100 for label in expected_labels)


@pytest.mark.parametrize("row_len", [4, 7, 16, 64, 1000])
def test_every_token_predicts_the_next_of_its_document_in_best_fit_rows(made, row_len):
    batch, eos, documents = batch_of_all(made, BestFitDataset, row_len, cross=False)
    stream = [token for document in documents for token in document]
    expected = [label for document in documents for label in labels_of(document, eos)]
    lengths = batch.cu_seqlens.diff().tolist()
    tokens, labels = (tensor.flatten().split(lengths) for tensor in (batch.input_ids, batch.labels))
    pieces = [(piece.tolist(), label.tolist()) for piece, label in zip(tokens, labels, strict=True)]
    # Every piece is a part of a document with its labels; together they are all pairs of the corpus, and padding.
    with_labels = [(document, labels_of(document, eos)) for document in documents]
    padding = 0
    for piece, label in pieces:
        size = len(piece)
        is_part = any(
            document[i : i + size] == piece and own[i : i + size] == label
            for document, own in with_labels
            for i in range(len(document) - size + 1)
        )
        assert is_part or (set(piece) == {eos} and set(label) == {-100})
        padding += not is_part
    pairs = Counter(pair for piece, label in pieces for pair in zip(piece, label, strict=True))
    left = pairs - Counter(zip(stream, expected, strict=True))
    assert not Counter(zip(stream, expected, strict=True)) - pairs and set(left) <= {(eos, -100)}
    assert padding <= len(batch.input_ids)


@pytest.mark.parametrize("row_len", [4, 7, 64])
def test_with_labelshave_positions_and_boundaries_of_their_own(made, row_len):
    batch, _, documents = batch_of_all(made, PackedDataset, row_len, cross=False)
    starts = np.cumsum([0, *(len(document) for document in documents)])
    size = batch.input_ids.numel()
    expected = sorted(set(starts.tolist()) | set(range(0, size + 1, row_len)))
    bounds = batch.cu_seqlens.tolist()
    assert bounds == expected
    lengths = np.diff(expected)
    assert batch.position_ids.flatten().tolist() == [i for length in lengths for i in range(length)]


@pytest.mark.parametrize("row_len", [4, 7, 64])
def test_across_with_labelsa_row_is_one_and_predicts_the_stream(made, row_len):
    batch, eos, documents = batch_of_all(made, PackedDataset, row_len, cross=True)
    stream = [token for document in documents for token in document]
    last = [-100 if stream[-1] == eos else eos]
    labels = batch.labels.flatten().tolist()
    assert labels[: len(stream)] == stream[1:] + last and set(labels[len(stream) :]) == {-100}
    assert batch.document_ids is batch.cu_seqlens is None and batch.max_seqlen == row_len
    assert torch.equal(batch.position_ids, torch.arange(row_len).expand(len(batch.input_ids), row_len))


@pytest.mark.parametrize("cross", [False, True])
def test_the_loader_gives_every_target_of_an_epoch_once_on_any_number_of_ranks(made, cross):
    corpus, tokenizer, _ = made
    rows = PackedDataset(corpus, 32, tokenizer.pad_id, lookahead=1)
    targets = CausalLMCollator(tokenizer.eos_id, cross)
    settings = {"seed": 1, "global_batch_size": 2, "micro_batch_size": 1}
    alone = Loader(rows, targets, **settings)
    ranks = [Loader(rows, targets, rank=rank, world_size=2, **settings) for rank in range(2)]
    for _ in range(rows.num_rows // 2):
        expected = alone.next_step()
        for batch, other in zip(expected, [b for rank in ranks for b in rank.next_step()], strict=True):
            assert torch.equal(batch.input_ids, other.input_ids) and torch.equal(batch.labels, other.labels)
    seen = sum(batch.num_targets for batch in evaluation_batches(rows, targets, 4))
    whole = targets.batch(rows, np.arange(rows.num_rows), None)
    assert seen == whole.num_targets


def test_a_tokenizer_without_an_end_is_refused():
    with pytest.raises(UserError) as error:
        CausalLMCollator(None)
    assert error.value.code == "no_eos_token"
