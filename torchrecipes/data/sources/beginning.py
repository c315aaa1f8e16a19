"""The beginning of a source: what a tokenizer is trained on when the rest is streamed."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torchrecipes.data.sources.mixed_sources import Mixture
from torchrecipes.data.sources.records import Document, ReadStats, Source


class Beginning:
    """The first documents of a source, until they have so many characters; the attributes are those of `Source`."""

    def __init__(self, source: Source, characters: int):
        self.source, self.characters = source, characters
        self.name, self.num_bytes = source.name, min(source.num_bytes, characters)
        self.fingerprint = f"{source.fingerprint}-{characters}"
        self.report = ReadStats()

    def __iter__(self) -> Iterator[Document]:
        read = 0
        documents = iter(self.source)
        self.report = self.source.report
        for document in documents:
            yield document
            read += len(document.text)
            if read >= self.characters:
                return


class BeginningOfNames:
    """As `Beginning`, of a source that gives domain names in bulk, too: `blocks` and `parse`."""

    def __init__(self, source: Any, characters: int):
        self.source, self.characters, self.suffixes, self.parse = source, characters, source.suffixes, source.parse
        documents = self._documents = Beginning(source, characters)
        self.name, self.num_bytes, self.fingerprint = documents.name, documents.num_bytes, documents.fingerprint

    @property
    def report(self) -> ReadStats:
        """Counts of the latest iteration so far."""
        return self.source.report

    def __iter__(self) -> Iterator[Document]:
        return iter(self._documents)

    def blocks(self) -> Iterator[Any]:
        """The first blocks, until they have so many characters."""
        read = 0
        for block in self.source.blocks():
            yield block
            read += len(block.data)
            if read >= self.characters:
                return


def beginning_of(source: Source, characters: int) -> Source:
    """The beginning of a source, or of every part of a mixture."""
    if isinstance(source, Mixture):
        return replace(source, sources={name: beginning_of(part, characters) for name, part in source.sources.items()})
    return BeginningOfNames(source, characters) if hasattr(source, "blocks") else Beginning(source, characters)
