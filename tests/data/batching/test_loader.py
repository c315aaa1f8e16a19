import json

import numpy as np
import pytest
import torch

from torchrecipes.data.batching.loader import Loader, evaluation_batches
from torchrecipes.data.batching.mlm import MLMCollator
from torchrecipes.data.batching.packing import BestFitDataset, PackedDataset, PaddedDataset
from torchrecipes.data.corpus.corpus import prepare_corpus
from torchrecipes.data.sources.text_files import files
from torchrecipes.data.tokenizers.load import train_wordpiece
from torchrecipes.errors import UserError

TENSORS = ("input_ids", "position_ids", "document_ids", "cu_seqlens", "masked_positions", "masked_labels")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("made")
    words = ["red", "green", "blue", "black", "white"]
    texts = [" ".join(rng.choice(words, rng.integers(1, 40))) for _ in range(200)]
    (folder / "text.txt").write_text("\n".join(texts))
    source = files(str(folder / "text.txt"), sample_by="line")
    tokenizer = train_wordpiece(source, vocab_size=64)
    corpus, _ = prepare_corpus(folder / "corpus", source, tokenizer, validation_fraction=0, tokenizer_threads=0)
    return corpus, tokenizer, MLMCollator(tokenizer, 0.2)


def loader(parts, kind=PackedDataset, **changes):
    corpus, tokenizer, collator = parts
    settings = {"seed": 1, "global_batch_size": 8, "micro_batch_size": 8} | changes
    return Loader(kind(corpus, 32, tokenizer.pad_id), collator, **settings)


def step_rows(batches):
    """(inputs with labels filled in, inputs, targets) of every row of a step, in order."""
    rows = []
    for batch in batches:
        labels = torch.full((batch.input_ids.numel(),), -100)
        used = batch.masked_labels >= 0
        labels[batch.masked_positions[used]] = batch.masked_labels[used]
        labels = labels.view_as(batch.input_ids)
        rows += [torch.stack(row) for row in zip(batch.input_ids, batch.position_ids, labels, strict=True)]
    return rows


@pytest.mark.parametrize("kind", [PackedDataset, BestFitDataset, PaddedDataset])
def test_a_step_is_the_same_on_any_number_of_ranks_and_micro_batches(parts, kind):
    whole = loader(parts, kind)
    splits = [(1, 4), (1, 1), (2, 4), (2, 1), (4, 2), (8, 1)]
    others = [[loader(parts, kind, rank=r, world_size=w, micro_batch_size=m) for r in range(w)] for w, m in splits]
    for _ in range(1, 20):
        expected = step_rows(whole.next_step())
        for ranks in others:
            rows = [row for rank in ranks for row in step_rows(rank.next_step())]
            assert len(rows) == len(expected) and all(map(torch.equal, rows, expected))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_later_start_and_workers_change_nothing(parts, workers):
    plain, late = loader(parts), loader(parts, num_workers=workers)
    late.seek(17)
    for step in range(1, 30):
        batches = plain.next_step()
        if step >= 17:
            assert late.step == step
            for batch, other in zip(batches, late.next_step(), strict=True):
                assert all(torch.equal(getattr(batch, name), getattr(other, name)) for name in TENSORS)


def test_an_epoch_sees_every_row_once_and_masks_change_with_the_epoch(parts):
    corpus, tokenizer, collator = parts
    rows = PackedDataset(corpus, 32, tokenizer.pad_id)
    steps = Loader(rows, collator, seed=1, global_batch_size=1, micro_batch_size=1)
    seen = [step_rows(steps.next_step())[0] for step in range(1, 2 * rows.num_rows + 1)]
    whole = [tuple(_unmasked(row)[0].tolist()) for row in seen]
    expected = sorted(map(tuple, rows.rows(np.arange(rows.num_rows)).tokens.tolist()))
    first, second = whole[: rows.num_rows], whole[rows.num_rows :]
    assert sorted(first) == expected and sorted(second) == expected and first != second
    targets = {}
    for row, (_, _, labels) in zip(whole, seen, strict=True):
        targets.setdefault(row, []).append(tuple((labels >= 0).tolist()))
    assert sum(masks[0] != masks[-1] for masks in targets.values()) > len(targets) / 2


def _unmasked(row):
    ids, positions, labels = row
    return torch.where(labels >= 0, labels, ids), positions, labels


