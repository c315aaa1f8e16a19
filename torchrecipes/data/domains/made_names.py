"""`synthetic_names`: made-up domain names, for trials without a list of real ones."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from torchrecipes.data.domains.line_parsing import ParsedNames, parse_lines
from torchrecipes.data.domains.name_files import NameBlock, count_names, read_names
from torchrecipes.data.domains.name_syntax import NameOptions
from torchrecipes.data.domains.public_suffix_list import default_list
from torchrecipes.data.sources.records import Cursor, Document, ReadStats
from torchrecipes.errors import UserError

MAKING = 1  # raise it when the same arguments give other names than before: it enters the fingerprint
BLOCK_NAMES = 1 << 16
NOTE = "SYNTHETIC names, made by a generator"
# Weights, roughly as registrations are spread in the quarterly reports of https://www.dnib.com.
SUFFIXES = {
    "com": 430, "cn": 40, "de": 48, "net": 35, "org": 31, "co.uk": 26, "uk": 4, "nl": 17, "ru": 16, "com.br": 15,
    "fr": 12, "eu": 10, "it": 10, "com.au": 11, "ca": 9, "co": 8, "in": 8, "pl": 7, "us": 6, "io": 5, "ai": 3,
    "co.jp": 3, "jp": 3, "es": 6, "ch": 7, "se": 4, "at": 4, "be": 5, "dk": 4, "cz": 4, "info": 10, "biz": 4,
    "xyz": 11, "top": 11, "shop": 10, "online": 9, "site": 6, "store": 5, "club": 3, "app": 3, "dev": 2, "me": 3,
    "tv": 2, "co.za": 4, "com.cn": 6, "com.mx": 3, "com.ar": 3, "com.tr": 3, "co.kr": 3, "com.tw": 2, "co.in": 3,
    "co.nz": 2, "com.ua": 2, "org.uk": 2, "ac.uk": 1, "gov.br": 1, "edu.au": 1, "github.io": 3, "vercel.app": 1,
}  # fmt: skip
# By how often they should occur, the most frequent first.
WORDS = """
shop online web home group media my tech design studio world the net life art house blog store best auto pro city
data car photo travel hotel health food green marketing music digital game soft blue star sport city center real
estate free consulting service club team school fashion beauty energy academy garden dental clinic law book news
video cloud solar wine coffee kids baby wedding pet dog cat house love family fit gym yoga dance print paper
river mountain lake sea ocean forest tree flower rose stone gold silver black white red sun moon sky light fire
water air north south east west first new old little big smart easy fast quick open secure safe simple pure fresh
happy lucky magic royal prime elite global inter euro asia america london paris berlin texas miami york sydney
build builder bau works craft wood metal steel glass roof floor door window kitchen bath furniture interior
bike moto truck parts repair rent taxi limo drive road trip tour guide map flight camp trail outdoor hunting
fishing golf tennis soccer football runner ski surf dive sail boat ship cargo logistic transport express post
bank finance capital invest trade market fund credit loan tax money coin crypto bit pay cash insurance legal
doctor med pharma care nurse therapy massage spa skin hair nails makeup perfume jewelry watch shoes bags dress
style vintage modern classic urban country farm organic natural bio eco vegan bakery pizza burger grill sushi
tea beer bar cafe restaurant kitchen chef recipe cake chocolate candy honey spice fruit juice apple lemon orange
learn teach study tutor science lab research math robot drone electric power energy battery engine motor system
code dev app mobile phone computer server host domain link search social chat mail forum review compare deal
coupon discount sale outlet gift card box toys play fun joy dream hope faith church spirit soul mind zen peace
poker casino bet win slot game arena player quest hero dragon wolf tiger lion bear eagle falcon fox horse bird
miller smith johnson brown garcia martin weber schmidt rossi silva santos kim lee chen wang tanaka novak jensen
""".split()
ENDINGS = "hub lab ly ify ster online shop web pro hq app io 24 360 now go plus one tv".split()
SYLLABLES = """
ba be bi bo ca co cu da de di do fa fi fo ga go ha ka ke ki ko la le li lo lu ma me mi mo na ne ni no nu pa pe pi po
ra re ri ro ru sa se si so su ta te ti to va ve vi vo xa xi ya yo za ze zi zo bra cro dri fla gra plo pri sta tri
lex nex zen tron dex max via ora ium ent ix on ar el is os um
""".split()
SUBDOMAINS = "www mail shop blog api m dev cdn news img static app docs test".split()
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# The parts of names, in order of their share: w is a word, s a syllable, e an ending, l a letter, n a number.
SHAPES = {
    "ww": 34, "ssw": 4, "we": 9, "wn": 6, "ss": 3, "sss": 13, "ssss": 4, "w-w": 8, "w-w-w": 2, "www": 8, "lllw": 3,
    "llll": 2, "nnw": 1, "nnn": 1, "wwn": 2,
}  # fmt: skip
SUBDOMAIN_SHARE = 0.06


@dataclass
class synthetic_names:
    """Synthetic domain names, made by a generator: words, brandables, hyphens, digits, and the usual suffixes.

    A model trained on them shows that a pipeline works, and nothing about real names.

    Args:
        num_names: number of names. Some occur several times.
        seed: another seed gives other names.

    Attributes:
        report: as in `domain_names`.

    Raises:
        UserError: `num_names` is less than 1, or `seed` less than 0 (code `invalid_value`).
    """

    num_names: int = 1_000_000
    seed: int = 0
    report: ReadStats = field(default_factory=ReadStats, init=False, repr=False, compare=False)
    _cursor: Cursor = field(default_factory=Cursor, init=False, repr=False, compare=False)

    def __post_init__(self):
        for key, least in {"num_names": 1, "seed": 0}.items():
            if (value := getattr(self, key)) < least:
                hint = f"Set {least} or more."
                raise UserError(f"{value} is less than {least}", key=key, hint=hint, code="invalid_value")
        self.options, self.suffixes = NameOptions(), default_list()

    @property
    def name(self) -> str:
        """Says that the names are synthetic."""
        return f"{self.num_names:,} SYNTHETIC domain names (made by a generator, seed {self.seed})"

    @property
    def num_bytes(self) -> int:
        """Not known before the names are made: 0."""
        return 0

    @property
    def fingerprint(self) -> str:
        """A hash of the arguments, the version of the generator, and the rules of public suffixes."""
        text = json.dumps(["synthetic names", MAKING, self.num_names, self.seed, self.suffixes.fingerprint])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def __iter__(self) -> Iterator[Document]:
        return self.read()

    def read(self, position: dict[str, Any] | None = None) -> Iterator[Document]:
        """Yield the names, with a new report.

        Args:
            position: what `position` returned, or a block's; None: from the first name.
        """
        self.report, self._cursor = ReadStats(note=NOTE), Cursor(position)
        return read_names(self._blocks(self._cursor.place), self.parse, self.report, self._cursor)

    def position(self) -> dict[str, Any]:
        """Return the position after the last document or block."""
        return self._cursor.position

    def blocks(self, position: dict[str, Any] | None = None) -> Iterator[NameBlock]:
        """Yield the names as lines, for `parse`, with a new report.

        Args:
            position: a block's position; None: from the first name.

        Raises:
            ValueError: the position is inside a block, as those of `read` are.
        """
        self.report, self._cursor = ReadStats(note=NOTE), Cursor(position)
        if self._cursor.skip:
            raise ValueError("this position of read is inside a block")
        for block in self._blocks(self._cursor.place):
            self._cursor.at(**block.position)
            yield block

    def parse(self, block: NameBlock) -> ParsedNames:
        """Return the names of a block. Threads may call it at the same time."""
        return parse_lines(block.data, self.options, self.suffixes)

    def count(self, block: NameBlock, parsed: ParsedNames) -> None:
        """Add what `parse` gave for a block to the report."""
        count_names(self.report, block, parsed)

    def _blocks(self, place: dict[str, Any]) -> Iterator[NameBlock]:
        for first in range(place.get("line", 1) - 1, self.num_names, BLOCK_NAMES):
            count = min(BLOCK_NAMES, self.num_names - first)
            lines = _make_lines(self.seed, first // BLOCK_NAMES, count)
            yield NameBlock(lines, "SYNTHETIC", first + 1, {"line": first + count + 1})


class _Parts:
    """Strings by number, as characters in one array; number 0 is empty."""

    def __init__(self):
        self.strings, self.kinds = [""], {}

    def add(self, kind: str, strings: list[str], weights: np.ndarray) -> None:
        self.kinds[kind] = len(self.strings), np.cumsum(weights / weights.sum())
        self.strings += strings

    def choose(self, kind: str, rng: np.random.Generator, count: int) -> np.ndarray:
        first, shares = self.kinds[kind]
        return first + np.minimum(np.searchsorted(shares, rng.random(count)), len(shares) - 1)

    def join(self, parts: np.ndarray) -> bytes:
        """Return the strings of `[N, P]` numbers, row by row, without anything between them."""
        characters = np.frombuffer("".join(self.strings).encode(), np.uint8)
        sizes = np.array([len(string) for string in self.strings])
        starts = np.cumsum(sizes) - sizes
        parts = parts.ravel()
        lengths = sizes[parts]
        shift = starts[parts] - (np.cumsum(lengths) - lengths)
        return characters[np.arange(lengths.sum()) + np.repeat(shift, lengths)].tobytes()


def _make_parts() -> _Parts:
    parts = _Parts()
    words = list(dict.fromkeys(WORDS))
    parts.add("w", words, 1 / (np.arange(len(words)) + 20))
    numbers = [*map(str, range(1, 100)), *map(str, range(1990, 2027)), "007", "123", "365", "888", "101"]
    parts.add("n", numbers, 1 / (np.arange(len(numbers)) + 10))
    for kind, strings in {"s": SYLLABLES, "e": ENDINGS, "l": list(LETTERS), "-": ["-"], "\n": ["\n"]}.items():
        parts.add(kind, strings, np.ones(len(strings)))
    subdomains = [f"{name}." for name in SUBDOMAINS]
    parts.add("subdomain", subdomains, 1 / (np.arange(len(subdomains)) + 1))
    parts.add("suffix", [f".{suffix}\n" for suffix in SUFFIXES], np.array(list(SUFFIXES.values()), float))
    return parts


def _make_lines(seed: int, block: int, count: int) -> bytes:
    """Return the first names of a block, one per line. All are made, so that they do not depend on their number."""
    rng, parts = np.random.Generator(np.random.Philox([seed, block])), _make_parts()
    longest = max(map(len, SHAPES))
    shares = np.cumsum(list(SHAPES.values())) / sum(SHAPES.values())
    shapes = np.searchsorted(shares, rng.random(BLOCK_NAMES))
    chosen = np.zeros((BLOCK_NAMES, longest + 2), np.int64)
    has_subdomain = np.flatnonzero(rng.random(BLOCK_NAMES) < SUBDOMAIN_SHARE)
    chosen[has_subdomain, 0] = parts.choose("subdomain", rng, len(has_subdomain))
    for number, shape in enumerate(SHAPES):
        rows = np.flatnonzero(shapes == number)
        for column, kind in enumerate(shape, 1):
            chosen[rows, column] = parts.choose(kind, rng, len(rows))
    chosen[:, -1] = parts.choose("suffix", rng, BLOCK_NAMES)
    return parts.join(chosen[:count])
