"""`lookalikes`: names that pass for another one, as they stand in DNS: homoglyphs, typos and combinations with words.

1. A kind has several methods; each changes the label before the public suffix, or the suffix, or puts words around it.
2. Every choice is drawn from one seed, by `random.random` alone, whose numbers do not change between Python versions: a
   look-alike is a pure function of name, kinds and seed.
3. A label in punycode is changed in its Unicode form and encoded again.

The kinds are those of the studies of squatting: Holgers et al. 2006 for homoglyphs, Wang et al. 2006 (Strider
Typo-Patrol) and Szurdi et al. 2014 for typos, Kintis et al. 2017 (arXiv:1708.08519) for combinations.
"""

import importlib
import random
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import product
from typing import NamedTuple

from torchrecipes.data.domains.public_suffix_list import default_list
from torchrecipes.errors import UserError

# Groups of letters that look alike in common fonts. Letters of two groups do not.
ASCII_GROUPS = ("o0", "il1", "s5", "z2", "b8", "gq9", "e3", "a4", "t7")
ASCII_SEQUENCES = (("rn", "m"), ("vv", "w"), ("cl", "d"))
SCRIPTS = ("LATIN", "GREEK", "CYRILLIC", "ARMENIAN")  # those with look-alikes of many Latin letters

KEYBOARDS = {
    "qwerty": ("1234567890-", "qwertyuiop", "asdfghjkl", "zxcvbnm"),
    "qwertz": ("1234567890", "qwertzuiop", "asdfghjkl", "yxcvbnm-"),
    "azerty": ("1234567890", "azertyuiop", "qsdfghjklm", "wxcvbn"),
}
ROW_OFFSETS = (0.0, 0.5, 0.75, 1.25)  # of the rows of a keyboard, in keys

WORDS = (
    "access", "account", "admin", "alert", "app", "auth", "bank", "billing", "bonus", "care", "center", "client",
    "cloud", "confirm", "connect", "contact", "customer", "delivery", "download", "drive", "email", "free", "gift",
    "help", "helpdesk", "home", "id", "info", "invoice", "live", "login", "mail", "manage", "mobile", "my", "net",
    "news", "notice", "official", "online", "password", "pay", "payment", "portal", "promo", "protect", "recovery",
    "refund", "register", "reset", "safe", "secure", "security", "service", "shop", "signin", "sso", "status", "store",
    "support", "team", "tech", "track", "unlock", "update", "us", "user", "verify", "wallet", "web",
)  # fmt: skip
SUFFIXES = (
    "com", "net", "org", "info", "biz", "co", "cm", "om", "io", "app", "dev", "me", "us", "eu", "de", "ru", "cn", "in",
    "co.uk", "com.br", "cc", "tv", "ws", "pw", "online", "site", "top", "xyz", "shop", "club", "live", "support",
)  # fmt: skip

MAX_LENGTH = 253  # characters of a name (RFC 1035, section 2.3.4)
LABEL = re.compile(r"(?!..--)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?|xn--[a-z0-9-]{0,58}[a-z0-9]")
ATTEMPTS = 20  # with other draws, where a change gives no valid name


class Lookalike(NamedTuple):
    """A name that passes for another.

    Attributes:
        name: as it stands in DNS: lower-case ASCII, Unicode in punycode.
        kind: `homoglyph`, `typo` or `combo`.
        method: the change within the kind, such as `transposition`.
    """

    name: str
    kind: str
    method: str


def lookalikes(
    name: str, kinds: Mapping[str, float] | None = None, seed: int = 0, *, count: int = 10, suffix: str | None = None
) -> list[Lookalike]:
    """Some of the look-alikes of a name, all different, in random order.

    | kind | method | looks like |
    |---|---|---|
    | `homoglyph` | `ascii` | paypa1, rnicrosoft |
    | | `unicode` | letters of one other script, in punycode |
    | | `accent` | letters with marks, in punycode |
    | `typo` | `omission`, `repetition`, `transposition` | of a character or two |
    | | `replacement`, `insertion` | of a neighbouring key on QWERTY, QWERTZ or AZERTY |
    | | `hyphen`, `missing_dot`, `suffix` | pay-pal, wwwpaypal, paypal.cm |
    | `combo` | `word`, `subdomain` | paypal-login, paypal.com.account-verify.net |

    Args:
        name: the true name, normalized (see `parse_name`).
        kinds: how often each kind is drawn, relative to the others; None: all three equally. The methods of a kind are
            equally likely.
        seed: chooses among the look-alikes.
        count: at most so many. There are fewer where a name is too short or too long to be changed in other ways.
        suffix: the public suffix of the name; None: as the list of the package `publicsuffixlist` has it.

    Raises:
        UserError: an unknown kind, or weights that are no weights (code `invalid_value`); a package is missing.
    """
    kinds, suffix = checked_kinds(kinds), public_suffix(name) if suffix is None else suffix
    found = {}
    for attempt in range(4 * count):
        one = lookalike(name, suffix, kinds, (seed << 20) + attempt)
        if one is not None:
            found.setdefault(one.name, one)
        if len(found) == count:
            break
    return list(found.values())