def test_only_the_number_of_documents_changes_and_boundaries_are_right(parts):
    shapes = set()
    steps = loader(parts)
    for _ in range(1, 61):
        (batch,) = steps.next_step()
        shapes.add(tuple(tuple(getattr(batch, name).shape) for name in TENSORS if name != "cu_seqlens"))
        bounds = batch.cu_seqlens.long()
        assert bounds[0] == 0 and bounds[-1] == 8 * 32 and (bounds.diff() > 0).all()
        assert set(range(0, 257, 32)) <= set(bounds.tolist())
        expected = torch.cat([torch.arange(n) for n in bounds.diff()])
        assert torch.equal(batch.position_ids.flatten(), expected)
        assert batch.document_ids.dtype == torch.int32
        assert torch.equal(batch.document_ids, ((batch.position_ids == 0).cumsum(1) - 1).int())
        assert batch.max_seqlen == 32 and batch.cu_seqlens.dtype == torch.int32
        assert batch.num_targets == (batch.masked_labels >= 0).sum() > 0
    assert len(shapes) == 1


def test_loading_leaves_the_global_generators_alone(parts):
    torch.manual_seed(0)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    steps = loader(parts)
    steps.next_step()
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


@pytest.mark.parametrize("limit", [None, 20, 10_000])
def test_evaluation_takes_every_row_once_with_the_same_masks(parts, limit):
    corpus, tokenizer, collator = parts
    rows = PackedDataset(corpus, 32, tokenizer.pad_id)
    batches = list(evaluation_batches(rows, collator, 8, limit=limit))
    assert len({batch.input_ids.shape for batch in batches}) == 1
    again = list(evaluation_batches(rows, collator, 8, limit=limit))
    for batch, other in zip(batches, again, strict=True):
        assert all(torch.equal(getattr(batch, name), getattr(other, name)) for name in TENSORS)
    seen = [tuple(_unmasked(row)[0].tolist()) for row in step_rows(batches)]
    padding = (tokenizer.pad_id,) * 32
    seen = [row for row in seen if row != padding]
    known = list(map(tuple, rows.rows(np.arange(rows.num_rows)).tokens.tolist()))
    assert len(seen) == min(limit or rows.num_rows, rows.num_rows) and set(seen) <= set(known)
    if limit != 20:
        assert sorted(seen) == sorted(known)
    # Another number of rows in a batch, or of ranks, gives the same rows with the same masks.
    shared = [
        row
        for rank in range(3)
        for row in step_rows(evaluation_batches(rows, collator, 4, limit=limit, rank=rank, world_size=3))
    ]
    as_set = lambda rows: sorted(tuple(row.flatten().tolist()) for row in rows if (row[2] >= 0).any())  # noqa: E731
    assert as_set(shared) == as_set(step_rows(batches))


@pytest.mark.parametrize(
    ("changes", "key", "code"),
    [
        ({"world_size": 3}, "global_batch_size", "not_divisible"),
        ({"micro_batch_size": 0}, "micro_batch_size", "out_of_range"),
    ],
)
def test_rows_that_cannot_be_divided_are_refused(parts, changes, key, code):
    with pytest.raises(UserError) as error:
        loader(parts, **changes)
    assert (error.value.key, error.value.code) == (key, code)


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({"micro_batch_size": 3}, [2, 2, 2, 2]),
        ({"micro_batch_size": 100}, [8]),
        ({"world_size": 2}, [4]),
        ({"world_size": 2, "micro_batch_size": 3}, [2, 2]),
        ({"world_size": 8}, [1]),
    ],
)
def test_micro_batches_are_as_large_as_divides_a_ranks_share(parts, changes, sizes):
    assert [len(batch.input_ids) for batch in loader(parts, **changes).next_step()] == sizes


@pytest.mark.parametrize("workers", [0, 2])
def test_a_rollback_continues_with_later_rows(parts, workers):
    plain, rolled_back = loader(parts), loader(parts, num_workers=workers)
    expected = {step: step_rows(plain.next_step()) for step in range(1, 12)}
    states = [rolled_back.state_dict()]
    for _ in range(5):
        rolled_back.next_step()
        states.append(rolled_back.state_dict())
    rolled_back.load_state_dict(states[2])  # steps 3 to 5 were bad: the rows of step 6 come next
    assert rolled_back.step == 3
    for step in range(3, 9):
        assert all(map(torch.equal, step_rows(rolled_back.next_step()), expected[step + 3]))
    resumed = loader(parts)
    resumed.load_state_dict(json.loads(json.dumps(rolled_back.state_dict())))
    assert resumed.step == 9
    assert all(map(torch.equal, step_rows(resumed.next_step()), step_rows(rolled_back.next_step())))


