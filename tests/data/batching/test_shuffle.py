import numpy as np
import pytest

from torchrecipes.data.batching.shuffle import fold_in, permute, row_indices, splitmix64

BILLION = 10**9
BUCKETS = 1000
# A chi-square of 999 degrees of freedom is 999 +- 45: these are six standard deviations.
LOW, HIGH = 999 - 270, 999 + 270


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 255, 256, 257, 1000, 65_536, 100_003])
@pytest.mark.parametrize("key", [0, 1, 12345])
def test_is_a_bijection(n, key):
    assert np.array_equal(np.sort(permute(np.arange(n), n, fold_in(key))), np.arange(n))


@pytest.mark.parametrize("n", [2**31 - 1, 2**40, 2**40 + 1, 2**62])
def test_large_ranges_stay_in_range_without_repeats(n):
    index = np.concatenate([np.arange(1000), n - 1 - np.arange(1000)])
    image = permute(index, n, fold_in(7))
    assert image.min() >= 0 and image.max() < n
    assert len(np.unique(image)) == len(index)


def test_every_permutation_of_three_is_equally_likely():
    counts = {}
    for key in range(3000):
        image = tuple(permute(np.arange(3), 3, fold_in(key)).tolist())
        counts[image] = counts.get(image, 0) + 1
    assert len(counts) == 6
    assert sum((count - 500) ** 2 / 500 for count in counts.values()) < 30  # 5 degrees of freedom: p < 1e-5


def chi_square(values, n):
    counts = np.bincount((values.astype(np.float64) / n * BUCKETS).astype(np.int64), minlength=BUCKETS)
    expected = len(values) / BUCKETS
    return ((counts - expected) ** 2 / expected).sum()


def uniformity(permutation):
    """Statistics, each a chi-square of 999 degrees of freedom, of a permutation of a billion rows.

    `permutation(index, key)`. Neighbours, distant rows, powers of two apart, and the same row under many keys.
    """
    index = np.arange(1_000_000, dtype=np.int64)
    apart = {f"differences at {d}": d for d in (1, 2, 3, 1024, 2**20, 500_000_000)}
    one = permutation(index, fold_in(11))
    statistics = {"first million": chi_square(one, BILLION)}
    strided = permutation(index * 997, fold_in(11))
    statistics["every 997th"] = chi_square(strided, BILLION)
    for name, d in apart.items():
        other = permutation((index + d) % BILLION, fold_in(11))
        statistics[name] = chi_square((other - one) % BILLION, BILLION)
    by_key = np.concatenate([permutation(index[:100], fold_in(key)) for key in range(5000)])
    statistics["first hundred of 5,000 keys"] = chi_square(by_key, BILLION)
    two_keys = (permutation(index, fold_in(12)) - one) % BILLION
    statistics["two keys"] = chi_square(two_keys, BILLION)
    return statistics


def test_a_billion_rows_are_in_uniform_order():
    for name, value in uniformity(lambda index, key: permute(index, BILLION, key)).items():
        assert LOW < value < HIGH, (name, value)


def affine(index, key):
    return (index * 736_338_717 + int(key[0] % np.uint64(BILLION))) % BILLION


def two_rounds(index, key):
    left, right = index.astype(np.uint64) // np.uint64(31_623), index.astype(np.uint64) % np.uint64(31_623)
    for number in range(2):
        left, right = right, (left + splitmix64(right ^ fold_in(key, number))) % np.uint64(31_623)
    return ((left * np.uint64(31_623) + right) % np.uint64(BILLION)).astype(np.int64)


@pytest.mark.parametrize("biased", [affine, two_rounds], ids=["affine", "two Feistel rounds"])
def test_the_uniformity_test_finds_a_biased_permutation(biased):
    assert not all(LOW < value < HIGH for value in uniformity(biased).values())


def test_an_epoch_visits_every_row_once_and_the_next_in_another_order():
    n, global_batch_size = 101, 8
    rows, epochs = row_indices(np.arange(3 * n), n, seed=3)
    for epoch in range(3):
        assert np.array_equal(np.sort(rows[epochs == epoch]), np.arange(n))
    assert not np.array_equal(rows[:n], rows[n : 2 * n])
    assert not np.array_equal(rows[:n], row_indices(np.arange(n), n, seed=4)[0])
    step_13 = row_indices(12 * global_batch_size + np.arange(global_batch_size), n, seed=3)[
        0
    ]  # the epoch ends inside it
    assert np.array_equal(step_13, rows[96:104])


def test_without_shuffling_rows_come_in_order():
    rows, epochs = row_indices(np.arange(7), 5, seed=0, shuffle=False)
    assert rows.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert epochs.tolist() == [0, 0, 0, 0, 0, 1, 1]


def test_keys_depend_on_every_number_and_their_order():
    keys = [fold_in(*numbers)[0] for numbers in [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (2**63,), (-1,)]]
    assert len(set(keys)) == len(keys)
    assert np.array_equal(fold_in(5, np.arange(3)), np.concatenate([fold_in(5, i) for i in range(3)]))
