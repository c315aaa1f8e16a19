"""Cuts a text that is longer than a limit into documents, at white space where there is any; nothing is dropped."""

from collections import deque
from collections.abc import Iterator
from typing import Any

from torchrecipes.data.sources.records import Cursor, Document


class Pieces:
    """Cuts one text, which comes in any number of strings, into documents of at most `limit` characters.

    A cut is after the last white space in the second half of what fits, or else where the limit is. The pieces joined
    are the text, except that pieces of white space alone are dropped. The cuts depend on the text only.

    Args:
        source: where the text is, for its documents.
        limit: characters of a piece.
        cursor: records where pieces start, if there is a `mark` for the start of the text.
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


def _cut(text: str, start: int, limit: int) -> int:
    stop = start + limit
    cut = 1 + max(text.rfind(space, start + limit // 2, stop) for space in (" ", "\n", "\t", "\u3000"))
    return cut or stop
