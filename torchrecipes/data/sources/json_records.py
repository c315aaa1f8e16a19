"""Turns JSON into documents: an object per line, or one array of objects.

`pyarrow.json` and `datasets` stop at the first line that is not JSON, or whose keys have other types, without its
number; both hold the other columns in memory.
"""

import json
import re
from collections import deque
from collections.abc import Iterable, Iterator
from operator import itemgetter
from typing import Any

from torchrecipes.data.sources.line_reader import (
    LONGEST_RECORD,
    NOT_UTF8,
    TOO_LONG,
    Lines,
    UnreadableFile,
    not_utf8,
    numbered_lines,
)
from torchrecipes.data.sources.record_columns import RecordColumns
from torchrecipes.data.sources.records import BadRecord, Cursor, Document
from torchrecipes.data.sources.text_column import TextColumn, kind_of

ARRAY = re.compile(rb"\s*\[\s*\{")  # how a file begins that is one array of objects
BETWEEN = re.compile(r"[ \t\n\r,]*")  # the objects of an array


def read_json_lines(
    line_groups: Iterable[Lines], name: str, column: TextColumn | RecordColumns, cursor: Cursor | None = None
) -> Iterator[Document | BadRecord]:
    """Yield the text of every line's object; blank lines are no records.

    If a key is there twice, the last value counts. NaN and Infinity are accepted: only the text is used.

    Args:
        line_groups: the lines of the file.
        name: file name for messages.
        column: what of an object is used.
        cursor: where the lines start.

    Raises:
        UnreadableFile: the file is one JSON object over several lines.
    """
    cursor = cursor or Cursor()
    raw_decode, is_first = json.JSONDecoder().raw_decode, not cursor.place.get("byte")
    get = itemgetter(column.name) if type(column) is TextColumn and "." not in column.name else column.of
    limit, is_text = column.limit, column.template is None
    for number, line in numbered_lines(line_groups, name, cursor.at):
        if type(line) is BadRecord:
            yield line
            continue
        if is_first:
            if line.strip() == "{":
                hint = "convert it, e.g. jq -c . a.json > a.jsonl"
                raise UnreadableFile("JSON, but one object over several lines", hint)
            is_first = False
        source = f"{name}:{number}"
        try:
            record, end = raw_decode(line)
            value = get(record)
            good = end == len(line)
        except (ValueError, LookupError, TypeError, RecursionError):
            good = False
        if not good:
            yield from _json_line(line, source, column)
        elif (
            is_text
            and type(value) is str
            and len(value) <= limit
            and value.isascii()
            and "\r" not in value
            and value.strip()
        ):
            yield Document(value, source)
        else:
            yield from column.documents(value, source)


def read_json_array(
    line_groups: Iterable[Lines], name: str, column: TextColumn | RecordColumns, cursor: Cursor | None = None
) -> Iterator[Document | BadRecord]:
    """Yield the text of every object of an array that is the whole file, in constant memory.

    What is not JSON ends it: without line ends between records, nothing says where the next one starts.

    Args:
        line_groups: the lines of the file; long ones may come in fragments of any size.
        name: file name for messages.
        column: what of an object is used.
        cursor: where the lines start, and where objects do.
    """
    cursor = cursor or Cursor()
    is_open = "chars" in cursor.place
    text = _Text(line_groups, cursor)
    try:
        while character := text.peek():
            if not is_open:  # the bracket
                text.move(text.at + 1)
                is_open = True
            elif character == "]":
                text.move(text.at + 1)
                if text.peek():
                    raise _NotJSON("not JSON", "text after the end of the array")
                return
            else:
                text.tell()
                source = f"{name}:{text.line}"
                yield from _record(text.decode(), source, column)
        raise _NotJSON("not JSON", "the array has no end")
    except _NotJSON as error:
        yield BadRecord(f"{name}:{text.line}", *error.args)


class _NotJSON(Exception):
    """A reason and a detail."""


