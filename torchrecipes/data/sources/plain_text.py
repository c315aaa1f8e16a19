"""Turns the lines of plain text into documents: files, paragraphs, lines, or what stands between separators."""

from collections.abc import Iterable, Iterator

from torchrecipes.data.sources.line_reader import NOT_UTF8, Lines, not_utf8
from torchrecipes.data.sources.pieces import Pieces, cut_long
from torchrecipes.data.sources.records import BadRecord, Cursor, Document


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


def read_separated(
    line_groups: Iterable[Lines], name: str, limit: int, separator: str, cursor: Cursor | None = None
) -> Iterator[Document | BadRecord]:
    """Yield what stands between separators as documents, without the line ends at its start and end.

    Args:
        line_groups: the lines of the file.
        name: file name for messages.
        limit: characters of a document.
        separator: characters that may stand in a line; with a line end at its start or end, a line of its own.
        cursor: where the lines start, and where documents and pieces do.
    """
    cursor = cursor or Cursor()
    inside = cursor.place.get("is_rest", False)
    drop = cursor.place.get("chars", 0)
    pieces, lost, is_cut = None, False, "piece" in cursor.place
    if is_cut:
        source, count = cursor.place["piece"]
        pieces = Pieces(source, limit, cursor, count)
    stripped, newlines = separator.strip("\n"), 0  # line ends before the text that comes next
    for number, lines, byte, is_fragment in line_groups:
        place = {"byte": byte, "line": number, **({"is_rest": True} if inside else {})}
        end = 0
        if pieces and not is_cut:
            pieces.mark(newlines + (not inside), 0, place)
        elif not pieces and not lost:
            cursor.at(**place)
        for line in lines:
            newlines += not inside
            is_damaged = type(line) is bytes
            if is_damaged:
                line = line.decode("utf-8", "surrogateescape")
            start, end = end, end + len(line) + 1
            if drop > len(line):
                drop -= len(line) + (not is_fragment)
                parts = []
            elif stripped == separator:
                parts = line[drop:].split(separator)
            else:
                parts = ["", ""] if line == stripped and not inside and not is_fragment else [line[drop:]]
            if parts and is_cut:
                pieces.mark(0, start + drop, place)
                start, drop, newlines = start + drop, 0, 0
            for index, part in enumerate(parts):
                if index:
                    if pieces:
                        yield from pieces.end()
                    pieces, lost = None, False
                if is_cut or (part and pieces and not (is_damaged and _is_escaped(part))):
                    yield from pieces.add("\n" * newlines + part)
                    newlines, is_cut = 0, False
                elif part and is_damaged and _is_escaped(part):
                    if not lost:
                        yield BadRecord(f"{name}:{number}", NOT_UTF8, not_utf8(line.encode(errors="surrogateescape")))
                    pieces, lost = None, True
                elif part and not lost:
                    pieces, newlines = Pieces(f"{name}:{number}", limit, cursor), 0
                    pieces.mark(0, start, place)
                    yield from pieces.add(part)
                start += len(part) + len(separator)
            inside = is_fragment
            number += 1
    if pieces:
        yield from pieces.end()


def _is_escaped(text: str) -> bool:
    return not text.isascii() and any("\udc80" <= character <= "\udcff" for character in text)
