"""Tables with a column of text: CSV, TSV and Parquet, row by row.

1. CSV has double quotes (RFC 4180), so that a field may hold line ends and commas; TSV has no quoting, a row is a line.
   The first line of both names the columns.
2. A row with more or fewer fields than columns is a bad record; so is a quote that is not closed: the reading goes on
   with the line after the one that opened it.
3. Parquet is read a batch of rows at a time, and only the column with the text.
"""

import csv
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torchrecipes.data.sources.line_reader import Lines, UnreadableFile, not_utf8
from torchrecipes.data.sources.records import BadRecord, Document
from torchrecipes.data.sources.text_and_jsonl import LONGEST_RECORD, NOT_UTF8, text_field

FIELD_COUNT = "a row with another number of fields than there are columns"
BAD_QUOTES = "a quote that is not closed, or in the wrong place"
QUOTED_LINES = 10_000  # lines of one row, in quotes, before the quote counts as not closed
QUOTED_CHARACTERS = 16 << 20  # the same
PARQUET_ROWS = 256  # per batch


def read_csv(
    line_groups: Iterable[Lines], name: str, text_column: str, limit: int, tabs: bool
) -> Iterator[Document | BadRecord]:
    """Yield the field in the column `text_column` of every row.

    Args:
        line_groups: the lines of the whole file.
        name: of the file.
        text_column: name of the column.
        limit: characters of a document.
        tabs: fields are separated by tabs, and quotes are characters like any other.

    Raises:
        UnreadableFile: the first line does not name the column.
    """
    rows = _tab_rows(_numbered(line_groups, name)) if tabs else _quoted_rows(_numbered(line_groups, name), name)
    columns = None
    for number, row in rows:
        source = f"{name}:{number}"
        if isinstance(row, BadRecord):
            yield row
        elif columns is None:
            columns = [column.strip() for column in row]
            index = _column(columns, text_column, "the first line, which names the columns, is")
        elif len(row) != len(columns):
            yield BadRecord(source, FIELD_COUNT, f"{len(row)}, not {len(columns)}")
        else:
            yield from _document(row[index], source, limit)


def read_parquet(
    path: str, name: str, text_column: str, limit: int, first_group: int = 0, end_group: int | None = None
) -> Iterator[Document | BadRecord]:
    """Yield the value in the column `text_column` of every row, or of those of some row groups.

    A damaged row group is one bad record, from where its damage begins; the next groups are read all the same.

    Args:
        path: of the file.
        name: of the file in messages; an source is `name:row`, from 1.
        text_column: name of the column, which holds strings.
        limit: characters of a document.
        first_group: the first row group to read.
        end_group: the row group to stop before; None reads all.

    Raises:
        UnreadableFile: not a Parquet file, or one without such a column.
    """
    import pyarrow

    with _open_parquet(path, text_column) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        for group in range(first_group, len(sizes) if end_group is None else end_group):
            row = 1 + sum(sizes[:group])
            try:
                # One thread: the parts of a source are read by a process each, and a forked thread pool would hang.
                for batch in file.iter_batches(
                    PARQUET_ROWS, row_groups=[group], columns=[text_column], use_threads=False
                ):
                    for text in _strings(batch.column(0)):
                        yield from _document(text, f"{name}:{row}", limit)
                        row += 1
            except (pyarrow.ArrowException, OSError, ValueError) as error:
                yield BadRecord(f"{name}:{row}", "damaged Parquet data", _first_line(error))


def parquet_groups(path: str, text_column: str, target: int) -> list[tuple[int, int]]:
    """Return ranges of row groups of at least `target` bytes of input; none for a file that cannot be read."""
    ranges, first, held = [], 0, 0
    try:
        with _open_parquet(path, text_column) as file:
            for group in range(file.num_row_groups):
                held += file.metadata.row_group(group).total_byte_size
                if held >= target or group == file.num_row_groups - 1:
                    ranges.append((first, group + 1))
                    first, held = group + 1, 0
    except UnreadableFile:
        return []  # the reader says so
    return ranges


@contextmanager
def _open_parquet(path: str, text_column: str):
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path, pre_buffer=False)
        schema = file.schema_arrow
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: names that are not UTF-8
        if isinstance(error, OSError) and error.errno:  # the disk's, not the file's
            raise
        raise UnreadableFile("not a Parquet file, or a damaged one", _first_line(error)) from error
    with file:
        kind = schema.field(_column(schema.names, text_column, "its columns are")).type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise UnreadableFile(f"the column '{text_column}' holds no strings", f"but {kind}")
        yield file


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]


def _document(text: object, source: str, limit: int) -> Iterator[Document | BadRecord]:
    if isinstance(text, bytes):
        yield BadRecord(source, NOT_UTF8, not_utf8(text))
    else:
        yield from text_field(text, source, limit)


def _column(columns: list[str], wanted: str, introduction: str) -> int:
    if wanted not in columns:
        names = ", ".join(repr(f"{column[:40]}..." if len(column) > 40 else column) for column in columns[:20])
        raise UnreadableFile(f"no column '{wanted}'", f"{introduction} {names}")
    return columns.index(wanted)


def _strings(column) -> list[str | bytes | None]:
    import pyarrow

    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        values = column.cast(pyarrow.large_binary()).to_pylist()
        return [value if value is None else _string(value) for value in values]


def _string(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _numbered(line_groups: Iterable[Lines], name: str) -> Iterator[tuple[int, str | BadRecord]]:
    too_long = False
    for number, lines, goes_on in line_groups:
        if goes_on or too_long:
            if not too_long:
                yield number, BadRecord(f"{name}:{number}", f"a line of more than {LONGEST_RECORD >> 20} MiB")
            too_long = goes_on
            lines, number = lines[1:], number + (not goes_on)
        for line in lines:
            bad = isinstance(line, bytes)
            yield number, BadRecord(f"{name}:{number}", NOT_UTF8, not_utf8(line)) if bad else line
            number += 1


def _tab_rows(lines: Iterable[tuple[int, str | BadRecord]]) -> Iterator[tuple[int, list[str] | BadRecord]]:
    for number, line in lines:
        if isinstance(line, BadRecord):
            yield number, line
        elif line and not line.isspace():
            yield number, line.split("\t")


def _quoted_rows(
    lines: Iterator[tuple[int, str | BadRecord]], name: str
) -> Iterator[tuple[int, list[str] | BadRecord]]:
    # The limit is the process's, and far below the length of a document; it is only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_RECORD))
    again: list[tuple[int, str | BadRecord]] = []  # lines to read again, the next one last
    taken: list[tuple[int, str | BadRecord]] = []  # lines of the row that is being read

    def feed() -> Iterator[str]:
        characters = 0
        while len(taken) < QUOTED_LINES and characters < QUOTED_CHARACTERS:
            item = again.pop() if again else next(lines, None)
            if item is None:
                return
            taken.append(item)
            if isinstance(item[1], BadRecord):
                return  # ends the row: an error inside quotes
            characters += len(item[1])
            yield item[1] + "\n"

    while True:
        taken.clear()
        try:
            row = next(csv.reader(feed(), strict=True), None)
            problem = None
        except csv.Error as error:
            row, problem = None, str(error)
        if not taken:
            return
        number, line = taken[0]
        if isinstance(line, BadRecord):
            yield number, line
        elif problem is not None:
            yield number, BadRecord(f"{name}:{number}", BAD_QUOTES, problem)
            again += reversed(taken[1:])
        elif line and not line.isspace():
            yield number, row