@pytest.mark.parametrize(
    "changes",
    [{"global_batch_size": 4}, {"seed": 2}, {"shuffle": False}, {"kind": PaddedDataset}, {"kind": BestFitDataset}],
)
def test_a_state_of_other_rows_is_refused(parts, changes):
    state = loader(parts).state_dict()
    with pytest.raises(UserError) as error:
        loader(parts, **changes).load_state_dict(state)
    assert error.value.code == "other_data"


def test_micro_batches_and_ranks_may_change_on_resume(parts):
    state = loader(parts).state_dict()
    loader(parts, micro_batch_size=2, world_size=2).load_state_dict(state)
    automatic = loader(parts, micro_batch_size="auto")
    automatic.load_state_dict(state)
    assert automatic.micro_batch_size == 8


def test_without_shuffling_rows_come_in_the_order_of_the_corpus(parts):
    corpus, tokenizer, _ = parts
    dataset = PackedDataset(corpus, 32, tokenizer.pad_id)
    ordered = loader(parts, shuffle=False)
    for first in (0, 8):
        inputs = torch.stack([_unmasked(row)[0] for row in step_rows(ordered.next_step())])
        assert np.array_equal(inputs, dataset.rows(np.arange(first, first + 8)).tokens)


def share(step):
    return 0.1 if step < 4 else 0.5


@pytest.mark.parametrize("workers", [0, 2])
def test_the_mask_rate_is_a_function_of_the_step(parts, workers):
    corpus, tokenizer, _ = parts
    dataset = PackedDataset(corpus, 32, tokenizer.pad_id)
    rising = MLMCollator(tokenizer, share)
    steps = Loader(dataset, rising, seed=1, global_batch_size=16, micro_batch_size=16, num_workers=workers)
    found = [sum(batch.num_targets for batch in steps.next_step()) for _ in range(8)]
    assert max(found[:3]) < min(found[3:]) / 2
    steps.load_state_dict(steps.state_dict() | {"step": 2})  # as after a rollback: the rate is that of the step
    assert sum(batch.num_targets for batch in steps.next_step()) <= max(found[:3]) * 1.5
    # Evaluation does not depend on the step of training.
    first = list(evaluation_batches(dataset, rising, 8))
    assert [batch.num_targets for batch in first] == [
        batch.num_targets for batch in evaluation_batches(dataset, rising, 8)
    ]


def test_two_evaluation_sets_are_drawn_independently(parts):
    corpus, tokenizer, collator = parts
    dataset = PackedDataset(corpus, 32, tokenizer.pad_id)
    one, two = (next(evaluation_batches(dataset, collator, 8, limit=20, name=name)) for name in ("one", "two"))
    assert not torch.equal(one.input_ids, two.input_ids)


def test_iterating_gives_the_micro_batches_of_all_steps(parts):
    plain, iterated = loader(parts, micro_batch_size=4), iter(loader(parts, micro_batch_size=4))
    for _ in range(3):
        for batch in plain.next_step():
            assert torch.equal(batch.input_ids, next(iterated).input_ids)


@pytest.mark.parametrize(("limit", "world_size"), [(9, 2), (17, 3), (8, 4), (None, 3)])
def test_all_ranks_evaluate_as_many_batches_and_every_row_once(parts, limit, world_size):
    corpus, tokenizer, collator = parts
    rows = PackedDataset(corpus, 32, tokenizer.pad_id)
    each = [
        list(evaluation_batches(rows, collator, 4, limit=limit, rank=r, world_size=world_size))
        for r in range(world_size)
    ]
    assert len({len(batches) for batches in each}) == 1
    alone = list(evaluation_batches(rows, collator, 4, limit=limit))
    assert sum(b.num_targets for batches in each for b in batches) == sum(b.num_targets for b in alone)


def test_a_corpus_below_one_row_is_refused(parts):
    corpus, tokenizer, collator = parts
    rows = PackedDataset(corpus, 10**6, tokenizer.pad_id)
    with pytest.raises(UserError) as error:
        Loader(rows, collator, seed=0, global_batch_size=1, micro_batch_size=1)
    assert (error.value.key, error.value.code) == ("seq_len", "too_little_text")
