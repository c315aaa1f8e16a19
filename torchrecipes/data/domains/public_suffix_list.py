"""`PublicSuffixList`: splits names into the registrable part and the public suffix.

The rules and their algorithm are those of https://publicsuffix.org/list, read as the package `publicsuffixlist` reads
them: of the longest tail of a name (in labels) that a rule speaks of, an exception is one label too long, a wildcard
takes one label more, a plain rule is the suffix; without a rule the last label is.
"""

import hashlib
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from torchrecipes.data.domains.hashing import words_of
from torchrecipes.data.domains.suffix_table import PADDING, SuffixTable
from torchrecipes.errors import UserError

BEGIN_ICANN, END_ICANN = "// ===BEGIN ICANN DOMAINS===", "// ===END ICANN DOMAINS==="


class PublicSuffixList:
    """Rules of public suffixes: `com`, `co.uk`, `*.ck` with the exception `!www.ck`.

    A name whose last label is in no rule has that label as its suffix (the default rule `*`).

    Args:
        path: a .dat file in the format of https://publicsuffix.org/list; None: the one in `publicsuffixlist`.
        only_icann: leave out the rules of private owners, such as `blogspot.com`.
        text: the content of such a file, in place of `path`.

    Attributes:
        rules: for the tail of names that a rule speaks of, in ASCII (punycode) and lower case: the labels of the suffix
            beyond those of the tail: 0, 1 for the parent of a wildcard, -1 for an exception.

    Raises:
        UserError: no such file (code `no_such_file`), no rules in it (`no_rules`), `publicsuffixlist` is not installed
            (`missing_package`).
    """

    def __init__(self, path: str | Path | None = None, only_icann: bool = False, text: str | None = None):
        self.path, self.only_icann = path, only_icann
        if text is not None:
            self._text = text
        self.rules = _parse_rules(self._text, only_icann)
        if not self.rules:
            hint = "Give a file like https://publicsuffix.org/list/public_suffix_list.dat, with its section marks."
            raise UserError(
                f"{path} holds no rules of public suffixes", key="public_suffix_list", hint=hint, code="no_rules"
            )
        self.max_labels = 1 + max(tail.count(".") for tail in self.rules)

    @cached_property
    def lines(self) -> list[str]:
        """The rules in ASCII, sorted, as in a file: `com`, `*.ck`, `!www.ck`."""
        signs = {-1: "!", 0: "", 1: "*."}
        return sorted(signs[extra] + tail for tail, extra in self.rules.items())

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the rules."""
        return hashlib.sha256("\n".join(self.lines).encode()).hexdigest()[:32]

    @property
    def text(self) -> str:
        """The rules in the format of the list, one per line, in ASCII and alphabetical order: what `text` takes."""
        signs = {0: "", 1: "*.", -1: "!"}
        return "\n".join(sorted(signs[extra] + tail for tail, extra in self.rules.items()))

    def split_suffix(self, name: str) -> str:
        """Return the public suffix of a lower-case name without a trailing dot, by `publicsuffixlist`."""
        return self._package_list.publicsuffix(name)

    def suffix_starts(self, characters: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return, for every name, the number of characters before its public suffix.

        Args:
            characters: lower-case ASCII of the names, one after the other, `[C]` uint8.
            lengths: characters of each name, `[D]`.

        Returns:
            `[D]` int64; 0: the name is a public suffix itself.
        """
        lengths = np.asarray(lengths, np.int64)
        buffer = np.zeros(len(characters) + 2 * PADDING, np.uint8)
        buffer[PADDING : PADDING + len(characters)] = characters
        ends = np.cumsum(lengths, dtype=np.int64)
        dots = np.flatnonzero(characters == ord("."))
        dots_before = dots.searchsorted(ends)  # dots up to the end of each name
        last = dots_before + np.arange(len(ends))
        num_labels = np.diff(last, prepend=-1)
        label_starts = np.empty(len(dots) + len(ends), np.int64)
        is_first = np.zeros(len(label_starts), bool)
        is_first[last - num_labels + 1] = True
        label_starts[is_first] = ends - lengths
        label_starts[~is_first] = dots + 1
        label_starts += PADDING
        labels = self.table.suffix_labels(words_of(buffer), ends + PADDING, label_starts, last, num_labels)
        return label_starts[last - labels + 1] - PADDING - (ends - lengths)

    def suffix_start(self, name: str) -> int:
        """Return the number of characters of a lower-case name before its public suffix."""
        labels = name.split(".")
        start = len(labels) - 1
        for first in range(max(0, len(labels) - self.max_labels), len(labels)):
            extra = self.rules.get(".".join(labels[first:]))
            if extra is not None:
                start = max(0, first - extra)
                break
        return len(name) - len(".".join(labels[start:]))

    @cached_property
    def table(self) -> SuffixTable:
        """The rules as arrays."""
        return SuffixTable(self.rules)

    @cached_property
    def _text(self) -> str:
        path = _package().PSLFILE if self.path is None else Path(self.path).expanduser()
        try:
            return Path(path).read_text("utf-8", errors="surrogateescape")
        except OSError as error:
            problem = f"{path} cannot be read: {error.strerror or error}"
            raise UserError(problem, key="public_suffix_list", code="no_such_file") from error

    @cached_property
    def _package_list(self) -> Any:
        return _package().PublicSuffixList(self._text, only_icann=self.only_icann)


@cache
def default_list(only_icann: bool = False) -> PublicSuffixList:
    """Return the list of the package `publicsuffixlist`; it is read once."""
    return PublicSuffixList(only_icann=only_icann)


def _package() -> Any:
    try:
        import publicsuffixlist
    except ImportError as error:
        problem, hint = "publicsuffixlist is not installed", "pip install 'torchrecipes[domains]'"
        raise UserError(problem, hint=hint, code="missing_package") from error
    return publicsuffixlist


def _parse_rules(text: str, only_icann: bool) -> dict[str, int]:
    rules: dict[str, int] = {}
    is_read = not only_icann
    for line in text.splitlines():
        if only_icann and line.rstrip() in (BEGIN_ICANN, END_ICANN):
            is_read = line.rstrip() == BEGIN_ICANN
        rule = line.lower().split(" ")[0].rstrip()
        if not is_read or not rule or rule.startswith("//"):
            continue
        extra = -1 if rule[0] == "!" else int(rule.startswith("*."))
        tail = rule.removeprefix("!").removeprefix("*.")
        if extra < 0 and "." not in tail:
            continue
        try:
            tail = tail if tail.isascii() else tail.encode("idna").decode("ascii")
        except UnicodeError:
            continue
        # An exception is stronger than a wildcard, and that is stronger than a plain rule.
        rules[tail] = max(rules.get(tail, 0), extra, key=lambda extra: (0, 1, -1).index(extra))
    return rules
