"""Turns the numbered lines of plain text and JSON lines into documents.

1. Plain text: a document is a file, a paragraph (the lines between blank lines) or a line.
2. JSON lines: a document is the text of one object per line.
3. A text longer than a limit is cut into several documents, at white space where there is any; nothing is dropped.

`pyarrow.json` and `datasets` stop at the first line that is not JSON, or whose keys have other types, without its
number; both hold the other columns in memory.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torchrecipes.data.sources.line_reader import Lines, UnreadableFile, not_utf8
from torchrecipes.data.sources.records import EMPTY_TEXT, BadRecord, Cursor, Document

NOT_UTF8 = "not UTF-8"
LONGEST_RECORD = 256 << 20  # bytes of a line that must be in memory to be parsed: JSON, a row of a table


class Pieces:
    """Cuts one text, which comes in any number of strings, into documents of at most `limit` characters.

    A cut is after the last white space in the second half of what fits, or else where the limit is. The pieces joined
    are the text, except that pieces of white space alone are dropped. The cuts depend on the text only.

    Args:
        source: where the text is, for its documents.
        limit: characters of a piece.
        cursor: is told where pieces start, if there is a `mark` for the start of the text.
        count: pieces of this text that were read earlier.
    """

    def __init__(self, source: str, limit: int, cursor: Cursor | None = None, count: int = 0):
        self.source, self.limit, self.cursor, self.count = source, limit, cursor, count
        self.held: list[str] = []
        self.length = 0  # characters in `held`
        self.start = 0  # characters before those in `held`
        self.marks: deque[tuple[int, int, dict[str, Any]]] = deque()

    def mark(self, ahead: int, chars: int, place: dict[str, Any]) -> None:
        """State that the character that comes after `ahead` more is number `chars` (from 0) of the lines at `place`."""
        self.marks.append((self.start + self.length + ahead, chars, place))

    def add(self, text: str) -> Iterator[Document]:
        """Append `text` and yield the pieces that are complete."""
        self.held.append(text)
        self.length += len(text)
        if self.length > self.limit:
            joined, start = "".join(self.held), 0
            while len(joined) - start > self.limit:
                stop = _cut(joined, start, self.limit)
                self._tell(self.start + start)
                yield from self._piece(joined[start:stop])
                start = stop
            self.held, self.length = [joined[start:]], len(joined) - start
            self.start += start

    def end(self) -> Iterator[Document]:
        """Yield the last piece."""
        self._tell(self.start)
        return self._piece("".join(self.held))

    def _tell(self, start: int) -> None:
        if self.marks:
            while len(self.marks) > 1 and self.marks[1][0] <= start:
                self.marks.popleft()
            mark, chars, place = self.marks[0]
            self.cursor.at(**place, chars=chars + start - mark, piece=[self.source, self.count])

    def _piece(self, text: str) -> Iterator[Document]:
        self.count += 1
        if text and not text.isspace():
            yield Document(text, self.source if self.count == 1 else f"{self.source} (piece {self.count})")


def cut_long(text: str, source: str, limit: int) -> Iterator[Document]:
    """Yield `text` as one document, or as several of at most `limit` characters."""
    if len(text) <= limit:
        yield Document(text, source)
    else:
        pieces = Pieces(source, limit)
        yield from pieces.add(text)
        yield from pieces.end()


def read_text(
    line_groups: Iterable[Lines], name: str, limit: int, sample_by: str = "document", cursor: Cursor | None = None
) -> Iterator[Document | BadRecord]:
    """Yield the file, its paragraphs or its lines as documents; lines are joined by `\\n`, blank ones are no documents.

    A line that is not UTF-8 makes a bad record of the document it is in: only pieces that were complete before it, of a
    text longer than the limit, are kept.
    """
    cursor = cursor or Cursor()
    inside = cursor.place.get("is_rest", False)  # a line that came in fragments
    drop = cursor.place.get("chars", 0)  # characters that were read earlier
    pieces, lost, is_cut = None, False, "piece" in cursor.place
    if is_cut:
        source, count = cursor.place["piece"]
        pieces = Pieces(source, limit, cursor, count)
    for number, lines, byte, is_fragment in line_groups:
        place = {"byte": byte, "line": number, **({"is_rest": True} if inside else {})}
        end = 0  # characters of these lines so far
        if pieces and not is_cut:
            pieces.mark(0 if inside else 1, 0, place)
        elif not pieces and not lost:
            cursor.at(**place)
        for line in lines:
            start, end = end, end + len(line) + 1
            is_blank = not line or line.isspace()
            if not inside and not is_cut and (sample_by == "line" or (sample_by == "paragraph" and is_blank)):
                if pieces:
                    yield from pieces.end()
                pieces, lost = None, False
            if drop > len(line):
                drop -= len(line) + (not is_fragment)
            elif is_cut:
                pieces.mark(0, start + drop, place)
                yield from pieces.add(line[drop:])
                drop, is_cut = 0, False
            elif is_blank and not inside and sample_by != "document":
                pass
            elif type(line) is bytes:
                if not lost:
                    yield BadRecord(f"{name}:{number}", NOT_UTF8, not_utf8(line))
                pieces, lost = None, True
            elif sample_by == "line" and not inside and not is_fragment:
                yield from cut_long(line, f"{name}:{number}", limit)
            elif pieces:
                yield from pieces.add(line if inside else f"\n{line}")
            elif not lost:
                pieces = Pieces(f"{name}:{number}", limit, cursor)
                pieces.mark(0, start, place)
                yield from pieces.add(line)
            inside = is_fragment
            number += 1
    if pieces:
        yield from pieces.end()


def numbered_lines(
    line_groups: Iterable[Lines],
    name: str,
    on_group: Callable[..., None],
    begin: int = 0,
    keep_blank: bool = False,
) -> Iterator[tuple[int, str | BadRecord]]:
    """Yield lines with their numbers; one that is not UTF-8, or too long for memory, is a bad record.

    Args:
        line_groups: the lines of the file.
        name: file name for messages.
        on_group: called with `byte` and `line` before the lines that start there, and `row`, if some are not yielded.
        begin: number of the first line to yield.
        keep_blank: yield blank lines, too.
    """
    too_long = False
    for number, lines, byte, is_fragment in line_groups:
        if not too_long:
            on_group(byte=byte, line=number, **({"row": begin} if number < begin else {}))
        if number < begin:
            lines, number = lines[begin - number :], min(begin, number + len(lines))
            if not lines:
                continue
        if is_fragment or too_long:
            if not too_long:
                yield number, BadRecord(f"{name}:{number}", f"a line of more than {LONGEST_RECORD >> 20} MiB")
            too_long = is_fragment
            lines, number = lines[1:], number + (not is_fragment)
        for line in lines:
            if type(line) is bytes:
                yield number, BadRecord(f"{name}:{number}", NOT_UTF8, not_utf8(line))
            elif keep_blank or (line and not line.isspace()):
                yield number, line
            number += 1


def read_json_lines(
    line_groups: Iterable[Lines], name: str, text_column: str, limit: int, cursor: Cursor | None = None
) -> Iterator[Document | BadRecord]:
    """Yield the text under `text_column` of every line's object; blank lines are no records.

    If a key is there twice, the last value counts. NaN and Infinity are accepted: only the text is used.

    Args:
        line_groups: the lines of the file.
        name: file name for messages.
        text_column: name of the key in the objects.
        limit: characters of a document.
        cursor: where the lines start.

    Raises:
        UnreadableFile: the file is one JSON value over several lines, or an array.
    """
    cursor = cursor or Cursor()
    raw_decode, is_first = json.JSONDecoder().raw_decode, not cursor.place.get("byte")
    for number, line in numbered_lines(line_groups, name, cursor.at):
        if type(line) is BadRecord:
            yield line
            continue
        if is_first:
            _refuse_one_value(line.strip())
            is_first = False
        try:
            record, end = raw_decode(line)
            text = record[text_column]
            good = end == len(line) and type(text) is str
        except (ValueError, LookupError, TypeError, RecursionError):
            good = False
        if not good:
            yield from _json_record(line, f"{name}:{number}", text_column, limit)
        elif len(text) <= limit and text.isascii() and "\r" not in text and text and not text.isspace():
            yield Document(text, f"{name}:{number}")
        else:
            yield from text_field(text, f"{name}:{number}", limit)


def text_field(text: object, source: str, limit: int) -> Iterator[Document | BadRecord]:
    """Yield the value of a record's text field as documents with `\\n` as line end, or the reason why it is not one."""
    if text is None:
        yield BadRecord(source, "the text is null")
    elif isinstance(text, bytes):
        yield BadRecord(source, NOT_UTF8, not_utf8(text))
    elif not isinstance(text, str):
        yield BadRecord(source, "the text is not a string", f"it is {_kind(text)}")
    elif not text or text.isspace():
        yield BadRecord(source, EMPTY_TEXT)
    else:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            where = f"\\u{ord(text[error.start]):04x} at character {error.start + 1}"
            yield BadRecord(source, "half of a surrogate pair, which no encoding can write", where)
        else:
            yield from cut_long(text.replace("\r\n", "\n").replace("\r", "\n"), source, limit)


