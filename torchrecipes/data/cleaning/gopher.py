"""Heuristics of Gopher (Rae et al. 2021, "Scaling Language Models", arXiv:2112.11446, appendix A.1.1).

A word is what stands between white space. The functions measure a text; `GopherQuality` and `GopherRepetition` compare
the measures with the paper's thresholds. They were made for English web pages: code fails most of them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from torchrecipes.config.metadata import Count, Fraction, NonNegative
from torchrecipes.data.cleaning.removal import Removal

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
BULLETS = ("•", "‣", "▪", "●", "◦", "·", "*", "-", "–")
ELLIPSES = ("...", "…")
TOP_NGRAMS = {2: 0.20, 3: 0.18, 4: 0.16}  # table A1
DUPLICATE_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
_LETTER = re.compile(r"[^\W\d_]")


def mean_word_length(words: Sequence[str]) -> float:
    """Return the mean number of characters of a word."""
    return sum(map(len, words)) / max(1, len(words))


def symbol_to_word_ratio(text: str, num_words: int) -> float:
    """Return the number of hash signs, or of ellipses if there are more, per word."""
    return max(text.count("#"), sum(map(text.count, ELLIPSES))) / max(1, num_words)


def bullet_line_share(lines: Sequence[str]) -> float:
    """Return the share of lines that begin with a bullet point."""
    return sum(line.lstrip().startswith(BULLETS) for line in lines) / max(1, len(lines))


def ellipsis_line_share(lines: Sequence[str]) -> float:
    """Return the share of lines that end with an ellipsis."""
    return sum(line.rstrip().endswith(ELLIPSES) for line in lines) / max(1, len(lines))


def alphabetic_word_share(words: Sequence[str]) -> float:
    """Return the share of words with at least one letter."""
    return sum(word.isalpha() or _LETTER.search(word) is not None for word in words) / max(1, len(words))


def count_stop_words(words: Sequence[str], stop_words: Sequence[str] = STOP_WORDS) -> int:
    """Return how many different ones of `stop_words` a text has, in any case."""
    found = set(map(str.lower, words))
    return sum(word in found for word in stop_words)


def duplicate_shares(pieces: Sequence[str]) -> tuple[float, float]:
    """Return the share of pieces (lines, paragraphs) that have occurred before, and their share of the characters."""
    seen: set[str] = set()
    count = characters = total = 0
    for piece in pieces:
        total += len(piece)
        if piece in seen:
            count += 1
            characters += len(piece)
        seen.add(piece)
    return count / max(1, len(pieces)), characters / max(1, total)


def ngram_shares(words: Sequence[str]) -> tuple[dict[int, float], dict[int, float]]:
    """Return two shares of the characters in words, by n of the n-grams (table A1).

    Returns:
        For n = 2 to 4, the share within the most frequent n-gram if it occurs more than once; for n = 5 to 10, the
        share within n-grams that occur more than once. A character counts once, whatever the number of n-grams that
        hold it.
    """
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    total = max(1, int(lengths.sum()))
    hashes = np.fromiter(map(xxhash.xxh3_64_intdigest, map(str.encode, words)), np.uint64, len(words))
    shares = dict.fromkeys((*TOP_NGRAMS, *DUPLICATE_NGRAMS), 0.0)
    ngrams = hashes
    for n in shares:
        ngrams = ngrams[:-1] * np.uint64(0x9E3779B97F4A7C15) + hashes[n - 1 :]
        order = np.argsort(ngrams)
        is_next = np.diff(ngrams[order]) != 0
        firsts = np.flatnonzero(np.concatenate([[True], is_next]))
        counts = np.diff(firsts, append=len(ngrams))
        if counts.max() <= 1:
            break  # no longer n-gram is repeated
        wanted = counts > 1
        if n in TOP_NGRAMS:
            wanted = np.arange(len(counts)) == counts.argmax()
        repeated = np.empty(len(ngrams), bool)
        repeated[order] = np.repeat(wanted, counts)
        shares[n] = _covered(repeated, lengths, n) / total
    return {n: shares[n] for n in TOP_NGRAMS}, {n: shares[n] for n in DUPLICATE_NGRAMS}


def _covered(starts: np.ndarray, lengths: np.ndarray, n: int) -> int:
    # Characters of the words inside the n-grams that begin where `starts` is true.
    edges = np.zeros(len(lengths) + 1, np.int64)
    edges[: len(starts)] += starts
    edges[n : n + len(starts)] -= starts
    return int(lengths[np.cumsum(edges[:-1]) > 0].sum())


@dataclass(frozen=True)
class GopherQuality:
    """Gopher's quality filter: removes a document outside these bounds. None switches a rule off.

    Args:
        min_words: fewest words.
        max_words: most words.
        min_mean_word_length: least mean length of a word in characters.
        max_mean_word_length: greatest mean length of a word in characters.
        max_symbol_word_ratio: most hash signs, or ellipses, per word.
        max_bullet_lines: largest share of lines that begin with a bullet point.
        max_ellipsis_lines: largest share of lines that end with an ellipsis.
        min_alphabetic_words: least share of words with a letter.
        min_stop_words: fewest different stop words.
        stop_words: the paper's eight, which are English.
    """

    min_words: Count | None = 50
    max_words: Count | None = 100_000
    min_mean_word_length: NonNegative | None = 3.0
    max_mean_word_length: NonNegative | None = 10.0
    max_symbol_word_ratio: NonNegative | None = 0.1
    max_bullet_lines: Fraction | None = 0.9
    max_ellipsis_lines: Fraction | None = 0.3
    min_alphabetic_words: Fraction | None = 0.8
    min_stop_words: Count | None = 2
    stop_words: tuple[str, ...] = STOP_WORDS

    def __call__(self, text: str) -> str | Removal:
        """Return the text, or why it is removed."""
        words = text.split()
        lines = [line for line in text.split("\n") if line and not line.isspace()]
        for option, measure, unit in (
            ("min_words", lambda: len(words), "words"),
            ("max_words", lambda: len(words), "words"),
            ("min_mean_word_length", lambda: mean_word_length(words), "characters per word"),
            ("max_mean_word_length", lambda: mean_word_length(words), "characters per word"),
            ("max_symbol_word_ratio", lambda: symbol_to_word_ratio(text, len(words)), "symbols per word"),
            ("max_bullet_lines", lambda: bullet_line_share(lines), "of the lines"),
            ("max_ellipsis_lines", lambda: ellipsis_line_share(lines), "of the lines"),
            ("min_alphabetic_words", lambda: alphabetic_word_share(words), "of the words"),
            ("min_stop_words", lambda: count_stop_words(words, self.stop_words), "stop words"),
        ):
            bound = getattr(self, option)
            if bound is None:
                continue
            value = measure()
            if value < bound if option.startswith("min") else value > bound:
                return Removal(f"gopher_quality.{option}", f"{_number(value)} {unit}")
        return text


@dataclass(frozen=True)
class GopherRepetition:
    """Gopher's repetition filter: removes a document in which too much is repeated. None switches a rule off.

    Lines are the ones that are not blank, paragraphs stand between blank lines.

    Args:
        max_duplicate_lines: largest share of lines that have occurred before.
        max_duplicate_paragraphs: the same of paragraphs.
        max_duplicate_line_characters: largest share of characters in such lines.
        max_duplicate_paragraph_characters: the same of paragraphs.
        max_top_ngrams: largest share of characters in the most frequent n-gram, by n from 2 to 4.
        max_duplicate_ngrams: largest share of characters in n-grams that occur more than once, by n from 5 to 10.
    """

    max_duplicate_lines: Fraction | None = 0.30
    max_duplicate_paragraphs: Fraction | None = 0.30
    max_duplicate_line_characters: Fraction | None = 0.20
    max_duplicate_paragraph_characters: Fraction | None = 0.20
    max_top_ngrams: tuple[float, float, float] | None = tuple(TOP_NGRAMS.values())
    max_duplicate_ngrams: tuple[float, float, float, float, float, float] | None = tuple(DUPLICATE_NGRAMS.values())

    def __call__(self, text: str) -> str | Removal:
        """Return the text, or why it is removed."""
        lines = [stripped for line in text.split("\n") if (stripped := line.strip())]
        paragraphs = [stripped for part in re.split(r"\n\s*\n", text) if (stripped := part.strip())]
        for what, pieces in (("line", lines), ("paragraph", paragraphs)):
            shares = duplicate_shares(pieces)
            for share, option, of in (
                (shares[0], f"max_duplicate_{what}s", f"of the {what}s"),
                (shares[1], f"max_duplicate_{what}_characters", "of the characters"),
            ):
                bound = getattr(self, option)
                if bound is not None and share > bound:
                    return Removal(f"gopher_repetition.{option}", f"{_number(share)} {of}")
        if self.max_top_ngrams is None and self.max_duplicate_ngrams is None:
            return text
        for option, shares in zip(("max_top_ngrams", "max_duplicate_ngrams"), ngram_shares(text.split()), strict=True):
            for bound, (n, share) in zip(getattr(self, option) or (), shares.items(), strict=False):
                if share > bound:
                    return Removal(f"gopher_repetition.{option}", f"{_number(share)} of the characters, n = {n}")
        return text


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"
