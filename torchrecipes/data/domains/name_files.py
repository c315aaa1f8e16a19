"""`domain_names`: domain names in files, one per line or in a column of a table.

The source gives names in two ways that agree: as an ordinary source of documents, and in bulk. In bulk, `blocks` reads
complete lines, a few MiB at a time, in one thread; `parse` turns a block into names, in as many threads as there are.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from torchrecipes.config.suggest import did_you_mean
from torchrecipes.data.domains.csv_column import PlainFields, plain_fields
from torchrecipes.data.domains.hashing import mix
from torchrecipes.data.domains.line_parsing import ParsedNames, beginning_of_line, parse_lines
from torchrecipes.data.domains.name_syntax import MAX_LINE, NO_NAMES, REASONS, NameOptions
from torchrecipes.data.domains.public_suffix_list import PublicSuffixList, default_list
from torchrecipes.data.progress import Progress
from torchrecipes.data.sources.line_reader import Lines, UnreadableFile, decode_or_keep, open_blocks
from torchrecipes.data.sources.record_columns import RecordColumns
from torchrecipes.data.sources.records import EXAMPLES_PER_REASON, BadRecord, Cursor, Document, ReadStats, documents
from torchrecipes.data.sources.resolve_paths import FoundFile
from torchrecipes.data.sources.tables import read_csv
from torchrecipes.data.sources.text_column import checked_text
from torchrecipes.data.sources.text_files import check_unchanged, files, unreadable
from torchrecipes.errors import UserError

PARSING = 1  # raise it when the same files give other names than before: it enters the fingerprint
BLOCK_BYTES = 2 << 20
LONGEST_LINE = 2 * MAX_LINE  # bytes that are kept of a line
TABLE_ROWS = 1 << 16  # rows of a table in a block
SAMPLES = {"tiny": 10_000, "small": 1_000_000, "medium": 10_000_000, "large": 100_000_000, "full": None}
SAMPLE_KEY = np.uint64(0xA0761D6478BD642F)
SAMPLE_BITS = 20
SAMPLE_BINS = 1 << SAMPLE_BITS
HASHES = 1 << 64  # number of values of a hash


class NameBlock(NamedTuple):
    """Complete lines of a file, each with its `\\n`.

    Attributes:
        data: the lines.
        name: the file.
        lines: the numbers of the lines in the file, from 1, `[L]`; or the first one, where they follow each other.
        position: where to read on after these lines, for `blocks` and `read`.
        sample_limit: names whose `sample_hashes` are lower are in the sample.
    """

    data: bytes
    name: str
    lines: int | np.ndarray
    position: dict[str, Any]
    sample_limit: int = HASHES

    def source_of(self, line: int) -> str:
        """Return `file:line` of a line, which is numbered from 0 in the block."""
        return f"{self.name}:{self.lines + line if isinstance(self.lines, int) else self.lines[line]}"

    def text_of(self, line: int) -> str:
        """Return the beginning of a line, which is numbered from 0 in the block."""
        return beginning_of_line(self.data.split(b"\n", line + 1)[line])


@dataclass
class domain_names:
    """Domain names in files: a name per line of plain text, or in a column of .csv, .tsv, .jsonl or .parquet.

    All but Parquet may be compressed (.gz, .xz, .zst). A line becomes a name as `parse_name` says; one that gives none
    is counted by its reason, one of `REASONS`. Blank lines and comments (`#`) are counted, too, and never stop.

    Args:
        path: a file, a folder, a pattern, or a list of those, as for `torchrecipes.data.sources.files`.
        column: the column of tables, or key of JSON objects, that holds the name.
        columns: names of the columns of CSV and TSV files that have no header line.
        delimiter: the character between the fields of .csv files.
        strip_url: remove scheme, user, port, path and a leading `*.`.
        underscore: "accept" or "reject" names with underscores.
        idna: turn Unicode names into punycode (UTS 46); False: reject them.
        public_suffix_list: a .dat file; None: the one of the package `publicsuffixlist`.
        only_icann: leave out the list's rules of private owners, such as `blogspot.com`.
        sample: a part of the names, chosen by a hash of the name: "tiny" (10,000 names at most), "small" (1 M),
            "medium" (10 M), "large" (100 M), "full", or a share above 0 and up to 1. A larger sample holds the smaller.
            A number of names takes one more pass over the files.
        on_bad_record: "skip" counts and reports a line that gives no name, "stop" raises there.
        max_documents: names to read at most, from the first; None: all.

    Attributes:
        report: counts of the latest `read`; of `blocks`, it counts only what is skipped in reading the files, and
            `count` adds what `parse` gave.

    Raises:
        UserError: a path that matches nothing, an invalid value; and, when the source is read, what `on_bad_record`
            says, or a file that has changed or cannot be read.
    """

    path: str | list[str]
    column: str = "domain"
    columns: list[str] | None = None
    delimiter: str = ","
    strip_url: bool = False
    underscore: str = "reject"
    idna: bool = True
    public_suffix_list: str | None = None
    only_icann: bool = False
    sample: str | float | None = None
    on_bad_record: str = "skip"
    max_documents: int | None = None
    report: ReadStats = field(default_factory=ReadStats, init=False, repr=False, compare=False)
    _cursor: Cursor = field(default_factory=Cursor, init=False, repr=False, compare=False)

    def __post_init__(self):
        self.options = NameOptions(self.strip_url, self.underscore, self.idna)
        _check_sample(self.sample)
        if self.columns is not None and self.column not in self.columns:
            hint = f"Name the column of the names '{self.column}' in columns, or set column to one of them."
            raise UserError(f"{self.columns} have no '{self.column}'", key="columns", hint=hint, code="invalid_value")
        found = files(
            self.path, self.column, "line", columns=self.columns, delimiter=self.delimiter,
            on_bad_record=self.on_bad_record, max_documents=self.max_documents,
        )  # fmt: skip
        self._column = RecordColumns({self.column: "column"}, _document)
        self._files = found.records(self._column, plain_text=True)
        is_default = self.public_suffix_list is None
        self.suffixes = (
            default_list(self.only_icann) if is_default else PublicSuffixList(self.public_suffix_list, self.only_icann)
        )

    @property
    def name(self) -> str:
        """The first files, and how many there are."""
        return self._files.name

    @property
    def num_bytes(self) -> int:
        """Size of all files in bytes as stored; 0 where some names are left out."""
        return self._files.num_bytes if self.sample in (None, "full", 1) else 0

    @property
    def fingerprint(self) -> str:
        """A hash of the files' content, the options, and the rules of public suffixes."""
        options = [PARSING, astuple(self.options), self.sample, self.suffixes.fingerprint, self._files.fingerprint]
        return hashlib.sha256(json.dumps(options).encode()).hexdigest()[:32]

    def __iter__(self) -> Iterator[Document]:
        return self.read()

    def read(self, position: dict[str, Any] | None = None) -> Iterator[Document]:
        """Yield the names as documents, with a new report.

        Args:
            position: what `position` returned, or a block's; None: from the first name.

        Raises:
            UserError: a line that gives no name and `on_bad_record` is "stop"; a file that cannot be read.
        """
        self.report, self._cursor = ReadStats(), Cursor(position)
        blocks = self._blocks(self._cursor.place, position is None)
        return read_names(blocks, self.parse, self.report, self._cursor, self.max_documents)

    def position(self) -> dict[str, Any]:
        """Return the position after the last document or block that was read."""
        return self._cursor.position

    def blocks(self, position: dict[str, Any] | None = None) -> Iterator[NameBlock]:
        """Yield complete lines, some MiB at a time, for `parse`, with a new report.

        With `max_documents` the last block ends after the last name; names are counted by parsing them here.

        Args:
            position: a block's position; None: from the first line.

        Raises:
            UserError: a file that cannot be read; a record of a table without a name and `on_bad_record` is "stop".
            ValueError: the position is inside a block, as those of `read` are.
        """
        self.report, self._cursor = ReadStats(), Cursor(position)
        if self._cursor.skip:
            raise ValueError("this position of read is inside a block")
        for block in self._blocks(self._cursor.place, position is None):
            if self.max_documents is not None:
                parsed = self.parse(block)
                left = self.max_documents - self._cursor.documents
                if left <= len(parsed):
                    lines = int(parsed.line_numbers[left - 1]) + 1 if left else 0
                    block = block._replace(data=b"\n".join([*block.data.split(b"\n", lines)[:lines], b""]))
                self._cursor.documents += min(left, len(parsed))
                block = block._replace(position={**block.position, "documents": self._cursor.documents})
            self._cursor.at(**{key: value for key, value in block.position.items() if key != "documents"})
            if block.data:
                yield block
            if self._cursor.documents == self.max_documents:
                return

    def parse(self, block: NameBlock) -> ParsedNames:
        """Return the names of a block that are in the sample. Threads may call it at the same time.

        Raises:
            UserError: a line gives no name and `on_bad_record` is "stop" (code `bad_record`).
        """
        parsed = parse_lines(block.data, self.options, self.suffixes)
        if self.on_bad_record == "stop" and (bad := {*parsed.rejected} - NO_NAMES):
            found = sorted((line, reason, text) for reason in bad for line, text in parsed.rejected[reason].examples)
            lines = "\n".join(str(BadRecord(block.source_of(line), *rest)) for line, *rest in found[:10])
            hint = "Repair the lines, or count and skip them with on_bad_record=skip."
            raise UserError(lines, hint=hint, code="bad_record")
        if block.sample_limit < HASHES:
            return parsed.select(sample_hashes(parsed.hashes) < np.uint64(block.sample_limit))
        return parsed

    def count(self, block: NameBlock, parsed: ParsedNames) -> None:
        """Add what `parse` gave for a block to the report."""
        count_names(self.report, block, parsed)

    def _blocks(self, place: dict[str, Any], is_start: bool) -> Iterator[NameBlock]:
        limit = place.get("sample_limit") or self._sample_limit
        kept = {} if limit == HASHES else {"sample_limit": limit}
        if is_start:
            for record in self._files.skipped:
                self.report.add(record)
        for block in self._all_lines(place):
            yield block._replace(position=block.position | kept, sample_limit=limit)

    def _all_lines(self, place: dict[str, Any]) -> Iterator[NameBlock]:
        first = place.get("file", 0)
        for number, file in enumerate(self._files.found[first:], first):
            read = {"text": _text_lines, "csv": self._csv_lines, "tsv": self._csv_lines}.get(
                file.format, self._table_lines
            )
            try:
                check_unchanged(file)
                for block in read(file, place if number == first else {}):
                    yield block._replace(position={"file": number, **block.position})
            except UnreadableFile as error:
                record = BadRecord(file.name, error.reason, error.detail)
                if self.on_bad_record == "stop":
                    hint = "Repair the file, or read what is good of it with on_bad_record=skip."
                    raise UserError(str(record), hint=hint, code="bad_record") from None
                self.report.add(record)
            except OSError as error:
                raise unreadable(file.name, error) from error

    def _csv_lines(self, file: FoundFile, place: dict[str, Any]) -> Iterator[NameBlock]:
        """Yield the names in a CSV or TSV file, many rows at a time up to the first quote in it."""
        if "row" in place:
            yield from self._table_lines(file, place)
            return
        delimiter = "\t" if file.format == "tsv" else self._files.delimiter
        columns = place.get("columns", self.columns)
        kept = {} if self.columns else {"columns": columns}
        for block in _text_lines(file, place):
            data, first = block.data, block.lines
            if columns is None:
                header, _, data = data.partition(b"\n")
                columns = [name.strip() for name in header.decode(errors="replace").split(delimiter)]
                first += 1
                kept = {"columns": columns}
            is_quoted = b'"' in block.data and delimiter != "\t"
            is_odd = self.column not in columns or "\ufffd" in "".join(columns) or not delimiter.isascii()
            if is_quoted or is_odd:
                # A row may end in another block: the reader of rows continues at the start of this one.
                start = {**place, **kept, "file": 0} if place else None
                yield from self._table_lines(file, {"row": start} if start else {})
                return
            place = {**block.position, **kept}
            fields = plain_fields(data, columns.index(self.column), len(columns), delimiter)
            yield self._with_other_rows(NameBlock(data, file.name, first, place), fields, columns, delimiter)

    def _with_other_rows(self, block: NameBlock, fields: PlainFields, columns: list[str], delimiter: str) -> NameBlock:
        """Return a block of the plain fields of the lines, and of what the others give one by one."""
        if fields.is_plain.all():
            return block._replace(data=fields.data)
        numbers = (block.lines + np.flatnonzero(fields.is_plain)).tolist()
        parts, done, report = [], 0, ReadStats()
        for line in np.flatnonzero(~fields.is_plain).tolist():
            start = int(fields.line_ends[line - 1]) + 1 if line else 0
            content = decode_or_keep(block.data[start : int(fields.line_ends[line])])
            rows = read_csv([Lines(block.lines + line, [content], 0)], block.name, self._column, delimiter, columns)
            for row in documents(rows, report, self.on_bad_record == "stop", remedy=self._column.remedy):
                place = int(fields.stops[before - 1]) if (before := int(fields.is_plain[:line].sum())) else 0
                parts += [fields.data[done:place], _as_line(row)]
                done = place
                numbers.append(block.lines + line)
        add_skipped(self.report, report)
        return block._replace(data=b"".join([*parts, fields.data[done:]]), lines=np.array(sorted(numbers), np.int64))

    def _table_lines(self, file: FoundFile, place: dict[str, Any]) -> Iterator[NameBlock]:
        table = copy.copy(self._files)
        table.found, table.skipped, table.max_documents = [file], [], None
        rows = table.read(place.get("row"))
        try:
            while some := list(islice(rows, TABLE_ROWS)):
                yield _rows_block(some, file.name, {"row": table.position()})
        finally:
            add_skipped(self.report, table.report)

    @cached_property
    def _sample_limit(self) -> int:
        """The hash below which a name is in the sample, so that it has no more names than wanted.

        Names are counted by the highest bits of their sample hash; the sample ends where one of these counts does.
        """
        wanted = SAMPLES[self.sample or "full"] if not isinstance(self.sample, float | int) else None
        if isinstance(self.sample, float | int):
            return min(HASHES, int(self.sample * HASHES))
        if wanted is None:
            return HASHES
        counts = np.zeros(SAMPLE_BINS, np.int64)
        everything = replace(self, sample=None)
        progress = Progress("counting names", everything.num_bytes, unit="names")
        try:
            for block in everything.blocks():
                hashes = sample_hashes(everything.parse(block).hashes)
                counts += np.bincount(hashes >> np.uint64(64 - SAMPLE_BITS), minlength=SAMPLE_BINS)
                progress.add(len(hashes), len(block.data))
        finally:
            progress.close()
        bins = int(np.searchsorted(np.cumsum(counts), wanted, side="right"))
        return bins << (64 - SAMPLE_BITS)


