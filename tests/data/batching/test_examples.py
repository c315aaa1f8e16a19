from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.data.batching.memory_examples import PAD, TOKENIZER, MemoryExamples, random_examples
from torchrecipes.data.batching.example_rows import ExampleRows, share_by_length, split_by_length
from torchrecipes.data.batching.examples import Examples
from torchrecipes.data.batching.labeled import LabeledCollator
from torchrecipes.data.batching.loader import Loader, evaluation_batches
from torchrecipes.data.batching.pairs import PairCollator
from torchrecipes.data.batching.texts import row_length
from torchrecipes.errors import UserError


def rows_of(corpus):
    return ExampleRows(corpus, seq_len=64, pad_id=PAD)


def loader(corpus, collator=None, **changes):
    settings = {"seed": 1, "global_batch_size": 8, "micro_batch_size": 8} | changes
    return Loader(rows_of(corpus), collator or PairCollator(TOKENIZER), **settings)


def texts_of(batch):
    """The texts of a batch's row, without padding, as tuples."""
    ends = batch.cu_seqlens.tolist()
    row = batch.input_ids.flatten().tolist()
    return [tuple(row[a:b]) for a, b in pairwise(ends)][: batch.num_texts]


def examples_of(batch):
    """The examples of a batch as tuples of texts."""
    texts = texts_of(batch)
    return [tuple(texts[i] for i in example if i >= 0) for example in batch.examples.texts.tolist()]


def as_tuples(corpus):
    return [tuple(map(tuple, texts)) for texts in corpus.texts]


def test_texts_are_packed_by_length_and_every_field_describes_them():
    corpus = random_examples(30)
    numbers = np.array([4, 17, 3, 29, 0])
    batch = PairCollator(TOKENIZER).batch(rows_of(corpus), numbers, keys=numbers)
    assert examples_of(batch) == [as_tuples(corpus)[i] for i in numbers]
    texts = texts_of(batch)
    assert sorted(texts, key=len) == texts and batch.num_texts == len(texts) == len(batch.examples.hashes)
    assert batch.examples.hashes.tolist() == [hash(text) for text in texts]
    assert batch.num_targets == 5 and batch.examples.scores is None and batch.examples.labels is None
    lengths = [len(text) for text in texts]
    padding = batch.input_ids.numel() - sum(lengths)
    assert batch.input_ids.shape == (1, row_length(sum(lengths))) and padding > 0
    documents = [*lengths, padding]
    assert batch.cu_seqlens.diff().tolist() == documents and batch.cu_seqlens.dtype == torch.int32
    assert (batch.input_ids[0, -padding:] == PAD).all()
    # Padding may be longer than a model has positions.
    assert batch.position_ids[0].tolist() == [i for n in lengths for i in range(n)] + [0] * padding
    assert batch.document_ids[0].tolist() == [i for i, n in enumerate(documents) for _ in range(n)]
    assert max(documents) <= batch.max_seqlen and batch.max_seqlen % 128 == 0
    assert set(batch.documents) == {"position_ids", "document_ids", "cu_seqlens", "max_seqlen"}
    assert batch.texts == {"num_texts": len(texts), "cu_seqlens": batch.cu_seqlens, "pool_from": None}


def test_a_row_that_is_full_has_no_document_of_padding():
    corpus = MemoryExamples([[[7] * 40, [8] * 24]])
    batch = PairCollator(TOKENIZER).batch(rows_of(corpus), np.array([0]), keys=None)
    assert batch.input_ids.shape == (1, 64) and batch.cu_seqlens.tolist() == [0, 24, 64]
    assert examples_of(batch) == as_tuples(corpus)


def test_rows_have_few_lengths_and_little_padding():
    lengths = np.arange(1, 70_000)
    rows = np.array([row_length(n) for n in lengths.tolist()])
    assert (rows >= lengths).all() and (rows % 64 == 0).all() and (rows - lengths < np.maximum(64, lengths / 31)).all()
    assert len(np.unique(rows[4096:])) <= 32 * 5


def test_prompts_are_left_out_of_pooling_and_one_token_stays():
    corpus = MemoryExamples([[[1, 5, 6, 7, 2], [1, 9, 2]], [[1, 5, 2], [1, 4, 4, 4, 4, 2]]], prompts=(3, 0))
    batch = PairCollator(TOKENIZER, include_prompt=False).batch(rows_of(corpus), np.array([0, 1]), keys=None)
    found = dict(zip(texts_of(batch), batch.pool_from.tolist(), strict=True))
    assert found == {(1, 5, 6, 7, 2): 3, (1, 9, 2): 0, (1, 5, 2): 2, (1, 4, 4, 4, 4, 2): 0}
    assert batch.pool_from.dtype == torch.int32 and batch.texts["pool_from"] is batch.pool_from
    included = PairCollator(TOKENIZER).batch(rows_of(corpus), np.array([0, 1]), keys=None)
    assert included.pool_from is None


