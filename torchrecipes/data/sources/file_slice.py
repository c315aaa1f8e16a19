"""A source that is a stretch of one plain text file, as one document with its line ends as they are.

A character-level model is trained on nine tenths of a text and looked at on the last: two sources of one file.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torchrecipes.data.sources.records import Document, ReadStats, documents
from torchrecipes.errors import UserError


def text_span(path: str, start: float = 0.0, stop: float = 1.0) -> "TextSpan":
    """Return the text of a file from the share `start` to the share `stop` of its characters, as one document.

    Args:
        path: a plain text file, UTF-8. Line ends become `\\n`. It is read into memory.
        start, stop: shares of the characters; 0 and 1 are the whole file. What one span ends before, another begins at.

    Raises:
        UserError: no such file, or shares that are none; and, when the source is read, a file that is not UTF-8, or a
            span that is blank.
    """
    if not 0 <= start < stop <= 1:
        # Not the config's key: a source cannot know whether it is data.source or data.validation_source.
        raise UserError(f"text_span: start={start} and stop={stop}; they are shares of a file, 0 <= start < stop <= 1")
    if not Path(path).is_file():
        kind = "a folder; text_span reads one file, files reads folders" if Path(path).is_dir() else "no such file"
        raise UserError(f"text_span: {path}: {kind}")
    status = os.stat(path)
    return TextSpan(str(path), start, stop, status.st_size, status.st_mtime_ns)


@dataclass
class TextSpan:
    """A source: made by `text_span`."""

    path: str
    start: float
    stop: float
    size: int
    modified_ns: int
    report: ReadStats = field(default_factory=ReadStats, repr=False, compare=False)

    @property
    def name(self) -> str:
        """The file, and which part of it."""
        return f"{self.path} from {self.start:.0%} to {self.stop:.0%}"

    @property
    def num_bytes(self) -> int:
        """Size of the part in bytes, about."""
        return round(self.size * (self.stop - self.start))

    @property
    def fingerprint(self) -> str:
        """Of the file's name, size and time of change, and of the shares; the folder may be moved."""
        described = [Path(self.path).name, self.size, self.modified_ns, self.start, self.stop]
        return hashlib.sha256(json.dumps(described).encode("utf-8", "surrogateescape")).hexdigest()[:32]

    def parts(self) -> list["TextSpan"]:
        """Return this part."""
        return [self]

    def __iter__(self) -> Iterator[Document]:
        """Yield the document, and begin a new report.

        Raises:
            UserError: as in `text_span`.
        """
        self.report = ReadStats()
        return documents(self._read(), self.report)

    def _read(self) -> Iterator[Document]:
        try:
            text = Path(self.path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.path} is not UTF-8 at byte {error.start:,} ({error.reason}). Save it as UTF-8."
            ) from None
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror or error}") from error
        span = text[int(self.start * len(text)) : int(self.stop * len(text))]
        if not span.strip():
            raise UserError(f"{self.name}: {len(span):,} characters, nothing but white space. Give more text.")
        yield Document(span.removeprefix("\ufeff"), self.path)
