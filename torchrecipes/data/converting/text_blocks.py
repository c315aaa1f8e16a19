"""`TextBlocks`: paragraphs, code, lists and tables as plain text, written block by block by the converters."""

import re

DEEPEST = 30  # levels of nesting that are indented; what is nested deeper is written at the last of them
FENCE = re.compile(r"^[ \t]*(`{3,})", re.MULTILINE)


class TextBlocks:
    """Collects blocks with a blank line between them.

    Text inside a block comes in pieces (`add`); white space in it is collapsed, as a browser does. A list item, a quote
    or a definition is a prefix of all lines inside it (`open`, `close`). Items of one paragraph each have no blank line
    between them.
    """

    def __init__(self):
        self.lines: list[str] = []
        self.pieces: list[str] = []  # of the current paragraph, a line each
        self.prefixes: list[list] = []  # (of the next line, of the lines after it, whether there were lines)
        self.after_item = False  # the last block is the first of a list item

    def add(self, text: str) -> None:
        """Appends text to the current paragraph."""
        if self.pieces:
            self.pieces[-1] += text
        else:
            self.pieces.append(text)

    def end_line(self) -> None:
        """Ends a line inside the current paragraph."""
        if self.pieces:
            self.pieces.append("")

    def end_paragraph(self, mark: str = "", joined: bool = False) -> bool:
        """Writes the current paragraph if it has text, and returns whether it had.

        Args:
            mark: text before it, as `## ` of a heading.
            joined: without a blank line before it, as in the rows of a table.
        """
        lines = [line for piece in self.pieces if (line := " ".join(piece.split()))]
        self.pieces = []
        if lines:
            self._write([mark + lines[0], *lines[1:]], joined)
        return bool(lines)

    def code(self, text: str, language: str = "") -> None:
        """Writes a block of code between fences, verbatim."""
        self.end_paragraph()
        lines = text.replace("\r\n", "\n").replace("\r", "\n").rstrip().split("\n")
        while lines and not lines[0].strip():
            del lines[0]
        if lines:
            fence = "`" * max([3, *(len(found) + 1 for found in FENCE.findall(text))])
            self._write([fence + language, *lines, fence])

    def open(self, first: str, rest: str) -> None:
        """Begins a prefix: `first` of the first line, `rest` of those after it."""
        self.end_paragraph()
        self.prefixes.append([first, rest, False] if len(self.prefixes) < DEEPEST else ["", "", True])

    def close(self) -> None:
        """Ends the last prefix."""
        self.end_paragraph()
        self.prefixes.pop()

    def text(self) -> str:
        """Returns all blocks, with a line end after the last one; nothing if there are none."""
        self.end_paragraph()
        return "\n".join([*self.lines, ""]) if self.lines else ""

    def _write(self, lines: list[str], joined: bool = False) -> None:
        starts_item = any(first != rest for first, rest, _ in self.prefixes)
        if self.lines and not joined and not (starts_item and self.after_item):
            self.lines.append("".join(rest for _, rest, used in self.prefixes if used).rstrip())
        for line in lines:
            before = "".join(first for first, _, _ in self.prefixes)
            for prefix in self.prefixes:
                prefix[0], prefix[2] = prefix[1], True
            self.lines.append(before + line if line else before.rstrip())
        self.after_item = starts_item
