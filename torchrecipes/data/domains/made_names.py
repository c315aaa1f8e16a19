"""`synthetic_names`: made-up domain names, for trials without a list of real ones."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from torchrecipes.data.domains.line_parsing import ParsedNames, parse_lines
from torchrecipes.data.domains.name_files import NameBlock, count_names
from torchrecipes.data.domains.name_syntax import NameOptions
from torchrecipes.data.domains.public_suffix_list import default_list
from torchrecipes.data.sources.records import Document, ReadStats
from torchrecipes.errors import UserError

MAKING = 1  # raise it when the same arguments give other names than before: it enters the fingerprint
BLOCK_NAMES = 1 << 16
WORDS = (
    "shop blue river cloud data home green stone light media travel craft north city garden pixel smart happy".split()
)
SUFFIXES = {"com": 0.5, "net": 0.08, "org": 0.08, "de": 0.1, "co.uk": 0.08, "io": 0.04, "fr": 0.06, "com.br": 0.06}


@dataclass
class synthetic_names:
    """Synthetic domain names, made by a generator: words, brandables, hyphens, digits, and usual suffixes.

    They follow no real registration. A model trained on them shows that a pipeline works, nothing about real names.

    Args:
        num_names: number of names; some occur twice, as some words do.
        seed: names with another seed are others.

    Raises:
        UserError: `num_names` is less than 1 (code `invalid_value`).
    """

    num_names: int = 1_000_000
    seed: int = 0
    report: ReadStats = field(default_factory=ReadStats, init=False, repr=False, compare=False)
    _position: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self):
        if self.num_names < 1:
            problem = f"{self.num_names} is less than 1"
            raise UserError(problem, key="num_names", hint="Set 1 or more.", code="invalid_value")
        self.options, self.suffixes = NameOptions(), default_list()

    @property
    def name(self) -> str:
        """Says that the names are synthetic."""
        return f"{self.num_names:,} SYNTHETIC domain names (made by a generator, seed {self.seed})"

    @property
    def num_bytes(self) -> int:
        """Not known before the names are made."""
        return 0

    @property
    def fingerprint(self) -> str:
        """A hash of the arguments and of the generator's version."""
        text = json.dumps(["synthetic names", MAKING, self.num_names, self.seed, self.suffixes.fingerprint])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def __iter__(self) -> Iterator[Document]:
        return self.read()

    def read(self, position: dict[str, Any] | None = None) -> Iterator[Document]:
        """Yield the names, with a new report.

        Args:
            position: what `position` returned; None: from the first name.
        """
        self._position, self.report = dict(position or {}), ReadStats()
        return self._documents(self._position.get("documents", 0))

    def _documents(self, first: int) -> Iterator[Document]:
        for number in range(first // BLOCK_NAMES, -(-self.num_names // BLOCK_NAMES)):
            lines = self._lines(number).decode().split("\n")
            for index in range(max(first - number * BLOCK_NAMES, 0), len(lines) - 1):
                documents = number * BLOCK_NAMES + index + 1
                self.report.documents += 1
                self.report.characters += len(lines[index])
                self._position = {"documents": documents}
                yield Document(lines[index], f"synthetic:{documents}")

    def position(self) -> dict[str, Any]:
        """Return the position after the last document or block."""
        return self._position

    def blocks(self, position: dict[str, Any] | None = None) -> Iterator[NameBlock]:
        """Yield the names as lines, for `parse`, with a new report.

        Args:
            position: that of a block; None: from the first name.

        Raises:
            ValueError: the position is inside a block, as those of `read` are.
        """
        first = (position or {}).get("documents", 0)
        if first % BLOCK_NAMES and first != self.num_names:
            raise ValueError("this position of read is inside a block")
        self._position, self.report = dict(position or {}), ReadStats()
        for number in range(-(-first // BLOCK_NAMES), -(-self.num_names // BLOCK_NAMES)):
            end = min((number + 1) * BLOCK_NAMES, self.num_names)
            self._position = {"documents": end}
            yield NameBlock(self._lines(number), "synthetic", number * BLOCK_NAMES + 1, self._position)

    def parse(self, block: NameBlock) -> ParsedNames:
        """Return the names of a block. Threads may call it at the same time."""
        return parse_lines(block.data, self.options, self.suffixes)

    def count(self, block: NameBlock, parsed: ParsedNames) -> None:
        """Add what `parse` gave for a block to the report."""
        count_names(self.report, block, parsed)

    def _lines(self, number: int) -> bytes:
        count = min(BLOCK_NAMES, self.num_names - number * BLOCK_NAMES)
        rng = np.random.Generator(np.random.Philox([self.seed, number]))
        words = np.array(WORDS)
        first, second = words[rng.integers(len(WORDS), size=(2, count))].tolist()
        suffixes = rng.choice(list(SUFFIXES), count, p=list(SUFFIXES.values())).tolist()
        digits = rng.integers(1000, size=count).tolist()
        return "".join(
            f"{a}{b}{number}.{suffix}\n" for a, b, number, suffix in zip(first, second, digits, suffixes, strict=True)
        ).encode()
