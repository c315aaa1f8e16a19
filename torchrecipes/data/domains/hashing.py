"""A hash of domain names, many at a time."""

import numpy as np

K0, K1, K2 = (np.uint64(key) for key in (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, 0xC2B2AE3D27D4EB4F))
WORD_MASKS = np.array([(1 << 8 * count) - 1 for count in range(9)], np.uint64)  # by the number of bytes to keep


def name_hashes(characters: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return a 64-bit hash of every name, the same on any machine; all its bits are well mixed.

    The bytes of a name, padded with zeros to a multiple of 16, are little-endian words `w0, w1, ...` of 8 bytes. Modulo
    2^64, starting from `h = length * K0`, every 16 bytes make `h = mix(h ^ (w0 * K1 + w1 * K2))`, where `mix` is the
    finalizer of splitmix64 (https://prng.di.unimi.it/splitmix64.c).

    Args:
        characters: ASCII of the names, one after the other, `[C]` uint8.
        lengths: characters of each name, 1 or more, `[D]`.

    Returns:
        `[D]` uint64.
    """
    buffer = np.zeros(len(characters) + 16, np.uint8)
    buffer[: len(characters)] = characters
    lengths = np.asarray(lengths, np.int64)
    return hash_words(words_of(buffer), np.cumsum(lengths) - lengths, lengths)


def words_of(buffer: np.ndarray) -> np.ndarray:
    """Return a view of uint8 `[N]` as the little-endian word of 8 bytes at every byte, `[N - 7]` uint64."""
    return np.ndarray((len(buffer) - 7,), "<u8", buffer, 0, (1,))


def hash_words(words: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`name_hashes` of names that start anywhere in a buffer, given its `words_of`; 16 bytes follow the last name."""
    hashes = lengths.view(np.uint64) * K0
    hashes ^= _sixteen_bytes(words, starts, lengths)
    hashes = mix(hashes)
    longest = int(lengths.max(initial=0))
    which = np.flatnonzero(lengths > 16) if longest > 16 else None
    for chunk in range(16, longest, 16):
        which = which if chunk == 16 else which[lengths[which] > chunk]
        hashes[which] = mix(hashes[which] ^ _sixteen_bytes(words, starts[which] + chunk, lengths[which] - chunk))
    return hashes


def _sixteen_bytes(words: np.ndarray, starts: np.ndarray, left: np.ndarray) -> np.ndarray:
    first = words[starts]
    first &= WORD_MASKS.take(left, mode="clip")
    first *= K1
    second = words[starts + 8]
    second &= WORD_MASKS.take(left - 8, mode="clip")
    second *= K2
    first += second
    return first


def mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64, elementwise on uint64."""
    values = values ^ (values >> np.uint64(30))
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values
