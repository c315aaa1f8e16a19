"""Shuffles rows without a list of positions: the row at any position of an epoch is computed.

1. The rows of an epoch are the numbers from 0 to n - 1. `permute` is a bijection of these, selected by a key.
2. It is a Feistel network on the next larger power of four, with cycle walking: numbers that fall outside are sent
   through again until they are inside (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", section 4).
3. Row r of optimizer step s is position `(s - 1) * global_batch_size + r` of the run, counted over all epochs; every
   epoch has a key of its own.

So the place of any step is found in constant time, whatever the number of rows, and nothing has to be stored.
"""

import numpy as np

ROUNDS = 6
GOLDEN, MIX_1, MIX_2, *SHIFTS = np.array(
    [0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 30, 27, 31], dtype=np.uint64
)


def splitmix64(x: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit numbers that maps similar ones far apart (SplitMix64's finalizer, Steele et al. 2014).

    Args:
        x: uint64, any shape but `()`: NumPy warns of overflow in scalars.
    """
    x = x ^ (x >> SHIFTS[0])
    x *= MIX_1
    x ^= x >> SHIFTS[1]
    x *= MIX_2
    x ^= x >> SHIFTS[2]
    return x


def fold_in(*numbers: int | np.ndarray) -> np.ndarray:
    """One 64-bit key from several numbers; different numbers, or another order of them, give another key.

    Args:
        numbers: integers, or integer arrays that broadcast.

    Returns:
        uint64 of the broadcast shape, at least `[1]`.
    """
    key = np.zeros(1, np.uint64)
    for number in numbers:
        key = splitmix64((key + GOLDEN) ^ splitmix64(np.atleast_1d(np.asarray(number)).astype(np.uint64) + GOLDEN))
    return key


def permute(index: np.ndarray, n: int | np.ndarray, key: np.ndarray) -> np.ndarray:
    """Applies a random permutation of `range(n)` to `index`.

    Args:
        index: integers in `range(n)`, any shape but `()`.
        n: 1 to 2**52; or as many as indices, where they are of different permutations.
        key: uint64 `[1]`, from `fold_in`: selects the permutation; or as many as indices.

    Returns:
        int64 of the shape of `index`.
    """
    n, key = np.atleast_1d(n), np.atleast_1d(key)
    bits = np.frexp((n - 1).astype(np.float64))[1]  # of the largest index
    half = np.maximum(2, (bits + 1) // 2).astype(np.uint64)
    # Per index where they differ, else one for all.
    columns = [half, n.astype(np.uint64), *np.moveaxis(fold_in(key[..., None], np.arange(ROUNDS)), -1, 0)]
    if max(n.size, key.size) > 1:
        columns = [np.broadcast_to(column, index.shape) for column in columns]
    out = np.array(index, dtype=np.uint64)
    outside = np.ones(out.shape, dtype=bool)
    while outside.any():
        half, n, *round_keys = (column if column.size == 1 else column[outside] for column in columns)
        low, x = (np.uint64(1) << half) - np.uint64(1), out[outside]
        left, right = x >> half, x & low
        for round_key in round_keys:
            left, right = right, left ^ (splitmix64(right ^ round_key) >> np.uint64(64) - half)
        x = (left << half) | right
        out[outside] = x
        outside[outside] = x >= n
    return out.astype(np.int64)


def row_indices(positions: np.ndarray, n: int, seed: int, shuffle: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows that a run trains on at positions counted from its start.

    Args:
        positions: integers of any shape, 0 or more: `(step - 1) * global_batch_size + r`.
        n: rows in an epoch.
        seed: selects the order; another seed or another epoch has another order.
        shuffle: False: every epoch goes from row 0 to n - 1.

    Returns:
        row int64 in `range(n)`, epoch int64 from 0, of the shape of `positions`.
    """
    epochs, rows = np.divmod(np.asarray(positions, dtype=np.int64), n)
    if shuffle:
        for epoch in np.unique(epochs):  # one, or two where an epoch ends inside the step
            now = epochs == epoch
            rows[now] = permute(rows[now], n, fold_in(seed, epoch))
    return rows, epochs