def test_token_types_are_those_of_the_second_sentence():
    corpus = MemoryExamples([[[1, 5, 2, 6, 6, 2]], [[1, 7, 2, 8, 2]]], second_starts=[3, 5], labels=np.array([1, 0]))
    batch = LabeledCollator(TOKENIZER, token_types=True).batch(rows_of(corpus), np.array([0, 1]), keys=None)
    assert texts_of(batch) == [(1, 7, 2, 8, 2), (1, 5, 2, 6, 6, 2)]
    assert batch.token_type_ids[0].tolist() == [0] * 5 + [0, 0, 0, 1, 1, 1] + [0] * 53
    assert batch.documents["token_type_ids"] is batch.token_type_ids
    assert batch.examples.labels.tolist() == [1, 0] and batch.examples.texts.tolist() == [[1], [0]]


def test_copies_of_a_text_are_in_the_same_batch():
    corpus = random_examples(6, most=1)
    batch = PairCollator(TOKENIZER, repeat_texts=True).batch(rows_of(corpus), np.arange(6), keys=None)
    assert batch.num_texts == 12 and batch.num_targets == 6
    assert examples_of(batch) == [texts * 2 for texts in as_tuples(corpus)]
    assert (batch.examples.texts[:, 0] != batch.examples.texts[:, 1]).all()
    with pytest.raises(UserError, match="repeat_texts"):
        PairCollator(TOKENIZER, repeat_texts=True).batch(rows_of(random_examples(6, least=2)), np.arange(6), keys=None)


def test_examples_of_several_batches_are_joined_with_their_embeddings():
    corpora = [
        random_examples(9, seed, most=most, values=np.ones((9, 2), "f4") * seed) for seed, most in [(1, 4), (2, 2)]
    ]
    batches = [PairCollator(TOKENIZER).batch(rows_of(corpus), np.arange(5), keys=None) for corpus in corpora]
    joined = Examples.join(batch.examples for batch in batches)
    texts = [text for batch in batches for text in texts_of(batch)]
    found = [tuple(texts[i] for i in example if i >= 0) for example in joined.texts.tolist()]
    assert found == as_tuples(corpora[0])[:5] + as_tuples(corpora[1])[:5] and len(joined) == 10
    assert joined.hashes.tolist() == [hash(text) for text in texts] and joined.texts.dtype == torch.int64
    assert torch.equal(joined.scores, torch.tensor([1.0] * 5 + [2.0] * 5)[:, None].expand(10, 2))
    assert joined.labels is None


def test_a_step_is_the_same_examples_on_any_number_of_ranks_and_micro_batches():
    corpus = random_examples(50, labels=np.arange(50))
    expected = loader(corpus)
    splits = [(1, 4), (1, 1), (2, 4), (2, 1), (4, 2), (8, 1)]
    others = [[loader(corpus, rank=r, world_size=w, micro_batch_size=m) for r in range(w)] for w, m in splits]
    for _ in range(1, 20):
        (batch,) = expected.next_step()
        examples = dict(zip(batch.examples.labels.tolist(), examples_of(batch), strict=True))
        for ranks, (world_size, size) in zip(others, splits, strict=True):
            found = {}
            for rank in ranks:
                batches = rank.next_step()
                assert len(batches) == 8 // world_size // size
                for part in batches:
                    found |= dict(zip(part.examples.labels.tolist(), examples_of(part), strict=True))
            assert found == examples


def test_an_epoch_sees_every_example_once():
    corpus = random_examples(40)
    steps = loader(corpus, micro_batch_size=2)
    for _ in range(2):
        seen = [example for _ in range(5) for batch in steps.next_step() for example in examples_of(batch)]
        assert sorted(seen) == sorted(as_tuples(corpus))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_later_start_and_workers_change_nothing(workers):
    corpus = random_examples(30, labels=np.arange(30))
    plain, late = loader(corpus, micro_batch_size=2), loader(corpus, micro_batch_size=2, num_workers=workers)
    for _ in range(16):
        plain.next_step()
    late.load_state_dict(plain.state_dict())
    for _ in range(4):
        for batch, other in zip(plain.next_step(), late.next_step(), strict=True):
            assert torch.equal(batch.input_ids, other.input_ids)
            assert torch.equal(batch.examples.texts, other.examples.texts)
            assert torch.equal(batch.examples.labels, other.examples.labels)


def test_another_corpus_is_not_resumed():
    state = loader(random_examples(30)).state_dict()
    with pytest.raises(UserError) as error:
        loader(random_examples(30, name="another")).load_state_dict(state)
    assert error.value.code == "other_data"
    with pytest.raises(UserError) as error:
        loader(MemoryExamples([]))
    assert error.value.code == "too_little_text"