class _Text:
    """The text of a file, of which only what is parsed next is in memory: `text[at:]`, which starts in line `line`."""

    def __init__(self, line_groups: Iterable[Lines], cursor: Cursor):
        self.groups, self.cursor = iter(line_groups), cursor
        self.text, self.at, self.before = "", 0, 0  # before: characters before those of `text`
        self.line = cursor.place.get("line", 1)
        self.inside = cursor.place.get("is_rest", False)
        self.is_end, self.damage = False, None
        self.marks: deque[tuple[int, dict[str, Any]]] = deque()  # where groups start
        self.told: dict[str, Any] = {}
        self.raw_decode = json.JSONDecoder(parse_int=_integer).raw_decode
        start = cursor.place.get("chars", 0)
        while len(self.text) < start and self.more():
            pass
        self.move(start)

    def more(self) -> bool:
        """Read on; return whether there was anything."""
        if self.damage:
            self.line, *args = self.damage
            raise _NotJSON(*args)
        group = next(self.groups, None)
        if group is None:
            self.is_end = True
            return False
        number, lines, byte, is_fragment = group
        self.marks.append(
            (self.before + len(self.text), {"byte": byte, "line": number, **({"is_rest": True} if self.inside else {})})
        )
        self.inside = is_fragment
        for index, line in enumerate(lines):
            if type(line) is bytes:
                self.damage = number + index, NOT_UTF8, not_utf8(line)
                lines = lines[:index]
                break
        self.text = self.text[self.at :] + "\n".join(lines) + ("" if is_fragment else "\n")
        self.before, self.at = self.before + self.at, 0
        return True

    def move(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def tell(self) -> None:
        """State that a record starts here."""
        here = self.before + self.at
        while len(self.marks) > 1 and self.marks[1][0] <= here:
            self.marks.popleft()
        mark, place = self.marks[0]
        if place is not self.told:
            self.told = place
            self.cursor.at(**place, chars=here - mark)

    def peek(self) -> str:
        """Move to the next character that is not between records, and return it; nothing at the end."""
        while True:
            start = BETWEEN.match(self.text, self.at).end()
            if start < len(self.text):
                self.move(start)
                return self.text[start]
            if not self.more():
                return ""

    def decode(self) -> Any:
        """Return the value that starts here and move to its end."""
        while True:
            try:
                value, end = self.raw_decode(self.text, self.at)
                if end < len(self.text) or self.is_end:  # else it may be a number that continues
                    self.move(end)
                    return value
            except RecursionError:
                raise _NotJSON("nested too deeply", "") from None
            except json.JSONDecodeError as error:
                if self.is_end or not (error.msg.startswith("Unterminated") or error.pos > len(self.text) - 12):
                    self.line += self.text.count("\n", self.at, error.pos)
                    raise _NotJSON("not JSON", error.msg.removesuffix(" at")) from None
            size = len(self.text) - self.at
            if size > LONGEST_RECORD:
                raise _NotJSON(TOO_LONG, "")
            while len(self.text) - self.at < 2 * size and self.more():
                pass


def _json_line(line: str, source: str, column: TextColumn | RecordColumns) -> Iterator[Document | BadRecord]:
    # The slow path: every check, one after the other, with a message for each.
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        yield BadRecord(source, "not JSON", f"{error.msg.removesuffix(' at')} at column {error.colno}")
    except ValueError:
        yield BadRecord(source, "a number with too many digits")
    except RecursionError:
        yield BadRecord(source, "nested too deeply")
    else:
        yield from _record(record, source, column)


def _record(record: Any, source: str, column: TextColumn | RecordColumns) -> Iterator[Document | BadRecord]:
    if not isinstance(record, dict):
        yield BadRecord(source, "not a JSON object", f"it is {kind_of(record)}")
        return
    try:
        value = column.of(record)
    except KeyError as error:
        keys = ", ".join(f"'{key}'" for key in list(record)[:10]) or "none at all"
        yield BadRecord(source, f"no key '{error.args[0]}'", f"its keys are {keys}")
    else:
        yield from column.documents(value, source)


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) < 4000 else float(digits)  # Python's own have a limit of digits
