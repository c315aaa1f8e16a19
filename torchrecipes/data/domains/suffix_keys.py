"""Public suffixes as 64-bit keys, and the place of each in a list, for many names at a time.

A suffix of up to 8 characters is its own key: its bytes. A longer one is hashed, with the highest bit set, which no
ASCII character has.
"""

import numpy as np

from torchrecipes.data.domains.hashing import name_hashes

WORD = 8  # bytes
SHIFTS = np.array([64 - 8 * size for size in range(WORD + 1)], np.uint64)  # by the length of a suffix
LONG = np.uint64(1 << 63)
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: Knuth, The Art of Computer Programming, 6.4


def suffix_keys(characters: np.ndarray, ends: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The key of the last characters of every name: uint64 `[D]`.

    Args:
        characters: uint8 `[C]`, ASCII of the names, one after the other.
        ends: int64 `[D]`, where each name ends.
        sizes: int64 `[D]`, characters of each suffix.
    """
    buffer = np.zeros(WORD + len(characters), np.uint8)
    buffer[WORD:] = characters
    before = np.ndarray(len(characters) + 1, "<u8", buffer, 0, (1,))  # the 8 bytes before every place
    keys = before[ends] >> SHIFTS[np.minimum(sizes, WORD)]
    long = np.flatnonzero(sizes > WORD)
    if len(long):
        size = sizes[long]
        places = np.arange(size.sum()) + (ends[long] - np.cumsum(size)).repeat(size)
        keys[long] = name_hashes(characters[places], size) | LONG
    return keys


def key_of(suffix: str) -> int:
    """The key of one suffix."""
    characters = np.frombuffer(suffix.encode(), np.uint8)
    size = np.array([len(characters)])
    return int(suffix_keys(characters, size, size)[0])


class KeyTable:
    """Places of keys in a list.

    Args:
        keys: uint64 `[K]`, distinct; those that are asked for most come first.
    """

    def __init__(self, keys: np.ndarray):
        self.keys = keys
        bits = max(12, len(keys).bit_length() + 4)
        self._shift = np.uint64(64 - bits)
        self._slots = np.zeros(1 << bits, np.int32)
        # Of keys that share a slot, the first one has it; the others are found by bisection.
        self._slots[self._slots_of(keys)[::-1]] = np.arange(len(keys))[::-1]
        self._order = np.argsort(keys)
        self._sorted = keys[self._order]

    def _slots_of(self, keys: np.ndarray) -> np.ndarray:
        return ((keys * MULTIPLIER) >> self._shift).view(np.int64)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The place of each key in the list, -1 where it is not in it: int32 `[D]`."""
        if not len(self.keys):
            return np.full(len(keys), -1, np.int32)
        places = self._slots[self._slots_of(keys)]
        missed = np.flatnonzero(self.keys[places] != keys)
        some = keys[missed]
        near = np.minimum(self._sorted.searchsorted(some), len(self.keys) - 1)
        places[missed] = np.where(self._sorted[near] == some, self._order[near], -1)
        return places