def read_names(
    blocks: Iterator[NameBlock],
    parse: Callable[[NameBlock], ParsedNames],
    report: ReadStats,
    cursor: Cursor,
    max_documents: int | None = None,
) -> Iterator[Document]:
    """Yield the names of blocks as documents, counting names and rejected lines one by one.

    Args:
        blocks: from the cursor's place on.
        parse: what gives the names of a block.
        report: counts names and lines.
        cursor: where the blocks start; the lines that it says to skip are dropped and not reported.
        max_documents: names to yield at most, those before the cursor's start included.
    """
    skip, reasons = cursor.skip, list(REASONS)
    for block in blocks:
        if block.sample_limit < HASHES:
            cursor.place["sample_limit"] = block.sample_limit
        parsed = parse(block)
        names = parsed.names()
        lines = np.concatenate([parsed.line_numbers, parsed.rejected_lines])
        texts = block.data.split(b"\n") if len(parsed.rejected_lines) else []
        for item in np.argsort(lines, kind="stable").tolist():
            if cursor.documents == max_documents:
                return
            cursor.records += 1
            line = int(lines[item])
            if skip:
                skip -= 1
            elif item < len(names):
                cursor.documents += 1
                report.documents += 1
                report.characters += len(names[item])
                yield Document(names[item], block.source_of(line))
            else:
                reason = reasons[parsed.rejected_reasons[item - len(names)]]
                report.add(BadRecord(block.source_of(line), reason, beginning_of_line(texts[line])))
        cursor.at(**block.position)


