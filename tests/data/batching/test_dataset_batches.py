import numpy as np
import pytest
import torch

from tests.data.batching.memory_examples import PAD, TOKENIZER, random_examples
from torchrecipes.data.batching.dataset_batches import DatasetBatches
from torchrecipes.data.batching.example_rows import ExampleRows
from torchrecipes.data.batching.grouped_rows import GroupedRows
from torchrecipes.data.batching.loader import Loader
from torchrecipes.data.batching.pairs import PairCollator
from torchrecipes.data.batching.rows import NUMBER_BITS
from torchrecipes.errors import UserError
from torchrecipes.losses import by_dataset

SIZES = {"news": 70, "code": 33, "titles": 8}
BATCH = 8


def parts(**changes):
    sizes = SIZES | changes
    return {
        name: ExampleRows(random_examples(size, seed, labels=np.arange(size), name=name), 64, PAD)
        for seed, (name, size) in enumerate(sizes.items())
    }


def datasets_of(rows, steps, seed=3, shuffle=True):
    """The dataset of every step, and that all its examples are of it."""
    numbers, _ = rows.locate(np.arange(steps * BATCH).reshape(steps, BATCH), seed, shuffle)
    sources = numbers >> NUMBER_BITS
    assert (sources == sources[:, :1]).all()
    return sources[:, 0]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(
    ("weights", "block", "quotas"),
    [
        ("proportional", 15, [9, 5, 1]),
        ("round_robin", 3, [1, 1, 1]),
        ({"news": 1, "code": 2, "titles": 1}, 1024, [256, 512, 256]),
        ({"news": 0.7, "code": 0.3, "titles": 0}, 1024, [717, 307, 0]),
    ],
)
def test_every_block_has_its_quotas_and_every_beginning_nearly(weights, block, quotas, shuffle):
    rows = DatasetBatches(parts(), BATCH, weights)
    steps = datasets_of(rows, 3 * block, shuffle=shuffle).reshape(3, block)
    counts = (steps[:, :, None] == np.arange(3)).sum(1)
    assert counts.tolist() == [quotas] * 3
    reached = (steps.reshape(-1, 1) == np.arange(3)).cumsum(0)
    ideal = np.arange(1, 3 * block + 1)[:, None] * np.array(quotas) / block
    assert np.abs(reached - ideal).max() <= 2
    if shuffle and weights != "round_robin":
        assert (steps[0] != steps[1]).any() and (datasets_of(rows, block, seed=4) != steps[0]).any()


def test_round_robin_takes_turns():
    assert datasets_of(DatasetBatches(parts(), BATCH, "round_robin"), 7).tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_each_dataset_comes_in_its_own_order_and_an_epoch_has_all_of_it():
    alone, rows = parts(), DatasetBatches(parts(), BATCH)
    positions = np.arange(40 * BATCH)
    numbers, epochs = rows.locate(positions, seed=3)
    for index, (name, part) in enumerate(alone.items()):
        mine = numbers >> NUMBER_BITS == index
        expected, expected_epochs = part.locate(np.arange(mine.sum()), seed=3)
        assert (numbers[mine] & (1 << NUMBER_BITS) - 1 == expected).all() and (epochs[mine] == expected_epochs).all()
        first = numbers[: rows.num_rows][mine[: rows.num_rows]]
        assert len(np.unique(first)) == SIZES[name]
    # Any positions, in any order, are found without the ones before them.
    some = np.random.default_rng(0).permutation(positions)[:50]
    again, _ = DatasetBatches(parts(), BATCH).locate(some, seed=3)
    assert (again == numbers[some]).all()


def test_a_step_is_one_dataset_on_any_number_of_ranks_and_micro_batches():
    def loaders(world_size, size):
        settings = {"seed": 1, "global_batch_size": BATCH, "micro_batch_size": size, "world_size": world_size}
        rows = DatasetBatches(parts(), BATCH)
        return [Loader(rows, PairCollator(TOKENIZER), rank=rank, **settings) for rank in range(world_size)]

    def step(ranks):
        batches = [batch for rank in ranks for batch in rank.next_step()]
        assert all(batch.source_names == tuple(SIZES) for batch in batches)
        found = [pair for b in batches for pair in zip(b.source_ids.tolist(), b.examples.labels.tolist(), strict=True)]
        assert len({source for source, _ in found}) == 1
        return sorted(found)

    groups = [loaders(1, 8), loaders(1, 2), loaders(2, 4), loaders(4, 1)]
    for _ in range(20):
        first, *others = [step(ranks) for ranks in groups]
        assert all(other == first for other in others)
    resumed = loaders(2, 1)
    for rank, other in zip(resumed, groups[2], strict=True):
        rank.load_state_dict(other.state_dict())
    assert step(resumed) == step(groups[0])