def _json_record(line: str, source: str, text_column: str, limit: int) -> Iterator[Document | BadRecord]:
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
        if not isinstance(record, dict):
            yield BadRecord(source, "not a JSON object", f"it is {_kind(record)}")
        elif text_column not in record:
            keys = ", ".join(f"'{key}'" for key in list(record)[:10]) or "none at all"
            yield BadRecord(source, f"no key '{text_column}'", f"its keys are {keys}")
        else:
            yield from text_field(record[text_column], source, limit)


def _refuse_one_value(first_line: str) -> None:
    if first_line == "{":
        raise UnreadableFile("JSON, but one object over several lines", "convert it, e.g. jq -c . a.json > a.jsonl")
    if first_line.startswith("["):
        try:
            value = json.loads(first_line)
        except RecursionError:
            return
        except ValueError:
            value = [{}]  # an array over several lines
        if value and all(isinstance(item, dict) for item in value):
            hint = "convert it, e.g. jq -c '.[]' a.json > a.jsonl"
            raise UnreadableFile("a JSON array, not one object per line", hint)


def _cut(text: str, start: int, limit: int) -> int:
    stop = start + limit
    cut = 1 + max(text.rfind(space, start + limit // 2, stop) for space in (" ", "\n", "\t", "\u3000"))
    return cut or stop


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "true or false"
    names = {type(None): "null", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")