def lookalike(
    name: str, suffix: str, kinds: Mapping[str, float], seed: int, max_length: int = MAX_LENGTH
) -> Lookalike | None:
    """One look-alike of a name, a pure function of the arguments.

    Args:
        name: the true name, normalized.
        suffix: its public suffix, without a dot before it.
        kinds: as `checked_kinds` returns them.
        seed: 0 or more.
        max_length: characters of the look-alike, at most.

    Returns:
        None where no change that was tried gives a valid name: the name is a character, or as long as it may be.
    """
    draw, parts = Draw(seed), split_name(name, suffix)
    names, weights = list(kinds), list(kinds.values())
    for _ in range(ATTEMPTS):
        kind = draw.weighted(names, weights)
        method = draw.pick(METHODS[kind])
        found = method.change(parts, draw)
        if found is not None and found != name and len(found) <= max_length and is_hostname(found):
            return Lookalike(found, kind, method.name)
    return None


class Parts(NamedTuple):
    """A name in three parts.

    Attributes:
        before: the labels before the registrable one, each with its dot; empty where there are none.
        text: the registrable label, in Unicode.
        suffix: the public suffix, with the dot before it.
    """

    before: str
    text: str
    suffix: str

    def join(self, text: str | None = None, before: str | None = None, suffix: str | None = None) -> str | None:
        """The name in ASCII with some parts replaced; None where IDNA does not allow its label."""
        text, suffix = self.text if text is None else text, self.suffix if suffix is None else suffix
        label = text if text.isascii() else encoded_label(text)
        return None if label is None else (self.before if before is None else before) + label + suffix


def public_suffix(name: str) -> str:
    """The public suffix of a name, as the list of the package `publicsuffixlist` has it."""
    return name[default_list().suffix_start(name) :]


def split_name(name: str, suffix: str) -> Parts:
    """The parts of a name with this suffix; of a suffix alone the first label is the registrable one."""
    rest = name.removesuffix(suffix)[:-1]
    if not rest:
        rest, _, suffix = name.partition(".")
    before, dot, label = rest.rpartition(".")
    return Parts(before + dot, decoded_label(label), f".{suffix}" if suffix else "")


def is_hostname(name: str) -> bool:
    """Whether every label has 1 to 63 letters, digits, underscores and inner hyphens (RFC 1123, section 2.1)."""
    return all(LABEL.fullmatch(label) for label in name.split("."))


def checked_kinds(kinds: Mapping[str, float] | None) -> dict[str, float]:
    """The weights of the kinds that are drawn.

    Raises:
        UserError: an unknown kind, or weights that are no weights (code `invalid_value`).
    """
    kinds = dict.fromkeys(METHODS, 1.0) if kinds is None else dict(kinds)
    for kind, weight in kinds.items():
        if kind not in METHODS:
            hint = f"The kinds are {', '.join(METHODS)}."
            raise UserError(f"there is no kind '{kind}'", key=f"kinds.{kind}", hint=hint, code="invalid_value")
        if not 0 <= weight < float("inf"):
            raise UserError(f"{weight} is not a weight", key=f"kinds.{kind}", hint="0: never.", code="invalid_value")
    if not any(kinds.values()):
        raise UserError("no kind has a weight", key="kinds", hint="Set one above 0.", code="invalid_value")
    return {kind: float(weight) for kind, weight in kinds.items() if weight}


class Draw:
    """Choices from a seed, the same on any machine."""

    def __init__(self, seed: int):
        self._random = random.Random(seed).random

    def below(self, n: int) -> int:
        """An integer from 0 to `n - 1`."""
        return int(self._random() * n)

    def pick(self, items: Sequence):
        """One of the items."""
        return items[int(self._random() * len(items))]

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self._random() < probability

    def weighted(self, items: Sequence, weights: Sequence[float]):
        """One of the items, as likely as its weight says."""
        left = self._random() * sum(weights)
        for item, weight in zip(items, weights, strict=True):
            left -= weight
            if left < 0:
                return item
        return items[-1]