@pytest.mark.parametrize(("world_size", "together"), [(1, 1), (2, 1), (8, 1), (8, 4), (128, 2)])
def test_ranks_have_as_many_tokens_and_groups_stay_together(world_size, together):
    lengths = np.random.default_rng(0).lognormal(3, 0.8, 1024).astype(np.int64) + 2
    shares = [share_by_length(lengths, rank, world_size, together) for rank in range(world_size)]
    assert {len(share) for share in shares} == {1024 // world_size}
    assert sorted(np.concatenate(shares).tolist()) == list(range(1024))
    tokens = [lengths[share].sum() for share in shares]
    assert max(tokens) - min(tokens) <= lengths.reshape(-1, together).sum(1).max()
    for share in shares:
        assert (np.diff(share.reshape(-1, together), axis=1) == 1).all() and (share[::together] % together == 0).all()


@pytest.mark.parametrize("pieces", [1, 2, 3, 7, 16])
def test_pieces_of_a_step_have_examples_of_similar_length_and_as_many_tokens(pieces):
    lengths = np.random.default_rng(pieces).lognormal(3, 0.8, 512).astype(np.int64) + 2
    split = split_by_length(lengths, pieces)
    assert len(split) == pieces and sorted(np.concatenate(split).tolist()) == list(range(512))
    assert (np.diff(lengths[np.concatenate(split)]) >= 0).all()
    tokens = np.array([lengths[piece].sum() for piece in split])
    assert (np.abs(tokens - lengths.sum() / pieces) <= lengths.max()).all()


@pytest.mark.parametrize("lengths", [[1, 1, 1, 1000], [1000, 1, 1, 1], [5, 5, 5, 5], [1000, 1000, 1, 1], [0, 0, 0, 0]])
@pytest.mark.parametrize("pieces", [1, 2, 3, 4])
def test_every_piece_of_a_step_has_an_example(lengths, pieces):
    split = split_by_length(np.array(lengths), pieces)
    assert len(split) == pieces and all(len(piece) for piece in split)
    assert sorted(np.concatenate(split).tolist()) == [0, 1, 2, 3]


def test_evaluation_takes_every_example_once_on_any_number_of_ranks():
    corpus = random_examples(21)
    for world_size in (1, 3):
        seen, counts = [], set()
        for rank in range(world_size):
            placement = {"rank": rank, "world_size": world_size}
            batches = list(evaluation_batches(rows_of(corpus), PairCollator(TOKENIZER), 4, **placement))
            seen += [example for batch in batches for example in examples_of(batch)]
            counts.add(len(batches))
        assert sorted(seen) == sorted(as_tuples(corpus)) and len(counts) == 1


def test_a_batch_of_no_example_has_padding_only():
    batch = PairCollator(TOKENIZER).batch(rows_of(random_examples(3)), np.array([-1, -1]), keys=None)
    assert batch.num_texts == batch.num_targets == 0 and batch.input_ids.shape == (1, 64)
    assert batch.cu_seqlens.tolist() == [0, 64] and batch.examples.texts.shape == (0, 3)


def test_a_batch_and_its_examples_move_together():
    corpus = random_examples(4, values=np.ones((4, 1), "f4"), labels=np.arange(4))
    batch = PairCollator(TOKENIZER).batch(rows_of(corpus), np.arange(4), keys=None)
    moved = batch.to(torch.device("meta"))
    for name in ("texts", "hashes", "scores", "labels"):
        assert getattr(moved.examples, name).is_meta and not getattr(batch.examples, name).is_meta
    assert moved.input_ids.is_meta and moved.num_texts == batch.num_texts


def test_batches_of_made_up_tokens_have_the_sizes_asked_for():
    batch = PairCollator(TOKENIZER, texts_per_example=3, token_types=True).example_batch(4, 16)
    assert batch.input_ids.shape == batch.token_type_ids.shape == (12, 16) and batch.num_targets == 4
    assert batch.cu_seqlens.tolist() == list(range(0, 193, 16)) and batch.documents["cu_seqlens"] is None
    assert batch.examples.texts.shape == (4, 3) and batch.examples.scores.shape == (4, 2)
    assert PairCollator(TOKENIZER, repeat_texts=True).example_batch(4, 16).examples.texts.shape == (4, 2)
    shapes = {"single_label": (4,), "multi_label": (4, 5), "regression": (4,)}
    for task, shape in shapes.items():
        labels = LabeledCollator(TOKENIZER, task=task, num_labels=5).example_batch(4, 16).examples.labels
        assert labels.shape == shape and labels.is_floating_point() == (task != "single_label")