def sample_hashes(hashes: np.ndarray) -> np.ndarray:
    """Return a hash of each name, `[D]` uint64, that is independent of `hashes`, which decide the split."""
    return mix(hashes ^ SAMPLE_KEY)


def count_names(report: ReadStats, block: NameBlock, parsed: ParsedNames) -> None:
    """Add the names and the rejected lines of a block to a report."""
    report.documents += len(parsed)
    report.characters += len(parsed.characters)
    rejected = ReadStats()
    for reason, (count, some) in parsed.rejected.items():
        rejected.skipped[reason] = count
        rejected.examples[reason] = [
            f"{block.source_of(line)}: {text}" if text else block.source_of(line) for line, text in some
        ]
    add_skipped(report, rejected)


def add_skipped(report: ReadStats, more: ReadStats) -> None:
    """Add what another report says was skipped."""
    for reason, count in more.skipped.items():
        report.skipped[reason] = report.skipped.get(reason, 0) + count
        examples = report.examples.setdefault(reason, [])
        examples += more.examples[reason][: EXAMPLES_PER_REASON - len(examples)]


def _text_lines(file: FoundFile, place: dict[str, Any]) -> Iterator[NameBlock]:
    """Yield the lines of a text file; of a line that is too long for any name, its beginning at least."""
    line, size, tail = place.get("line", 1), 0, 0  # size of `pieces`, and of what follows their last line end
    pieces: list[bytes] = []
    damage = None
    with open_blocks(file.path, file.compression, place.get("byte", 0)) as blocks:
        while True:
            try:
                block = next(blocks, None)
            except UnreadableFile as error:
                damage, block = error, None
            if block is None:
                break
            data, _, stop, _ = block
            end = data.rfind(b"\n") + 1
            if end:
                pieces.append(data[:end])
                size += end
                if size >= BLOCK_BYTES:
                    lines = b"".join(pieces)
                    count = lines.count(b"\n")
                    yield NameBlock(lines, file.name, line, {"byte": stop - len(data) + end, "line": line + count})
                    line, size, pieces = line + count, 0, []
                tail = 0
            rest = data[end:][: LONGEST_LINE - tail]
            pieces.append(rest)
            size, tail = size + len(rest), tail + len(rest)
    if damage is not None:  # the last line is cut
        size, lines = size - tail, b"".join(pieces)[: size - tail]
    else:
        lines = b"".join(pieces) + (b"\n" if tail else b"")
    if size:
        yield NameBlock(lines, file.name, line, {"byte": stop, "line": line + lines.count(b"\n")})
    if damage is not None:
        raise damage


def _as_line(row: Document) -> bytes:
    return (row.text.replace("\n", " ") + "\n").encode()


def _rows_block(rows: list[Document], name: str, position: dict[str, Any]) -> NameBlock:
    return NameBlock(
        b"".join(map(_as_line, rows)),
        name,
        np.array([int(row.source.rpartition(":")[2]) for row in rows], np.int64),
        position,
    )


def _document(values: Sequence[Any], source: str) -> Document | BadRecord:
    text = checked_text(values[0], source)
    return text if isinstance(text, BadRecord) else Document(text, source)


def _check_sample(sample: str | float | None) -> None:
    is_share = isinstance(sample, float | int) and not isinstance(sample, bool)
    if sample is None or (is_share and 0 < sample <= 1) or (isinstance(sample, str) and sample in SAMPLES):
        return
    hint = did_you_mean(str(sample), SAMPLES, "Set a share above 0 and up to 1, or one of")
    raise UserError(f"'{sample}' is no sample", key="sample", hint=hint, code="invalid_value")
