"""Reads the text column of tables: CSV, TSV and Parquet, row by row.

1. CSV has double quotes (RFC 4180), so a field may hold line ends and commas; TSV has no quoting, a row is a line. The
   first line of both names the columns, unless the config does.
2. A row with another number of fields than columns is a bad record. So is a quote that is never closed: reading
   continues with the line after the one that opened it.
3. Parquet is read with `pyarrow`, a batch of rows at a time, and only the text column.

CSV is read with Python's `csv` and not with `pyarrow.csv`: that one gives no line numbers, and one bad row ends a file.
"""

import csv
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torchrecipes.data.sources.line_reader import Lines, UnreadableFile, decode_or_keep
from torchrecipes.data.sources.records import BadRecord, Cursor, Document
from torchrecipes.data.sources.text_and_jsonl import LONGEST_RECORD, numbered_lines, text_field

FIELD_COUNT = "a row with another number of fields than there are columns"
BAD_QUOTES = "a quote that is not closed, or in the wrong place"
LONGEST_FIELD = 64 << 20  # characters of a row in quotes, which are in memory until the quote is closed
PARQUET_ROWS = 256  # per batch


def read_csv(
    line_groups: Iterable[Lines],
    name: str,
    text_column: str,
    limit: int,
    tabs: bool,
    columns: list[str] | None = None,
    cursor: Cursor | None = None,
) -> Iterator[Document | BadRecord]:
    """Yield the field in the column `text_column` of every row.

    Args:
        line_groups: the lines of the file.
        name: file name for messages.
        text_column: name of the column.
        limit: characters of a document.
        tabs: fields are separated by tabs, and quotes are characters like any other.
        columns: names of the columns, for a file without a header line.
        cursor: where rows start.

    Raises:
        UnreadableFile: no such column; a quoted field of more than 64 Mi characters.
    """
    cursor = cursor or Cursor()
    if header := cursor.place.pop("columns", None):  # of a file that is read from the middle
        cursor.inside["columns"] = columns = header
    rows = _tab_rows(line_groups, name, cursor) if tabs else _quoted_rows(line_groups, name, cursor)
    index = None if columns is None else _column(columns, text_column, "the columns in the config are")
    for number, row in rows:
        source = f"{name}:{number}"
        if isinstance(row, BadRecord):
            yield row
        elif index is None:
            columns = [column.strip() for column in row]
            hint = "a file without a header line needs columns=[...]; the first line, which names the columns, is"
            index = _column(columns, text_column, hint)
            cursor.inside["columns"] = columns
            cursor.at(**{**cursor.place, "row": number + 1})
        elif len(row) != len(columns):
            yield BadRecord(source, FIELD_COUNT, f"{len(row)}, not {len(columns)}")
        else:
            yield from text_field(row[index], source, limit)


def read_parquet(
    path: str, name: str, text_column: str, limit: int, cursor: Cursor | None = None
) -> Iterator[Document | BadRecord]:
    """Yield the value in the column `text_column` of every row.

    A corrupt row group is one bad record, at the row where the damage begins; the next groups are read all the same.

    Args:
        path: the file.
        name: file name for messages; the source of a document is `name:row`, counted from 1.
        text_column: name of a column of any Arrow string type.
        limit: characters of a document.
        cursor: the row group and the row in it to start at, and where batches start.

    Raises:
        UnreadableFile: not a Parquet file, or one without such a column.
    """
    import pyarrow

    cursor = cursor or Cursor()
    first_group, skip = cursor.place.get("row_group", 0), cursor.place.get("row", 0)
    with _open_parquet(path, text_column) as file:
        rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        for group in range(first_group, len(rows)):
            first = row = 1 + sum(rows[:group])
            try:
                # One thread: for one column others gain nothing, and processes forked later would inherit their pool.
                batches = file.iter_batches(PARQUET_ROWS, row_groups=[group], columns=[text_column], use_threads=False)
                for batch in batches:
                    if skip:
                        skip -= len(batch)
                        row += len(batch)
                        continue
                    cursor.at(row_group=group, row=row - first)
                    for text in column_texts(batch.column(0)):
                        yield from text_field(text, f"{name}:{row}", limit)
                        row += 1
            except (pyarrow.ArrowException, OSError, ValueError) as error:
                yield BadRecord(f"{name}:{row}", "corrupt Parquet data", _first_line(error))


def is_text(kind) -> bool:
    """Return whether an Arrow type holds strings: string, large_string, string_view, or a dictionary of them."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def column_texts(column) -> list[str | bytes | None]:
    """Return the values of an Arrow string array; one that is not UTF-8 is bytes."""
    import pyarrow

    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        if pyarrow.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        values = column.cast(pyarrow.large_binary()).to_pylist()
        return [value if value is None else decode_or_keep(value) for value in values]


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
        raise UnreadableFile("not a Parquet file, or a corrupt one", _first_line(error)) from error
    with file:
        kind = schema.field(_column(schema.names, text_column, "its columns are")).type
        if not is_text(kind):
            raise UnreadableFile(f"the column '{text_column}' holds no strings", f"but {kind}")
        yield file


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]


def _column(columns: list[str], wanted: str, introduction: str) -> int:
    if wanted not in columns:
        names = ", ".join(repr(f"{column[:40]}..." if len(column) > 40 else column) for column in columns[:20])
        raise UnreadableFile(f"no column '{wanted}'", f"{introduction} {names}")
    return columns.index(wanted)


def _tab_rows(line_groups: Iterable[Lines], name: str, cursor: Cursor) -> Iterator[tuple[int, list[str] | BadRecord]]:
    for number, line in numbered_lines(line_groups, name, cursor.at, cursor.place.get("row", 0)):
        yield number, line if isinstance(line, BadRecord) else line.split("\t")


def _quoted_rows(
    line_groups: Iterable[Lines], name: str, cursor: Cursor
) -> Iterator[tuple[int, list[str] | BadRecord]]:
    # The limit is the process's, and far below the length of a document; it is only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_RECORD))
    group: dict[str, int] = {}  # where the lines start that come next
    begin = cursor.place.get("row", 0)
    lines = numbered_lines(line_groups, name, group.update, begin, keep_blank=True)
    again: list[tuple[int, str | BadRecord]] = []  # lines to read again, the next one last
    taken: list[tuple[int, str | BadRecord]] = []  # lines of the row that is being read

    def feed() -> Iterator[str]:
        characters = 0
        while item := again.pop() if again else next(lines, None):
            if is_new and not taken:
                cursor.at(**{**group, "row": item[0]})
            taken.append(item)
            if isinstance(item[1], BadRecord):
                return  # ends the row: an error inside quotes
            characters += len(item[1])
            if characters > LONGEST_FIELD and len(taken) > 1:
                # What follows may be inside the quotes or not: reading it as rows could make documents of its lines.
                detail = f"line {taken[0][0]}: its quote is not closed within {LONGEST_FIELD >> 20} Mi characters"
                raise UnreadableFile("a quoted field that is too long", detail)
            yield item[1] + "\n"

    while True:
        taken.clear()
        is_new = not again
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
