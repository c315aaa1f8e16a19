"""Distinct texts on disk, and which of them are the same document."""

from array import array
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import xxhash


class TextStore:
    """Distinct texts in a file, by number; what is in memory is a hash of every text and where it starts.

    Texts are one document where they have an identity in common, or differ in case and white space only. About 350
    bytes of memory per text.

    Args:
        path: of the file, which is written anew.
    """

    def __init__(self, path: Path):
        self.path = path
        self.file = path.open("w+b")
        self.starts = array("Q", [0])
        self.parents = array("Q")
        self.numbers: dict[int, int] = {}
        self.hash = xxhash.xxh3_128()
        self.keys: dict[int, int] = {}  # of an identity, or of a text without case and white space, the first text

    def __len__(self) -> int:
        return len(self.parents)

    def add(self, text: str, identity: str | None = None) -> int:
        """Return the number of a text, which is new if the text is.

        Args:
            text: the text.
            identity: of the document; texts of one identity are one document.
        """
        data = text.encode("utf-8", "surrogatepass")
        number = self.numbers.setdefault(xxhash.xxh3_64_intdigest(data), len(self))
        if number == len(self):
            self.file.write(data)
            self.hash.update(data)
            self.starts.append(self.starts[-1] + len(data))
            self.parents.append(number)
            self._join(number, self.keys.setdefault(document_key(text), number))
        if identity is not None:
            key = xxhash.xxh3_64_intdigest(b"\0" + str(identity).encode("utf-8", "surrogatepass"))
            self._join(number, self.keys.setdefault(key, number))
        return number

    @property
    def checksum(self) -> str:
        """Of all texts, in their order."""
        return f"{len(self)}-{self.starts[-1]}-{self.hash.hexdigest()}"

    def find(self, text: str) -> int:
        """Return the number of a text that has the same words as `text`, or -1."""
        return self.keys.get(document_key(text), -1)

    def num_bytes(self, part: slice | None = None) -> int:
        """Return the bytes of all texts, or of some consecutive ones."""
        part = part or slice(0, len(self))
        return self.starts[part.stop] - self.starts[part.start]

    def read(self, numbers: Iterable[int]) -> list[str]:
        """Return texts by their numbers."""
        texts = []
        self.file.flush()
        for number in numbers:
            self.file.seek(self.starts[number])
            texts.append(self.file.read(self.starts[number + 1] - self.starts[number]).decode("utf-8", "surrogatepass"))
        self.file.seek(0, 2)
        return texts

    def documents(self) -> np.ndarray:
        """Return the document of every text: the number of its first text, `[texts]` int64."""
        return np.fromiter((self._root(number) for number in range(len(self))), np.int64, len(self))

    def close(self) -> None:
        """Close the file, and delete it."""
        self.file.close()
        self.path.unlink(missing_ok=True)

    def _join(self, one: int, other: int) -> None:
        first, second = sorted((self._root(one), self._root(other)))
        self.parents[second] = first

    def _root(self, number: int) -> int:
        while self.parents[number] != number:
            self.parents[number] = number = self.parents[self.parents[number]]
        return number


def document_key(text: str) -> int:
    """A hash of the words of a text: equal for texts that differ in case and white space only."""
    return xxhash.xxh3_64_intdigest(" ".join(text.casefold().split()).encode("utf-8", "surrogatepass"))
