"""`files`: text files, JSON lines and tables on disk as a source of documents.

1. `resolve_paths` turns the paths of a config into a list of files and reports what it skips.
2. `line_reader` gives the lines of a file in constant memory; `plain_text`, `json_records` and `tables` give its
   documents and bad records.
3. With `on_bad_record="stop"` the first bad record raises; with `"skip"` the source's report counts it.

Another source is any class with the attributes of `Source`.
"""

import copy
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

from torchrecipes.data.sources.json_records import ARRAY, read_json_array, read_json_lines
from torchrecipes.data.sources.line_reader import (
    BLOCK,
    LONGEST_RECORD,
    Block,
    UnreadableFile,
    open_blocks,
    read_lines,
)
from torchrecipes.data.sources.plain_text import read_separated, read_text
from torchrecipes.data.sources.record_columns import RecordColumns
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
from torchrecipes.data.sources.text_column import TextColumn, text_column
from torchrecipes.errors import UserError

READING = 2  # raise it when the same files give other documents than before: it enters the fingerprint


@dataclass
class files:
    """Documents of files: plain text, .jsonl/.ndjson/.json (an object per line, or one array), .csv, .tsv, .parquet.

    All but Parquet may be compressed (.gz, .xz, .zst). Text is UTF-8. Line ends are `\\n`, `\\r\\n` and `\\r`, nothing
    else, in all of them, and `\\n` in the documents.

    Args:
        path: a file, a folder (with sub-folders, in the order of the names; hidden and unknown files are skipped), a
            pattern with `*`, `**`, `?` or `[]`, or a list of those.
        text_column: key of JSON objects or column of tables that holds the text; `data.text` is a key in an object.
        sample_by: what a document of plain text is: "document" (a file), "paragraph" (blank lines between) or "line",
            as in the text loader of `datasets`. Blank lines are no documents.
        separator: what stands between the documents of a plain text file, such as `<|endoftext|>`, in a line or as one;
            line ends around it are left out. With a line end at its start or end, it counts as a whole line only.
        columns: names of the columns of CSV and TSV files that have no header line. None: the first line names them.
        delimiter: the character between the fields of .csv files.
        messages_column: key or column of chat messages, a list of objects with `role` and `content`, which
            `chat_template` makes a text of; in place of `text_column`. What a template writes are the names of special
            tokens: the tokenizer's `special_tokens: honor` makes them tokens.
        chat_template: folder of a tokenizer that has one, or a Jinja file.
        on_bad_record: "stop" raises at a record without a text (not JSON, not UTF-8, no such key, null, a row with
            missing fields, a corrupt file); "skip" counts and reports it. Empty texts are always counted and skipped.
        max_document_chars: a longer text becomes several documents, cut at white space where there is any.
        max_documents: documents to read at most, from the first; None: all.
        split: what is read of a folder that is a dataset repository (training and test files, or a card that names
            them): one of its splits. The report lists what is left out. Other folders are read whole.
        subset: the configuration in the card, where there are several, or a sub-folder.

    Raises:
        UserError: a path that matches nothing, an invalid value; and, when the source is read, what `on_bad_record`
            says.
    """

    path: str | list[str]
    text_column: str = "text"
    sample_by: str = "document"
    separator: str | None = None
    columns: list[str] | None = None
    delimiter: str = ","
    messages_column: str | None = None
    chat_template: str | None = None
    on_bad_record: str = "stop"
    max_document_chars: int = 1_000_000
    max_documents: int | None = None
    split: str = "train"
    subset: str | None = None
    report: ReadStats = field(default_factory=ReadStats, init=False, repr=False, compare=False)
    _cursor: Cursor = field(default_factory=Cursor, init=False, repr=False, compare=False)
    _column: TextColumn | RecordColumns = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        sample_by = (self.sample_by, ("document", "paragraph", "line"))
        check_options(self.on_bad_record, self.max_document_chars, self.max_documents, sample_by=sample_by)
        self._check_separators()
        limit = self.max_document_chars
        self._column = text_column(self.text_column, self.messages_column, self.chat_template, limit)
        self.columns = None if self.columns is None else list(self.columns)
        if self.columns is not None and self._column.name not in self.columns:
            problem = f"{self.columns} have no '{self._column.name}'"
            hint = f"Name the column of the text '{self._column.name}' in columns, or set text_column to one of them."
            raise UserError(problem, key="columns", hint=hint, code="invalid_value")
        paths = [self.path] if isinstance(self.path, str) else list(self.path)
        self.found, self.skipped, self._splits = find_files(paths, self.split, self.subset)

    def splits(self) -> list[str]:
        """Return the names of all splits of a dataset repository; none for other files."""
        return self._splits

    def records(self, columns: RecordColumns, plain_text: bool = False) -> "files":
        """Return these files as a source of records with several fields.

        Args:
            columns: the fields.
            plain_text: whether plain text, which has no fields, is read as documents. False: it is skipped.

        Raises:
            UserError: all files are plain text (code `no_columns`), or `columns` has not all names (`invalid_value`).
        """
        source = copy.copy(self)
        source.__dict__.pop("_content", None)  # the cached fingerprint
        source._column, source.report = columns, ReadStats()
        if self.columns is not None and (missing := [name for name in columns.names if name not in self.columns]):
            problem, hint = f"{self.columns} have no '{missing[0]}'", f"{columns.remedy.capitalize()}."
            raise UserError(problem, key="columns", hint=hint, code="invalid_value")
        if not plain_text:
            source.found = [file for file in self.found if file.format != "text"]
            plain = [BadRecord(file.name, "plain text has no columns") for file in self.found if file.format == "text"]
            source.skipped = [*self.skipped, *plain]
        if not source.found:
            hint = "Give .jsonl, .csv, .tsv or .parquet, and name its columns."
            raise UserError(f"{self.name}: plain text has no columns", key="path", hint=hint, code="no_columns")
        return source

    def _check_separators(self) -> None:
        self.delimiter = "\t" if self.delimiter == "\\t" else self.delimiter  # as a shell passes it
        if len(self.delimiter) != 1 or self.delimiter in '"\n\r':
            hint = "Set one character, such as ';'."
            raise UserError(f"{self.delimiter!r} is no delimiter", key="delimiter", hint=hint, code="invalid_value")
        if self.separator is None:
            return
        if not self.separator.strip("\n") or "\n" in self.separator.strip("\n") or len(self.separator) > 100:
            problem = f"{self.separator!r} is no separator"
            hint = "Set up to 100 characters of one line. For blank lines between documents, set sample_by: paragraph."
            raise UserError(problem, key="separator", hint=hint, code="invalid_value")
        if self.sample_by != "document":
            problem = f"separator and sample_by: {self.sample_by} both say where documents end"
            raise UserError(problem, key="separator", hint="Leave one of them out.", code="invalid_value")

    @property
    def name(self) -> str:
        """The first files, and how many there are."""
        first = ", ".join(file.path for file in self.found[:3])
        return first if len(self.found) <= 3 else f"{first} and {len(self.found) - 3} more files"

    @property
    def num_bytes(self) -> int:
        """Size of all files in bytes as stored; 0 where some documents are left out."""
        return sum(file.size for file in self.found) if self.max_documents is None else 0

    @property
    def fingerprint(self) -> str:
        """A hash of the arguments that change documents and, for every file, its size and samples of its content.

        Folders may be moved, and files renamed as long as their order stays.
        """
        return self._content

    @cached_property
    def _content(self) -> str:
        options = [READING, self._column.name, self.sample_by, self.columns, self.max_document_chars]
        template = self._column.template
        added = [self.separator, self.delimiter, self.max_documents, template and template.fingerprint]
        if added != [None, ",", None, None]:  # so that corpora of earlier versions stay valid
            options += added
        try:
            described = [(file.format, file.compression, content_checksum(file.path)) for file in self.found]
        except OSError as error:
            raise unreadable(error.filename, error) from error
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
        stop = self.on_bad_record == "stop"
        remedy = self._column.remedy
        return documents(self._records(), self.report, stop, self._cursor, self.max_documents, remedy)

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
            check_unchanged(file)
            if file.format == "parquet":
                yield from read_parquet(file.path, file.name, self._column, self._cursor)
            else:
                with open_blocks(file.path, file.compression, self._cursor.place.get("byte", 0)) as blocks:
                    yield from self._read_lines(file, blocks)
        except UnreadableFile as error:
            yield BadRecord(file.name, error.reason, error.detail)
        except OSError as error:
            raise unreadable(file.name, error) from error

    def _read_lines(self, file: FoundFile, blocks: Iterator[Block]) -> Iterator[Document | BadRecord]:
        name, limit, cursor = file.name, self.max_document_chars, self._cursor
        first = cursor.place.get("line", 1)
        if file.format == "text":
            longest = max(4 * limit, BLOCK)
            if self.separator is None:
                return read_text(read_lines(blocks, longest, first), name, limit, self.sample_by, cursor)
            lines = read_lines(blocks, longest, first, self.separator.encode())
            return read_separated(lines, name, limit, self.separator, cursor)
        if file.format == "jsonl":
            head = next(blocks, None)
            blocks = blocks if head is None else chain([head], blocks)
            if "chars" in cursor.place or (head and not cursor.place.get("byte") and ARRAY.match(head.data)):
                return read_json_array(read_lines(blocks, BLOCK, first), name, self._column, cursor)
            return read_json_lines(read_lines(blocks, LONGEST_RECORD, first), name, self._column, cursor)
        delimiter = "\t" if file.format == "tsv" else self.delimiter
        return read_csv(read_lines(blocks, LONGEST_RECORD, first), name, self._column, delimiter, self.columns, cursor)


def check_unchanged(file: FoundFile) -> None:
    """Check that a file is as it was when it was found.

    Raises:
        UserError: it has changed (code `file_changed`).
        OSError: it is gone.
    """
    status = os.stat(file.path)
    if (status.st_size, status.st_mtime_ns) != (file.size, file.modified_ns):
        hint = "Start again when it is complete."
        raise UserError(f"{file.name} has changed since this run started", hint=hint, code="file_changed")


def unreadable(name: str, error: OSError) -> UserError:
    """Return the error for a file that the system cannot read."""
    return UserError(f"{name} cannot be read: {error.strerror or error}", code="unreadable_file")
