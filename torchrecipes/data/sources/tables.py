"""Reads the text column, or several columns, of tables: CSV, TSV and Parquet, row by row.

1. CSV has double quotes (RFC 4180), so a field may hold line ends and commas; TSV has no quoting, a row is a line. The
   first line of both names the columns, unless the config does.
2. A row with another number of fields than columns is a bad record. So is a quote that is never closed: reading
   continues with the line after the one that opened it.
3. Parquet is read with `pyarrow`, a batch of rows at a time, and only the columns that are used.

CSV is read with Python's `csv` and not with `pyarrow.csv`: that one gives no line numbers, and one bad row ends a file.
"""

import csv
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torchrecipes.data.sources.line_reader import (
    LONGEST_RECORD,
    Lines,
    UnreadableFile,
    decode_or_keep,
    numbered_lines,
)
from torchrecipes.data.sources.record_columns import RecordColumns
from torchrecipes.data.sources.records import BadRecord, Cursor, Document
from torchrecipes.data.sources.text_column import TextColumn

FIELD_COUNT = "a row with another number of fields than there are columns"
BAD_QUOTES = "a quote that is not closed, or in the wrong place"
LONGEST_FIELD = 64 << 20  # characters of a row in quotes, which are in memory until the quote is closed
PARQUET_ROWS = 256  # per batch


def read_csv(
    line_groups: Iterable[Lines],
    name: str,
    column: TextColumn | RecordColumns,
    delimiter: str,
    columns: list[str] | None = None,
    cursor: Cursor | None = None,
) -> Iterator[Document | BadRecord]:
    """Yield the field in the text column, or a record, of every row.

    Args:
        line_groups: the lines of the file.
        name: file name for messages.
        column: the text column, or those of a record.
        delimiter: the character between fields. Where it is a tab, quotes are characters like any other.
        columns: names of the columns, for a file without a header line.
        cursor: where rows start.

    Raises:
        UnreadableFile: no such column; a quoted field of more than 64 Mi characters.
    """
    cursor = cursor or Cursor()
    if header := cursor.place.pop("columns", None):  # of a file that is read from the middle
        cursor.inside["columns"] = columns = header
    if delimiter == "\t":
        rows = _tab_rows(line_groups, name, cursor)
    else:
        rows = _quoted_rows(line_groups, name, delimiter, cursor)
    indices = None
    if columns is not None:
        indices = [_column(columns, wanted, "the columns in the config are") for wanted in column.names]
    for number, row in rows:
        source = f"{name}:{number}"
        if isinstance(row, BadRecord):
            yield row
        elif indices is None:
            columns = [field.strip() for field in row]
            hint = "a file without a header line needs columns=[...]; the first line, which names the columns, is"
            other = next((sign for sign in ";\t|," if len(columns) == 1 and sign in columns[0]), None)
            if other:
                hint = f"fields may be separated by {other!r}, which delimiter says; the first line is"
            indices = [_column(columns, wanted, hint) for wanted in column.names]
            cursor.inside["columns"] = columns
            cursor.at(**{**cursor.place, "row": number + 1})
        elif len(row) != len(columns):
            yield BadRecord(source, FIELD_COUNT, f"{len(row)}, not {len(columns)}")
        else:
            yield from column.documents(column.of_row([row[index] for index in indices]), source)


