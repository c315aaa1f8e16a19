"""Sources of text: `files`, for all kinds of text files on disk.

1. `file_search` turns the paths of a config into a list of files, and says what it leaves out.
2. A part is one file, or a slice of a large one; parts can be pickled, so several processes can read one source.
3. `lines` gives a part's lines in flat memory; `readers` (text, JSON lines) and `tables` (CSV, TSV, Parquet) give its
   documents and bad records.
4. With `on_bad_record="stop"` the first bad record raises; with `"skip"` the source's report counts it.

Another source is any class with the attributes of `Source`; `python_docs` is one.
"""

import difflib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from torchrecipes.data.sources.line_reader import BLOCK, UnreadableFile, open_blocks, read_lines, slice_at
from torchrecipes.data.sources.records import BadRecord, Document, ReadStats, Source, documents, require_documents
from torchrecipes.data.sources.resolve_paths import FoundFile, find_files
from torchrecipes.data.sources.tables import parquet_groups, read_csv, read_parquet
from torchrecipes.data.sources.text_and_jsonl import LONGEST_RECORD, read_json_lines, read_text_blocks, read_text_lines
from torchrecipes.errors import UserError

__all__ = ["BadRecord", "Document", "FileSource", "ReadStats", "Source", "documents", "files", "require_documents"]

READING = 1  # raise it when the same files give other documents than before: it enters the fingerprint
SLICE = 32 << 20  # bytes of a file that one part reads
SAMPLE_BY = ("line", "paragraph", "document")
ON_BAD_RECORD = ("stop", "skip")


