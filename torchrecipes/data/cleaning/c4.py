"""Heuristics of C4 (Raffel et al. 2020, "Exploring the Limits of Transfer Learning", JMLR 21, section 2.2).

Functions for single rules, and `C4`, which applies them as the paper does. They were made for English web pages: code
has curly brackets, and headings end without a full stop.
"""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torchrecipes.config.metadata import Count
from torchrecipes.data.cleaning.removal import Removal
from torchrecipes.errors import UserError

TERMINAL_PUNCTUATION = (".", "!", "?", '"', "”", "’", "'", "»")
POLICY_PHRASES = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
_CITATION = re.compile(r"\[(\d*|edit|citation needed)\]", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?]+[\"'”’»)\]]*(?=\s|$)")


def ends_in_punctuation(line: str) -> bool:
    """Whether a line ends in a full stop, exclamation or question mark or closing quotation mark; not an ellipsis."""
    line = line.rstrip()
    return line.endswith(TERMINAL_PUNCTUATION) and not line.endswith("...")


def mentions_policy(line: str) -> bool:
    """Whether a line has one of the six phrases of cookie and privacy notices."""
    lower = line.lower()
    return any(phrase in lower for phrase in POLICY_PHRASES)


def remove_citations(text: str) -> str:
    """Return the text without Wikipedia's markers: [1], [edit], [citation needed]."""
    while "[" in text and (shorter := _CITATION.sub("", text)) != text:  # [[1]] leaves []
        text = shorter
    return text


def count_sentences(text: str) -> int:
    """Return the number of ends of sentences: the paper used NLTK's punkt, this is `.`, `!` or `?` before a blank."""
    return len(_SENTENCE_END.findall(text))


@dataclass(frozen=True)
class C4:
    """C4's filter: removes lines, then documents. False or None switches a rule off.

    The paper's spans of three sentences that occur elsewhere are not removed: see the steps for duplicates and
    boilerplate. Its first version asked for 5 sentences and 3 words.

    Args:
        citations: remove Wikipedia's markers from lines.
        terminal_punctuation: remove lines that do not end in a terminal punctuation mark.
        min_words_per_line: remove lines with fewer words.
        javascript: remove lines with the word Javascript.
        policy: remove lines with phrases of cookie and privacy notices.
        lorem_ipsum: remove documents with this phrase.
        curly_bracket: remove documents with a `{`.
        min_sentences: remove documents with fewer sentences.
        bad_words: a file with a word or phrase per line; documents with one of them are removed. The paper's list is
            "List of Dirty, Naughty, Obscene or Otherwise Bad Words".
    """

    citations: bool = True
    terminal_punctuation: bool = True
    min_words_per_line: Count | None = 5
    javascript: bool = True
    policy: bool = True
    lorem_ipsum: bool = True
    curly_bracket: bool = True
    min_sentences: Count | None = 3
    bad_words: str | None = None

    def __call__(self, text: str) -> str | Removal:
        """Return the remaining lines, or why the document is removed."""
        if self.lorem_ipsum and "lorem ipsum" in text.lower():
            return Removal("c4.lorem_ipsum", "it has 'lorem ipsum'")
        if self.curly_bracket and "{" in text:
            return Removal("c4.curly_bracket", "it has '{'")
        if self.bad_words is not None and (found := _bad_words(self.bad_words).search(text.lower())):
            return Removal("c4.bad_words", f"it has '{found[0].strip()}'")
        lines = [line for line in (remove_citations(text) if self.citations else text).split("\n") if self._keeps(line)]
        kept = "\n".join(lines).strip("\n")
        if not kept or kept.isspace():
            return Removal("c4.no_lines", "no line is left")
        if self.min_sentences is not None and (sentences := count_sentences(kept)) < self.min_sentences:
            return Removal("c4.min_sentences", f"{sentences} sentences")
        return kept

    def _keeps(self, line: str) -> bool:
        if not line or line.isspace():
            return True
        return not (
            (self.terminal_punctuation and not ends_in_punctuation(line))
            or (self.min_words_per_line is not None and len(line.split()) < self.min_words_per_line)
            or (self.javascript and "javascript" in line.lower())
            or (self.policy and mentions_policy(line))
        )


@cache
def _bad_words(file: str) -> re.Pattern:
    try:
        words = [word.strip().lower() for word in Path(file).read_text("utf-8").splitlines() if word.strip()]
    except (OSError, UnicodeDecodeError) as error:
        hint = "Give a text file with a word or phrase per line."
        raise UserError(
            f"{file} cannot be read ({error})", key="c4.bad_words", hint=hint, code="unreadable_file"
        ) from None
    if not words:
        raise UserError(f"{file} holds no words", key="c4.bad_words", code="invalid_value")
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)")
