"""64-bit hashes of words and of n-grams of words, for many texts at once.

1. A text is an array of code points. A table says which are parts of words: letters, digits, marks and the underscore.
   A character of a script without blanks between words (Han, kana, Thai, Lao, Khmer, Burmese) is a word by itself.
2. The hash of a word is a polynomial in random numbers of its characters, in lower case, modulo 2^64. With prefix sums
   it costs a few NumPy operations for all words of all texts.
3. The hash of an n-gram is a sum of its words' hashes times odd constants.

Comparing ignores case, punctuation and white space; the texts themselves are not changed.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from torchrecipes.data.batching.shuffle import splitmix64

BATCH_CHARACTERS = 1 << 18
NO_WORD, PART_OF_A_WORD, A_WORD = 0, 1, 2
_BASE = 0x5851F42D4C957F2D  # odd, so that it has an inverse modulo 2^64
_NO_BLANKS = (  # first and last code point of scripts that put no blanks between words
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF), (0x20000, 0x3FFFF),
)  # fmt: skip


class Words(NamedTuple):
    """The words of several texts.

    Attributes:
        hashes: uint64 `[words]`.
        offsets: int64 `[texts + 1]`: text i has the words from `offsets[i]` to `offsets[i + 1]`.
        starts: int64 `[words]`: the character of its text with which a word begins.
        stops: int64 `[words]`: the character after its last one.
    """

    hashes: np.ndarray
    offsets: np.ndarray
    starts: np.ndarray
    stops: np.ndarray


class NGrams(NamedTuple):
    """The n-grams of several texts: uint64 hashes, and int64 `[texts + 1]` offsets as in `Words`."""

    hashes: np.ndarray
    offsets: np.ndarray


def in_batches(texts: Sequence[str]) -> Iterator[slice]:
    """Yield slices of `texts` that are hashed at once: of about 2^18 characters, or one long text."""
    first = characters = 0
    for number, text in enumerate(texts):
        characters += len(text)
        if characters >= BATCH_CHARACTERS or number + 1 == len(texts):
            yield slice(first, number + 1)
            first, characters = number + 1, 0


def hash_words(texts: Sequence[str]) -> Words:
    """Return the hashes of the words of each text; equal words have equal hashes, in any text and process."""
    joined = "\n".join(texts)
    codes = np.frombuffer(joined.encode("utf-32-le"), np.uint32)
    kinds, values = _tables()
    kind = kinds[codes]
    inside = kind != NO_WORD
    before = np.concatenate([[NO_WORD], kind[:-1]]).astype(np.uint8)
    begins = inside & ((before == NO_WORD) | (kind == A_WORD) | (before == A_WORD))
    ends = np.concatenate([~inside[1:] | begins[1:], [True]])[: len(inside)] & inside
    starts, stops = np.flatnonzero(begins), np.flatnonzero(ends) + 1
    powers, inverses = _powers(1 << max(20, len(codes).bit_length()))
    sums = np.zeros(len(codes) + 1, np.uint64)
    np.cumsum(values[codes] * powers[: len(codes)], out=sums[1:])
    hashes = splitmix64((sums[stops] - sums[starts]) * inverses[starts])
    text_starts = np.concatenate([[0], np.cumsum([len(text) + 1 for text in texts])])
    offsets = np.searchsorted(starts, text_starts)
    origin = np.repeat(text_starts[:-1], np.diff(offsets))
    return Words(hashes, offsets, starts - origin, stops - origin)


def ngram_hashes(words: Words, n: int) -> NGrams:
    """Return the hashes of the n-grams of each text; all words of a text of fewer than n are one n-gram."""
    hashes, offsets = words.hashes, words.offsets
    counts = np.diff(offsets)
    factors = splitmix64(np.arange(1, n + 1, dtype=np.uint64)) | np.uint64(1)
    padded = np.concatenate([hashes, np.zeros(n, np.uint64)])
    sums = np.zeros(len(hashes), np.uint64)
    for position in range(n):
        sums += padded[position : position + len(hashes)] * factors[position]
    short = np.flatnonzero((counts > 0) & (counts < n))
    first = offsets[:-1][short]
    sums[first] = 0
    for position in range(n - 1):
        has = counts[short] > position
        sums[first[has]] += hashes[first[has] + position] * factors[position]
    # The last n - 1 words of a text begin no n-gram of it; the first word of a short one does.
    left = np.repeat(offsets[1:], counts) - np.arange(len(hashes))
    begins = left >= n
    begins[first] = True
    per_text = np.concatenate([[0], np.cumsum(np.where(counts < n, counts > 0, counts - n + 1))])
    return NGrams(splitmix64(sums[begins]), per_text)


@cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Return for every code point its kind (uint8) and the random number of its lower case (uint64)."""
    characters = [chr(code) for code in range(0x110000)]
    kinds = np.array([c == "_" or unicodedata.category(c)[0] in "LNM" for c in characters], np.uint8)
    for first, last in _NO_BLANKS:
        kinds[first : last + 1] *= A_WORD
    lower = np.arange(0x110000, dtype=np.uint64)
    for code, character in enumerate(characters[:0x1E944]):  # the last letter with a lower case is in this block
        if len(small := character.lower()) == 1:
            lower[code] = ord(small)
    return kinds, splitmix64(lower + np.uint64(1))


@cache
def _powers(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the powers of the base and of its inverse, from 0 to `length - 1`."""
    both = []
    for base in (_BASE, pow(_BASE, -1, 1 << 64)):
        powers = np.full(length, base, np.uint64)
        powers[0] = 1
        both.append(np.cumprod(powers))
    return both[0], both[1]
