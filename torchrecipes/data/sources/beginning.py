"""The beginning of a source: what a tokenizer is trained on when the rest is streamed."""

from collections.abc import Iterator
from dataclasses import replace

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


def beginning_of(source: Source, characters: int) -> Source:
    """The beginning of a source, or of every part of a mixture."""
    if isinstance(source, Mixture):
        return replace(source, sources={name: Beginning(part, characters) for name, part in source.sources.items()})
    return Beginning(source, characters)
