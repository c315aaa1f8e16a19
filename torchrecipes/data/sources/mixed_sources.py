"""`mixture`: several sources with weights, each of which becomes a corpus of its own."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import xxhash

from torchrecipes.config.suggest import did_you_mean
from torchrecipes.data.sources.records import Document, ReadStats, Source
from torchrecipes.errors import UserError

RESERVED = ("train", "validation", "tokenizer", "eval_sets")  # folders that lie beside those of the parts


@dataclass(eq=False)
class Mixture:
    """Sources by name, and how many rows of a batch come from each. Made by `mixture`.

    Its documents are those of the first source, then those of the second, and so on: this is what a tokenizer is
    trained on. Rows are mixed when they are read (`torchrecipes.data.batching.MixtureRows`).

    Attributes:
        sources: by name.
        weights: segments of (first optimizer step, weight by name), or None: by size.
        alpha: exponent of the sizes where there are no weights.
        max_epochs: by name, the passes after which a source is left out.
        added: names of sources that may join a run which was started without them.
    """

    sources: dict[str, Source]
    weights: list[tuple[int, dict[str, float]]] | None
    alpha: float
    max_epochs: dict[str, float]
    added: tuple[str, ...]
    report: ReadStats = field(default_factory=ReadStats)

    @property
    def name(self) -> str:
        """The names of the sources."""
        return ", ".join(f"{name} ({source.name})" for name, source in self.sources.items())

    @property
    def num_bytes(self) -> int:
        """Size of all sources; 0 if that of one is not known."""
        sizes = [source.num_bytes for source in self.sources.values()]
        return sum(sizes) if all(sizes) else 0

    @property
    def fingerprint(self) -> str:
        """Of names and contents; weights do not change what is in the corpora."""
        parts = [f"{name}={source.fingerprint}" for name, source in self.sources.items()]
        return xxhash.xxh3_128_hexdigest("\0".join(parts).encode())

    def __iter__(self) -> Iterator[Document]:
        self.report = ReadStats()
        for source in self.sources.values():
            yield from source
            self.report.documents += source.report.documents
            self.report.characters += source.report.characters
            for reason, count in source.report.skipped.items():
                self.report.skipped[reason] = self.report.skipped.get(reason, 0) + count
                examples = self.report.examples.setdefault(reason, [])
                examples += source.report.examples[reason][: max(0, 5 - len(examples))]


def mixture(
    sources: dict[str, Source],
    weights: dict[str, float] | list[tuple[int, dict[str, float]]] | None = None,
    alpha: float = 1.0,
    max_epochs: dict[str, float] | None = None,
    replay_ratio: float | None = None,
    added: list[str] | None = None,
) -> Mixture:
    """Several sources, mixed row by row.

        data.source:
          _component_: torchrecipes.data.sources.mixture
          sources:
            domain: {_component_: torchrecipes.data.sources.files, path: reports}
            general: {_component_: torchrecipes.data.sources.files, path: wikipedia}
          weights: {domain: 0.8, general: 0.2}

    Each source has its own corpus and its own order; of every 1,024 rows exactly the stated share comes from each.

    Args:
        sources: by name: letters, digits, `-` and `_`.
        weights: share of the rows by name, scaled to a sum of 1; 0 leaves a source out. Or a list of [optimizer step,
            weights]: each holds from its step on, and the first step is 0. None: by the size of the corpora.
        alpha: without weights, a source's share is proportional to its number of tokens to this power: 1 is
            proportional, 0 is equal shares (Conneau et al. 2020, "Unsupervised Cross-lingual Representation Learning
            at Scale", section 3.1, use 0.3).
        max_epochs: by name, passes over a source after which it is left out and the others take its share.
        replay_ratio: the share of the second of two sources, instead of `weights`.
        added: names of sources that may join a run that was started without them; any other change of the sources is
            refused when a run is resumed.

    Raises:
        UserError: names or numbers are not valid (code `mixture`).
    """
    if len(sources) < 2 or not all(re.fullmatch(r"[A-Za-z0-9_-]+", name) for name in sources):
        raise _mixture("give two sources or more, with names of letters, digits, - and _", "sources")
    if reserved := [name for name in sources if name in RESERVED]:
        raise _mixture(f"{reserved[0]} is the name of another folder", "sources", "Give the source another name.")
    if replay_ratio is not None:
        if weights is not None or len(sources) != 2:
            raise _mixture("it is for two sources without weights", "replay_ratio", "Set weights.")
        if not 0 <= replay_ratio < 1:
            raise _mixture(f"{replay_ratio} is out of range", "replay_ratio", "Set 0 or more, and less than 1.")
        first, second = sources
        weights = {first: 1 - replay_ratio, second: replay_ratio}
    if alpha < 0 or (alpha != 1 and weights is not None):
        raise _mixture(f"{alpha:g} is not valid here", "alpha", "Set 0 or more, and no weights.")
    segments = None
    if weights is not None:
        segments = [(0, weights)] if isinstance(weights, Mapping) else [(step, shares) for step, shares in weights]
        steps = [step for step, _ in segments]
        if not steps or steps[0] != 0 or steps != sorted(set(steps)):
            raise _mixture(f"the steps {steps} do not rise from 0", "weights", "Begin with [0, {...}].")
        for _, shares in segments:
            _check_names("weights", shares, sources)
            if min(shares.values()) < 0 or not 0 < sum(shares.values()) < float("inf"):
                raise _mixture(f"{shares} are not weights", "weights", "Give numbers from 0, one of them above 0.")
    if max_epochs is not None:
        _check_names("max_epochs", max_epochs, sources)
        if min(max_epochs.values()) <= 0:
            raise _mixture(f"{max_epochs} are not all above 0", "max_epochs")
    _check_names("added", added or (), sources)
    return Mixture(dict(sources), segments, alpha, dict(max_epochs or {}), tuple(added or ()))


def _check_names(key: str, names: Any, sources: Mapping[str, Source]) -> None:
    for name in names:
        if name not in sources:
            raise _mixture(f"there is no source '{name}'", key, did_you_mean(name, sources, "The sources are"))


def _mixture(problem: str, key: str, hint: str | None = None) -> UserError:
    return UserError(problem, key=key, hint=hint, code="mixture")
