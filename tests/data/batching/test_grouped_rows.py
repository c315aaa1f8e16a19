from collections import Counter

import numpy as np
import pytest

from tests.data.batching.memory_examples import PAD, TOKENIZER, random_examples
from torchrecipes.data.batching.grouped_rows import GroupedRows
from torchrecipes.data.batching.loader import Loader
from torchrecipes.data.batching.pairs import PairCollator
from torchrecipes.errors import UserError

# Label 7 has one example; no label has a multiple of 4 but 2.
LABELS = np.random.default_rng(0).permutation(np.repeat([0, 2, 5, 7, 9], [13, 8, 3, 1, 30]))
COUNTS = {0: 13, 2: 8, 5: 3, 9: 30}


def rows_of(labels=LABELS, **changes):
    return GroupedRows(random_examples(len(labels), most=1, labels=labels), 64, PAD, **{"per_label": 4} | changes)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("per_label", [2, 4, 5])
def test_groups_have_one_label_and_an_epoch_has_every_example(per_label, shuffle):
    rows = rows_of(per_label=per_label)
    positions = np.arange(3 * rows.num_rows)
    numbers, epochs = rows.locate(positions, seed=3, shuffle=shuffle)
    assert (epochs == positions // rows.num_rows).all()
    labels = LABELS[numbers].reshape(-1, per_label)
    assert (labels == labels[:, :1]).all()
    for epoch in numbers.reshape(3, rows.num_rows):
        times = Counter(epoch.tolist())
        assert set(times) == set(np.flatnonzero(LABELS != 7).tolist())
        groups = Counter(LABELS[epoch].tolist())
        assert groups == {label: -(-n // per_label) * per_label for label, n in COUNTS.items()}
        # Only what fills up a label's last group comes again.
        assert sum(n - 1 for n in times.values()) == rows.num_rows - sum(COUNTS.values())
    full = [set(group) for group in numbers.reshape(-1, per_label).tolist() if LABELS[group[0]] == 9]
    assert all(len(group) == per_label for group in full)
    assert rows.left_out == 1 and rows.num_rows == sum(-(-n // per_label) * per_label for n in COUNTS.values())


def test_the_order_is_arithmetic_and_changes_with_seed_and_epoch():
    rows = rows_of()
    positions = np.arange(2 * rows.num_rows)
    numbers, _ = rows.locate(positions, seed=3)
    first, second = numbers.reshape(2, -1)
    assert (first != second).any() and (rows.locate(positions, seed=4)[0] != numbers).any()
    groups = LABELS[first].reshape(-1, 4)[:, 0]
    assert (np.diff(groups) < 0).any()  # labels are mixed
    some = np.random.default_rng(0).permutation(positions)[:30].reshape(5, 6)
    assert (rows_of().locate(some, seed=3)[0] == numbers[some]).all()


def test_a_loader_takes_steps_of_whole_groups():
    sizes = {"global_batch_size": 24, "micro_batch_size": 4, "world_size": 3}
    ranks = [Loader(rows_of(), PairCollator(TOKENIZER), seed=1, rank=rank, **sizes) for rank in range(3)]
    for _ in range(8):
        for loader in ranks:
            labels = Counter(label for batch in loader.next_step() for label in batch.examples.labels.tolist())
            assert labels.total() == 8 and all(count % 4 == 0 for count in labels.values())
    with pytest.raises(UserError) as error:
        Loader(rows_of(), PairCollator(TOKENIZER), seed=1, global_batch_size=10, micro_batch_size=5)
    assert error.value.code == "not_divisible"


@pytest.mark.parametrize(
    ("labels", "per_label", "code"),
    [
        (None, 4, "no_classes"),
        (np.zeros((6, 2), "f4"), 4, "no_classes"),
        (np.linspace(0, 1, 6), 4, "no_classes"),
        (np.array([0, 0, 0, 0]), 4, "few_labels"),
        (np.array([0, 0, 1, 2]), 4, "few_labels"),
        (np.array([0, 0, 1, 1]), 1, "out_of_range"),
    ],
)
def test_labels_that_make_no_groups_are_refused(labels, per_label, code):
    corpus = random_examples(6 if labels is None else len(labels), labels=labels)
    with pytest.raises(UserError) as error:
        GroupedRows(corpus, 64, PAD, per_label=per_label)
    assert error.value.code == code
