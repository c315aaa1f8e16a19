"""`text_span`: a slice of one plain text file as one document, for character-level models.

Such a model is trained on nine tenths of a text and evaluated on the rest: two sources over one file.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchrecipes.data.sources.line_reader import UnreadableFile, open_blocks
from torchrecipes.data.sources.records import Cursor, Document, ReadStats, content_checksum, documents
from torchrecipes.errors import UserError


@dataclass
class text_span:
    """The text of a file from the fraction `start` to the fraction `stop` of its characters, as one document.

    Args:
        path: a plain text file, UTF-8. Line ends become `\\n`. It is read into memory.
        start: fraction of the characters before the slice.
        stop: fraction of the characters where the slice ends; a slice that starts there continues it.

    Raises:
        UserError: no such file, or invalid fractions; and, when the source is read, a file that is not UTF-8 text, or a
            slice without text.
    """

    path: str
    start: float = 0.0
    stop: float = 1.0
    report: ReadStats = field(default_factory=ReadStats, init=False, repr=False, compare=False)
    _cursor: Cursor = field(default_factory=Cursor, init=False, repr=False, compare=False)

    def __post_init__(self):
        if not 0 <= self.start < self.stop <= 1:
            problem, hint = f"start is {self.start} and stop is {self.stop}", "Set fractions, 0 <= start < stop <= 1."
            raise UserError(problem, key="start", hint=hint, code="invalid_value")
        path = Path(self.path)
        if not path.is_file():
            hint = "text_span reads one file; torchrecipes.data.sources.files reads folders."
            problem = f"{path} is a folder" if path.is_dir() else f"there is no file {path}"
            raise UserError(problem, key="path", hint=hint, code="no_such_file")

    @property
    def name(self) -> str:
        """The file and the slice."""
        return f"{self.path} from {self.start:.0%} to {self.stop:.0%}"

    @property
    def num_bytes(self) -> int:
        """Approximate size of the slice in bytes."""
        return round(Path(self.path).stat().st_size * (self.stop - self.start))

    @property
    def fingerprint(self) -> str:
        """A hash of the file's content and of the slice, wherever the file is."""
        described = [content_checksum(self.path), self.start, self.stop]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]

    def __iter__(self) -> Iterator[Document]:
        return self.read()

    def read(self, position: dict[str, Any] | None = None) -> Iterator[Document]:
        """Yield the document, with a new report; nothing where `position` is after it.

        Raises:
            UserError: as in `text_span`.
        """
        self.report, self._cursor = ReadStats(), Cursor(position)
        return documents(self._read(), self.report, cursor=self._cursor)

    def position(self) -> dict[str, Any]:
        """Return the position after the last document that was read: before or after the only one."""
        return self._cursor.position

    def _read(self) -> Iterator[Document]:
        try:
            with open_blocks(self.path) as blocks:
                text = b"".join(block.data for block in blocks).decode()
        except UnreadableFile as error:
            raise UserError(f"{self.path}: {error.reason}: {error.detail}", code="not_text") from None
        except UnicodeDecodeError as error:
            problem = f"{self.path} is not UTF-8 at byte {error.start:,} ({error.reason})"
            raise UserError(problem, hint="Save it as UTF-8.", code="not_text") from None
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror or error}", code="unreadable_file") from error
        span = text[int(self.start * len(text)) : int(self.stop * len(text))]
        if not span.strip():
            problem = f"{self.name} holds {len(span):,} characters, nothing but white space"
            raise UserError(problem, hint="Give more text.", code="no_documents")
        yield Document(span, self.path)