def files(
    path: str | list[str],
    text_column: str = "text",
    sample_by: str = "line",
    on_bad_record: str = "stop",
    max_document_chars: int = 1_000_000,
) -> "FileSource":
    """Return the documents of files: plain text, .jsonl/.ndjson/.json (an object per line), .csv, .tsv, .parquet.

    All but Parquet may be compressed with gzip (.gz). Text is UTF-8. Line ends are `\\n`, `\\r\\n` and `\\r`, nothing
    else, in all of them, and `\\n` in the documents.

    Args:
        path: a file, a folder (with sub-folders, in the order of the names; hidden and unknown files are left out), a
            pattern with `*`, `**`, `?` or `[]`, or a list of those.
        text_column: key of JSON lines, column of tables that holds the text.
        sample_by: what a document of plain text is: "line", "paragraph" (blank lines are between) or "document" (a
            file), as in the text loader of `datasets`. Blank lines are no documents.
        on_bad_record: "stop" raises at a record without a text (not JSON, not UTF-8, no such key, null, a row with
            missing fields, a damaged file); "skip" counts and reports it. Empty texts are always counted and skipped.
        max_document_chars: a longer text becomes several documents, cut at white space where there is any.

    Raises:
        UserError: a path that matches nothing, a value that is none of these; and, when the source is read, what
            `on_bad_record` says.
    """
    for key, value, valid in (("sample_by", sample_by, SAMPLE_BY), ("on_bad_record", on_bad_record, ON_BAD_RECORD)):
        if value not in valid:
            near = difflib.get_close_matches(str(value), valid, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it is one of {', '.join(valid)}"
            raise UserError(f"data.source.{key} is '{value}'; {hint}")
    if max_document_chars < 100:
        raise UserError(f"data.source.max_document_chars is {max_document_chars}; the least is 100")
    found, skipped = find_files([path] if isinstance(path, str) else list(path))
    options = Options(text_column, sample_by, on_bad_record, max_document_chars)
    return FileSource([FilePart(file, options) for file in found], skipped, options)


@dataclass(frozen=True)
class Options:
    """How files are read: the arguments of `files`."""

    text_column: str
    sample_by: str
    on_bad_record: str
    max_document_chars: int


@dataclass
class FilePart:
    """A source: a file, or a slice of it.

    `start` and `stop` are bytes of an uncompressed text file, or row groups of a Parquet file (None: to its end);
    `first_line` is the number of the first line of the slice.
    """

    file: FoundFile
    options: Options
    start: int = 0
    stop: int | None = None
    first_line: int = 1
    report: ReadStats = field(default_factory=ReadStats, repr=False, compare=False)

    @property
    def name(self) -> str:
        """The file, as the config has it."""
        return self.file.name

    @property
    def num_bytes(self) -> int:
        """Size of the input in bytes as stored."""
        if self.stop is None or self.file.format == "parquet":
            return self.file.size
        return self.stop - self.start

    @property
    def fingerprint(self) -> str:
        """Of the options, and of the file's relative name, size and time of change."""
        return _fingerprint(self.options, [self.file], [self.start, self.stop])

    def parts(self) -> list[Source]:
        """Return this part."""
        return [self]

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents, and begin a new report.

        Raises:
            UserError: a bad record and `on_bad_record` is "stop"; a file that cannot be read, or has changed by now.
        """
        self.report = ReadStats()
        return documents(self._read(), self.report, stop=self.options.on_bad_record == "stop")

    def _read(self) -> Iterator[Document | BadRecord]:
        file, options = self.file, self.options
        try:
            status = os.stat(file.path)
            if (status.st_size, status.st_mtime_ns) != (file.size, file.modified_ns):
                raise UserError(f"{file.name} has changed since this run looked at it: start again when it is complete")
            if file.format == "parquet":
                limit = options.max_document_chars
                yield from read_parquet(file.path, file.name, options.text_column, limit, self.start, self.stop)
            else:
                with open_blocks(file.path, file.gzipped, self.start, self.stop) as blocks:
                    yield from self._read_lines(blocks)
        except UnreadableFile as error:
            yield BadRecord(file.name, error.reason, error.detail)
        except OSError as error:
            raise UserError(f"{file.name} cannot be read: {error.strerror or error}") from error

    def _read_lines(self, blocks: Iterator[bytes]) -> Iterator[Document | BadRecord]:
        name, options, limit = self.file.name, self.options, self.options.max_document_chars
        if self.file.format == "text":
            lines = read_lines(blocks, max(4 * limit, BLOCK), self.first_line)
            if options.sample_by == "line":
                return read_text_lines(lines, name, limit)
            return read_text_blocks(lines, name, limit, whole=options.sample_by == "document")
        lines = read_lines(blocks, LONGEST_RECORD, self.first_line)
        if self.file.format == "jsonl":
            return read_json_lines(lines, name, options.text_column, limit, from_start=self.start == 0)
        return read_csv(lines, name, options.text_column, limit, tabs=self.file.format == "tsv")

    def sliced(self) -> "list[FilePart]":
        """Return parts of about `SLICE` bytes that give together what this one gives; [self] where there is no way."""
        file, options = self.file, self.options
        if file.size < 2 * SLICE or file.gzipped or self.stop is not None:
            return [self]
        begin = next(self._read(), None)
        if isinstance(begin, BadRecord) and begin.source == file.name:  # one answer for the whole file, so one part
            return [self]
        if file.format == "parquet":
            groups = parquet_groups(file.path, options.text_column, SLICE)
            return [FilePart(file, options, start, stop) for start, stop in groups] or [self]
        if file.format == "jsonl" or (file.format == "text" and options.sample_by != "document"):
            separator = rb"\n\r?\n" if file.format == "text" and options.sample_by == "paragraph" else rb"\n"
            return [FilePart(file, options, *slice_) for slice_ in slice_at(file.path, file.size, SLICE, separator)]
        return [self]


@dataclass
class LeftOut:
    """A source without documents, whose report holds what was seen in a folder and is not read."""

    records: list[BadRecord]
    name: str = "files that are left out"
    num_bytes: int = 0
    fingerprint: str = ""
    report: ReadStats = field(default_factory=ReadStats)

    def __iter__(self) -> Iterator[Document]:
        """Yield nothing, and begin a new report."""
        self.report = ReadStats()
        return documents(self.records, self.report)

    def parts(self) -> list[Source]:
        """Return this part."""
        return [self]


@dataclass
class FileSource:
    """A source: files, one after the other. `skipped` were seen and are not read; the report has them, too."""

    file_parts: list[FilePart] = field(repr=False)
    skipped: list[BadRecord] = field(repr=False)
    options: Options
    report: ReadStats = field(default_factory=ReadStats, repr=False, compare=False)

    @property
    def name(self) -> str:
        """The first files, and how many there are."""
        first = ", ".join(part.file.path for part in self.file_parts[:3])
        return first if len(self.file_parts) <= 3 else f"{first} and {len(self.file_parts) - 3} more files"

    @property
    def num_bytes(self) -> int:
        """Size of all files in bytes as stored."""
        return sum(part.num_bytes for part in self.file_parts)

    @property
    def fingerprint(self) -> str:
        """Of the options, and of every file's relative name, size and time of change; folders may be moved."""
        return _fingerprint(self.options, [part.file for part in self.file_parts], [])

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents, file after file, and begin a new report.

        Raises:
            UserError: as in `files`.
        """
        report = self.report = ReadStats()
        for part in [LeftOut(self.skipped), *self.file_parts]:
            try:
                yield from part
            finally:
                report.merge(part.report)

    def parts(self) -> list[Source]:
        """Return a source per file, several for a large one; large text files are read once to number their lines."""
        skipped: list[Source] = [LeftOut(self.skipped)] if self.skipped else []
        return skipped + [piece for part in self.file_parts for piece in part.sliced()]


def _fingerprint(options: Options, found: list[FoundFile], more: list) -> str:
    described = [(file.relative, file.format, file.gzipped, file.size, file.modified_ns) for file in found]
    text = json.dumps([READING, vars(options), described, more])
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]