def decoded_label(label: str) -> str:
    """The Unicode form of a label; the label itself where it is not valid punycode."""
    if not label.startswith("xn--"):
        return label
    idna = _package("idna")
    try:
        return idna.decode(label)
    except idna.IDNAError:
        return label


def encoded_label(text: str) -> str | None:
    """The label as it stands in DNS (RFC 5891), None where it must not."""
    idna = _package("idna")
    try:
        return idna.encode(text).decode()
    except idna.IDNAError:
        return None


def ascii_homoglyph(parts: Parts, draw: Draw) -> str | None:
    """One to three letters replaced by ASCII ones, or by two of them, that look alike."""
    text, spans = parts.text, []
    for start, letter in enumerate(text):
        spans += [(start, 1, other) for other in _ascii_homoglyphs().get(letter, ())]
        spans += [(start, 2, letter) for pair, letter in ASCII_SEQUENCES if text.startswith(pair, start)]
    return parts.join(_replaced(text, spans, draw)) if spans else None


def accent(parts: Parts, draw: Draw) -> str | None:
    """One to three letters with a diacritical mark."""
    table, text = _accents(), parts.text
    spans = [(start, 1, draw.pick(table[letter])) for start, letter in enumerate(text) if letter in table]
    return parts.join(_replaced(text, spans, draw)) if spans else None


def unicode_homoglyph(parts: Parts, draw: Draw) -> str | None:
    """One letter, or all that can be, replaced by letters of one other script that look the same (UTS 39)."""
    table, text = _unicode_homoglyphs(), parts.text
    places = [start for start, letter in enumerate(text) if letter in table]
    if not places:
        return None
    first = draw.pick(places)
    script = draw.pick(list(table[text[first]]))
    changed = [place for place in places if script in table[text[place]]] if draw.chance(0.5) else [first]
    letters = list(text)
    for place in changed:
        letters[place] = draw.pick(table[text[place]][script])
    return parts.join("".join(letters))


def _replaced(text: str, spans: list[tuple[int, int, str]], draw: Draw) -> str:
    """The text with one to three of the spans (start, length, what replaces it) replaced, none twice."""
    for _ in range(draw.pick((1, 1, 1, 2, 2, 3))):
        start, length, new = draw.pick(spans)
        text = text[:start] + new + text[start + length :]
        after, by = start + length, len(new) - length
        spans = [
            (s + by if s >= after else s, n, other) for s, n, other in spans if s >= after or s + n <= start
        ]  # fmt: skip
        if not spans:
            break
    return text


def on_label(change: Callable[[str, Draw], str | None]) -> Callable[[Parts, Draw], str | None]:
    """The change of a name that is a change of its label."""

    def changed(parts: Parts, draw: Draw) -> str | None:
        text = change(parts.text, draw)
        return None if text is None else parts.join(text)

    return changed


def omission(text: str, draw: Draw) -> str:
    """A character less."""
    place = draw.below(len(text))
    return text[:place] + text[place + 1 :]


def repetition(text: str, draw: Draw) -> str:
    """A character twice."""
    place = draw.below(len(text))
    return text[:place] + text[place] + text[place:]


def transposition(text: str, draw: Draw) -> str | None:
    """Two neighbours exchanged."""
    if len(text) < 2:
        return None
    place = draw.below(len(text) - 1)
    return text[:place] + text[place + 1] + text[place] + text[place + 2 :]


def replacement(text: str, draw: Draw) -> str | None:
    """A neighbouring key instead of the right one."""
    place, near = draw.below(len(text)), neighbours(draw.pick(list(KEYBOARDS)))
    if text[place] not in near:
        return None
    return text[:place] + draw.pick(near[text[place]]) + text[place + 1 :]


def insertion(text: str, draw: Draw) -> str | None:
    """A neighbouring key pressed together with the right one."""
    place, near = draw.below(len(text)), neighbours(draw.pick(list(KEYBOARDS)))
    if text[place] not in near:
        return None
    before = place + draw.below(2)
    return text[:before] + draw.pick(near[text[place]]) + text[before:]


def hyphen(text: str, draw: Draw) -> str | None:
    """A hyphen between two characters."""
    if len(text) < 2:
        return None
    place = 1 + draw.below(len(text) - 1)
    return text[:place] + "-" + text[place:]


def missing_dot(parts: Parts, draw: Draw) -> str | None:
    """A dot of the name left out, that after `www` where it has none but before its suffix."""
    before = parts.before or "www."
    dot = draw.pick([place for place, letter in enumerate(before) if letter == "."])
    if dot < len(before) - 1:
        return parts.join(before=before[:dot] + before[dot + 1 :])
    start = before.rfind(".", 0, dot) + 1
    return parts.join(decoded_label(before[start:dot]) + parts.text, before=before[:start])