def read_parquet(
    path: str, name: str, column: TextColumn | RecordColumns, cursor: Cursor | None = None
) -> Iterator[Document | BadRecord]:
    """Yield the value in the text column, or a record, of every row.

    A corrupt row group is one bad record, at the row where the damage begins; the next groups are read all the same.

    Args:
        path: the file.
        name: file name for messages; the source of a document is `name:row`, counted from 1.
        column: a text column of any Arrow string type, or of lists of messages; also fields of structs.
        cursor: the row group and the row in it to start at, and where batches start.

    Raises:
        UnreadableFile: not a Parquet file, or one without such a column.
    """
    import pyarrow

    cursor = cursor or Cursor()
    first_group, skip = cursor.place.get("row_group", 0), cursor.place.get("row", 0)
    with _open_parquet(path) as file:
        paths = column_paths(file.schema_arrow, column)
        stated = [path[0] if any("." in name for name in path) else ".".join(path) for path in paths]
        rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        for group in range(first_group, len(rows)):
            first = row = 1 + sum(rows[:group])
            try:
                # One thread: for few columns others gain nothing, and processes forked later would inherit their pool.
                batches = file.iter_batches(PARQUET_ROWS, row_groups=[group], columns=stated, use_threads=False)
                for batch in batches:
                    if skip:
                        skip -= len(batch)
                        row += len(batch)
                        continue
                    cursor.at(row_group=group, row=row - first)
                    for value in row_values(batch, paths, column):
                        yield from column.documents(value, f"{name}:{row}")
                        row += 1
            except (pyarrow.ArrowException, OSError, ValueError) as error:
                yield BadRecord(f"{name}:{row}", "corrupt Parquet data", _first_line(error))


def column_paths(schema: Any, column: TextColumn | RecordColumns) -> list[list[str]]:
    """Return, for every column to read, its name and those of the struct fields in it that lead to the value.

    Args:
        schema: an Arrow schema.
        column: the text column, or those of a record.

    Raises:
        UnreadableFile: there is no such column, or the text column holds neither strings nor lists of messages.
    """
    from pyarrow import types

    paths = []
    for name in column.names:
        path, kind = _struct_path(schema, name) or (None, None)
        if path is None:
            _column(schema.names, name, "its columns are")
        kind = kind.value_type if types.is_dictionary(kind) else kind
        is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
        is_list = types.is_list(kind) or types.is_large_list(kind)
        if type(column) is TextColumn and not is_text and not (column.template and is_list):
            raise UnreadableFile(f"the column '{name}' holds no strings", f"but {kind}")
        paths.append(path)
    return paths


def row_values(batch: Any, paths: list[list[str]], column: TextColumn | RecordColumns) -> Iterator[Any]:
    """Yield what `column.documents` takes for every row of an Arrow batch or table."""
    values = [column_values(batch.column(path[0]), path[1:]) for path in paths]
    return map(column.of_row, zip(*values, strict=True))


def column_values(column: Any, fields: list[str]) -> list[Any]:
    """Return the values of an Arrow array, or of a field in its structs; a string that is not UTF-8 is bytes."""
    import pyarrow
    import pyarrow.compute

    if fields:
        column = pyarrow.compute.struct_field(column, fields)
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        if pyarrow.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if pyarrow.types.is_nested(column.type):
            raise
        values = column.cast(pyarrow.large_binary()).to_pylist()
        return [value if value is None else decode_or_keep(value) for value in values]


def _struct_path(fields: Any, name: str) -> tuple[list[str], Any] | None:
    """Return the names from a schema or struct to a field, and its type; None where there is no such field."""
    from pyarrow import types

    kinds = {field.name: field.type for field in fields}
    if name in kinds:
        return [name], kinds[name]
    for dot in (index for index, character in enumerate(name) if character == "."):
        inner = kinds.get(name[:dot])
        if inner is not None and types.is_struct(inner) and (rest := _struct_path(inner, name[dot + 1 :])):
            return [name[:dot], *rest[0]], rest[1]
    return None


@contextmanager
def _open_parquet(path: str):
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path, pre_buffer=False)
        _ = file.schema_arrow
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: names that are not UTF-8
        if isinstance(error, OSError) and error.errno:  # the disk's, not the file's
            raise
        raise UnreadableFile("not a Parquet file, or a corrupt one", _first_line(error)) from error
    with file:
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
    line_groups: Iterable[Lines], name: str, delimiter: str, cursor: Cursor
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
            row = next(csv.reader(feed(), strict=True, delimiter=delimiter), None)
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