def test_the_loss_of_a_step_is_logged_for_its_dataset():
    rows = DatasetBatches(parts(), BATCH, "round_robin")
    loader = Loader(rows, PairCollator(TOKENIZER), seed=1, global_batch_size=BATCH, micro_batch_size=4)
    for name in (*SIZES, "news"):
        logged = by_dataset(torch.tensor(12.0, requires_grad=True), loader.next_step())
        assert logged.keys() == {f"{kind}/{name}" for kind in ("loss", "targets") for name in SIZES}
        nonzero = {key: value.item() for key, value in logged.items() if value}
        assert nonzero == {f"loss/{name}": 12.0, f"targets/{name}": BATCH}
        assert not any(value.requires_grad for value in logged.values())
    alone = Loader(parts()["news"], PairCollator(TOKENIZER), seed=1, global_batch_size=BATCH, micro_batch_size=4)
    assert by_dataset(torch.tensor(1.0), alone.next_step()) == {}


def test_shares_lengths_and_epochs_are_accounted_for():
    rows = DatasetBatches(parts(), BATCH)
    account = rows.account(15 * BATCH)
    assert [line["rows"] for line in account] == [72, 40, 8] and account[1]["epochs"] == pytest.approx(40 / 33)
    assert rows.num_rows == 15 * BATCH and DatasetBatches(parts(), BATCH, "round_robin").num_rows == 111
    means = [part.tokens_per_row for part in parts().values()]
    assert rows.tokens_per_row == pytest.approx(np.average(means, weights=[9, 5, 1]))
    numbers, _ = rows.locate(np.arange(BATCH), seed=3)
    name = rows.source_names[numbers[0] >> NUMBER_BITS]
    local = numbers & (1 << NUMBER_BITS) - 1
    assert (rows.lengths(numbers) == rows.parts[name].corpus.example_lengths[local]).all()


@pytest.mark.parametrize(
    ("weights", "code"),
    [
        ({"news": 1, "code": 1}, "weights"),
        ({"news": 1, "code": 1, "titles": 1, "other": 1}, "weights"),
        ({"news": 0, "code": 0, "titles": 0}, "weights"),
        ({"news": -1, "code": 1, "titles": 1}, "weights"),
        ({"news": float("nan"), "code": 1, "titles": 1}, "weights"),
        ({"news": 1, "code": 1, "titles": 1e-6}, "small_weight"),
        ("by size", "weights"),
    ],
)
def test_weights_that_are_none_are_refused(weights, code):
    with pytest.raises(UserError) as error:
        DatasetBatches(parts(), BATCH, weights)
    assert error.value.code == code and error.value.key == "data.weights"


def test_steps_of_another_size_and_groups_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="16"):
        Loader(DatasetBatches(parts(), BATCH), None, seed=0, global_batch_size=16, micro_batch_size=1)
    grouped = GroupedRows(random_examples(20, labels=np.arange(20) // 5), 64, PAD, per_label=3)
    with pytest.raises(UserError) as error:
        Loader(DatasetBatches({"a": grouped}, BATCH), None, seed=0, global_batch_size=BATCH, micro_batch_size=1)
    assert error.value.code == "not_divisible"


def test_other_weights_or_datasets_are_not_resumed():
    def loader(rows):
        return Loader(rows, PairCollator(TOKENIZER), seed=1, global_batch_size=BATCH, micro_batch_size=8)

    state = loader(DatasetBatches(parts(), BATCH)).state_dict()
    others = [DatasetBatches(parts(), BATCH, "round_robin"), DatasetBatches(parts(code=34), BATCH)]
    for rows in [*others, parts()["news"]]:
        with pytest.raises(UserError) as error:
            loader(rows).load_state_dict(state)
        assert error.value.code == "other_data"