def other_suffix(parts: Parts, draw: Draw) -> str | None:
    """Another public suffix."""
    return parts.join(suffix=f".{draw.pick(SUFFIXES)}")


def with_word(parts: Parts, draw: Draw) -> str | None:
    """A word before or after the label, with a hyphen or without."""
    word, between = draw.pick(WORDS), draw.pick(("-", ""))
    text = word + between + parts.text if draw.chance(0.4) else parts.text + between + word
    return parts.join(text, before="", suffix=f".{draw.pick(SUFFIXES)}" if draw.chance(0.5) else None)


def as_subdomain(parts: Parts, draw: Draw) -> str | None:
    """The name, or its label with a word or without, as a subdomain of a name that is words."""
    host = draw.pick(WORDS) + draw.pick(("-", "")) + draw.pick(WORDS) + "." + draw.pick(SUFFIXES)
    if draw.chance(0.4):
        return parts.join(before="", suffix=f"{parts.suffix}.{host}")
    text = parts.text + draw.pick(("-", "")) + draw.pick(WORDS) if draw.chance(0.3) else parts.text
    return parts.join(text, before="", suffix=f".{host}")


class Method(NamedTuple):
    """A way to change a name."""

    name: str
    change: Callable[[Parts, Draw], str | None]


METHODS = {
    "homoglyph": (
        Method("ascii", ascii_homoglyph),
        Method("unicode", unicode_homoglyph),
        Method("accent", accent),
    ),
    "typo": (
        Method("omission", on_label(omission)),
        Method("repetition", on_label(repetition)),
        Method("transposition", on_label(transposition)),
        Method("replacement", on_label(replacement)),
        Method("insertion", on_label(insertion)),
        Method("hyphen", on_label(hyphen)),
        Method("missing_dot", missing_dot),
        Method("suffix", other_suffix),
    ),
    "combo": (Method("word", with_word), Method("subdomain", as_subdomain)),
}


@cache
def neighbours(keyboard: str) -> dict[str, str]:
    """The keys next to each key of a keyboard: those whose middles are less than 1.3 keys away."""
    keys = [
        (key, column + offset, row)
        for row, (line, offset) in enumerate(zip(KEYBOARDS[keyboard], ROW_OFFSETS, strict=True))
        for column, key in enumerate(line)
    ]
    near = {key: "" for key, _, _ in keys}
    for (key, x, y), (other, x2, y2) in product(keys, keys):
        if key != other and (x - x2) ** 2 + (y - y2) ** 2 < 1.3**2:
            near[key] += other
    return near


@cache
def _ascii_homoglyphs() -> dict[str, tuple[str, ...]]:
    """For every letter the letters, or the two letters, that look like it."""
    table = {letter: tuple(group.replace(letter, "")) for group in ASCII_GROUPS for letter in group}
    for pair, letter in ASCII_SEQUENCES:
        table[letter] = (*table.get(letter, ()), pair)
    return table


@cache
def _accents() -> dict[str, str]:
    """For every ASCII letter the letters of Latin-1, Latin Extended-A and -B that are it with a mark, as in é."""
    table: dict[str, str] = {}
    for letter in map(chr, range(0xDF, 0x250)):
        base, *marks = unicodedata.normalize("NFD", letter)
        if marks and base.isascii() and letter.islower() and encoded_label(letter):
            table[base] = table.get(base, "") + letter
    return table


@cache
def _unicode_homoglyphs() -> dict[str, dict[str, str]]:
    """For every letter, by script, those that look the same and may stand in a name; and back to ASCII."""
    package = _package("confusable_homoglyphs.confusables")
    alias = _package("confusable_homoglyphs.categories").alias
    table: dict[str, dict[str, str]] = {}
    for letter in "abcdefghijklmnopqrstuvwxyz0123456789":
        for entry in package.confusables_data.get(letter, ()):
            other = entry["c"]
            script = alias(other[0])
            if len(other) == 1 and not other.isascii() and script in SCRIPTS and encoded_label(f"a{other}"):
                for one, by, two in ((letter, script, other), (other, "ASCII", letter)):
                    scripts = table.setdefault(one, {})
                    scripts[by] = scripts.get(by, "") + two
    return table


def _package(name: str):
    try:
        return importlib.import_module(name)
    except ImportError:
        hint = "pip install 'torchrecipes[domains]'"
        raise UserError(f"{name.partition('.')[0]} is not installed", hint=hint, code="missing_package") from None
