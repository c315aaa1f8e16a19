"""`files`: text files, JSON lines and tables on disk as a source of documents.

1. `resolve_paths` turns the paths of a config into a list of files and reports what it skips.
2. `line_reader` gives the lines of a file in constant memory; `text_and_jsonl` and `tables` give its documents and bad
   records.
3. With `on_bad_record="stop"` the first bad record raises; with `"skip"` the source's report counts it.

Another source is any class with the attributes of `Source`.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torchrecipes.data.sources.line_reader import BLOCK, Block, UnreadableFile, open_blocks, read_lines
from torchrecipes.data.sources.records import (
    BadRecord,
    Cursor,
    Document,
    ReadStats,
    check_options,
    content_checksum,
    documents,
)
from torchrecipes.data.sources.resolve_paths import FoundFile, find_files
from torchrecipes.data.sources.tables import read_csv, read_parquet
from torchrecipes.data.sources.text_and_jsonl import LONGEST_RECORD, read_json_lines, read_text
from torchrecipes.errors import UserError

READING = 2  # raise it when the same files give other documents than before: it enters the fingerprint


@dataclass
class files:
    """Documents of files: plain text, .jsonl/.ndjson/.json (an object per line), .csv, .tsv, .parquet.

    All but Parquet may be compressed (.gz, .xz, .zst). Text is UTF-8. Line ends are `\\n`, `\\r\\n` and `\\r`, nothing
    else, in all of them, and `\\n` in the documents.

    Args:
        path: a file, a folder (with sub-folders, in the order of the names; hidden and unknown files are skipped), a
            pattern with `*`, `**`, `?` or `[]`, or a list of those.
        text_column: key of JSON lines or column of tables that holds the text.
        sample_by: what a document of plain text is: "document" (a file), "paragraph" (blank lines between) or "line",
            as in the text loader of `datasets`. Blank lines are no documents.
        columns: names of the columns of CSV and TSV files that have no header line. None: the first line names them.
        on_bad_record: "stop" raises at a record without a text (not JSON, not UTF-8, no such key, null, a row with
            missing fields, a corrupt file); "skip" counts and reports it. Empty texts are always counted and skipped.
        max_document_chars: a longer text becomes several documents, cut at white space where there is any.

    Raises:
        UserError: a path that matches nothing, an invalid value; and, when the source is read, what `on_bad_record`
            says.
    """

    path: str | list[str]
    text_column: str = "text"
    sample_by: str = "document"
    columns: list[str] | None = None
    on_bad_record: str = "stop"
    max_document_chars: int = 1_000_000
    report: ReadStats = field(default_factory=ReadStats, init=False, repr=False, compare=False)
    _cursor: Cursor = field(default_factory=Cursor, init=False, repr=False, compare=False)

    def __post_init__(self):
        sample_by = (self.sample_by, ("document", "paragraph", "line"))
        check_options(self.on_bad_record, self.max_document_chars, sample_by=sample_by)
        self.columns = None if self.columns is None else list(self.columns)
        if self.columns is not None and self.text_column not in self.columns:
            problem = f"{self.columns} have no '{self.text_column}'"
            hint = f"Name the column of the text '{self.text_column}' in columns, or set text_column to one of them."
            raise UserError(problem, key="columns", hint=hint, code="invalid_value")
        self.found, self.skipped = find_files([self.path] if isinstance(self.path, str) else list(self.path))

    @property
    def name(self) -> str:
        """The first files, and how many there are."""
        first = ", ".join(file.path for file in self.found[:3])
        return first if len(self.found) <= 3 else f"{first} and {len(self.found) - 3} more files"

    @property
    def num_bytes(self) -> int:
        """Size of all files in bytes as stored."""
        return sum(file.size for file in self.found)

    @property
    def fingerprint(self) -> str:
        """A hash of the arguments that change documents and, for every file, its size and samples of its content.

        Folders may be moved, and files renamed as long as their order stays.
        """
        return self._content

    @cached_property
    def _content(self) -> str:
        options = [READING, self.text_column, self.sample_by, self.columns, self.max_document_chars]
        try:
            described = [(file.format, file.compression, content_checksum(file.path)) for file in self.found]
        except OSError as error:
            raise _unreadable(error.filename, error) from error
        return hashlib.sha256(json.dumps([options, described]).encode("utf-8", "surrogateescape")).hexdigest()[:32]

    def __iter__(self) -> Iterator[Document]:
        return self.read()

    def read(self, position: dict[str, Any] | None = None) -> Iterator[Document]:
        """Yield the documents, file after file, with a new report.

        Args:
            position: what `position` returned, for a source with the same fingerprint; None: from the first document.
                Files before it are not opened, and what it passes over in a file that is not compressed is not read.

        Raises:
            UserError: a bad record and `on_bad_record` is "stop"; a file that cannot be read or has changed.
        """
        self.report, self._cursor = ReadStats(), Cursor(position)
        if position is None:
            for record in self.skipped:
                self.report.add(record)
        return documents(self._records(), self.report, self.on_bad_record == "stop", self._cursor)

    def position(self) -> dict[str, Any]:
        """Return the position after the last document that was read: its file and a byte, line or row group there."""
        return self._cursor.position

    def _records(self) -> Iterator[Document | BadRecord]:
        first = self._cursor.place.pop("file", 0)
        for number, file in enumerate(self.found[first:], first):
            self._cursor.inside = {"file": number}
            if number > first:
                self._cursor.at()
            yield from self._read(file)

    def _read(self, file: FoundFile) -> Iterator[Document | BadRecord]:
        try:
            status = os.stat(file.path)
            if (status.st_size, status.st_mtime_ns) != (file.size, file.modified_ns):
                hint = "Start again when it is complete."
                raise UserError(f"{file.name} has changed since this run started", hint=hint, code="file_changed")
            if file.format == "parquet":
                limit = self.max_document_chars
                yield from read_parquet(file.path, file.name, self.text_column, limit, self._cursor)
            else:
                with open_blocks(file.path, file.compression, self._cursor.place.get("byte", 0)) as blocks:
                    yield from self._read_lines(file, blocks)
        except UnreadableFile as error:
            yield BadRecord(file.name, error.reason, error.detail)
        except OSError as error:
            raise _unreadable(file.name, error) from error

    def _read_lines(self, file: FoundFile, blocks: Iterator[Block]) -> Iterator[Document | BadRecord]:
        name, limit, cursor = file.name, self.max_document_chars, self._cursor
        longest = max(4 * limit, BLOCK) if file.format == "text" else LONGEST_RECORD
        lines = read_lines(blocks, longest, cursor.place.get("line", 1))
        if file.format == "text":
            return read_text(lines, name, limit, self.sample_by, cursor)
        if file.format == "jsonl":
            return read_json_lines(lines, name, self.text_column, limit, cursor)
        return read_csv(lines, name, self.text_column, limit, file.format == "tsv", self.columns, cursor)


def _unreadable(name: str, error: OSError) -> UserError:
    return UserError(f"{name} cannot be read: {error.strerror or error}", code="unreadable_file")
