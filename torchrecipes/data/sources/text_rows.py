"""`TextRows`: one text for every line, record or row, empty ones included, so that results stay aligned with them."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, NamedTuple

from torchrecipes.data.sources.line_reader import (
    LONGEST_RECORD,
    NOT_UTF8,
    Lines,
    UnreadableFile,
    numbered_lines,
    open_blocks,
    read_lines,
)
from torchrecipes.data.sources.record_columns import RecordColumns
from torchrecipes.data.sources.records import BadRecord
from torchrecipes.data.sources.text_column import EMPTY_TEXT, checked_text
from torchrecipes.data.sources.text_files import files
from torchrecipes.errors import UserError

STDIN = "-"


@dataclass
class TextRows:
    """The texts of a file, or of standard input, in order. Nothing is skipped: an empty row is an empty text.

    Args:
        path: lines of text, .jsonl, .csv, .tsv or .parquet; all but Parquet may be compressed. `-`: lines of standard
            input. Or a folder or pattern of files of one kind.
        text_column: key or column of the text.
        pair_column: that of a second text: rows are pairs then. None: they are texts.
        on_bad_row: "stop" raises at a line that is not UTF-8, or a value that is no text; "empty" counts it and yields
            an empty text. A file that is not JSON lines or a table as its name says is always an error.

    Attributes:
        num_bytes: size of the files as stored; None for standard input.
        num_bad, first_bad: rows that "empty" has counted so far, and the first one.

    Raises:
        UserError: no such file; plain text beside tables (code `mixed_formats`) or for pairs (`no_pairs`); when it is
            read, a row without a text (`bad_record`).
    """

    path: str
    text_column: str = "text"
    pair_column: str | None = None
    on_bad_row: Literal["stop", "empty"] = "stop"

    def __post_init__(self):
        self.num_bytes, self.num_bad, self.first_bad = None, 0, ""
        if self.path == STDIN:
            self._check_pairs(is_plain=True)
            return
        self._files = files(self.path, text_column=self.text_column, sample_by="line")
        formats = {file.format for file in self._files.found}
        if "text" in formats and len(formats) > 1:
            problem = f"{self.path} has plain text beside {', '.join(sorted(formats - {'text'}))}"
            raise UserError(problem, key="path", hint="Give files of one kind.", code="mixed_formats")
        self._is_plain = formats == {"text"}
        self._check_pairs(self._is_plain)
        self.num_bytes = self._files.num_bytes

    def __iter__(self) -> Iterator[Any]:
        self.num_bad, self.first_bad = 0, ""
        if self.path == STDIN:
            return self._stdin_lines()
        if self._is_plain:
            return self._lines()
        if self.pair_column is None:
            columns = RecordColumns({self.text_column: "text_column"}, self._row)
            return (row.text for row in self._files.records(columns))
        columns = RecordColumns({self.text_column: "text_column", self.pair_column: "pair_column"}, self._row)
        return ((row.text, row.pair) for row in self._files.records(columns))

    def _check_pairs(self, is_plain: bool) -> None:
        if is_plain and self.pair_column is not None:
            hint = "Give .jsonl, .csv, .tsv or .parquet."
            raise UserError("lines of text are no pairs", key="pair_column", hint=hint, code="no_pairs")

    def _bad(self, row: BadRecord) -> bool:
        """Counts a row that is to be taken as empty; False: it is an error."""
        if self.on_bad_row == "stop":
            return False
        self.num_bad += 1
        self.first_bad = self.first_bad or str(row)
        return True

    def _row(self, values: Sequence[Any], source: str) -> "_Row | BadRecord":
        texts = []
        for value in values:
            text = checked_text(value, source)
            if isinstance(text, BadRecord):
                if text.reason != EMPTY_TEXT and value is not None and not self._bad(text):
                    return text
                text = ""
            texts.append(text)
        return _Row(texts[0], source, texts[-1])

    def _lines(self) -> Iterator[str]:
        for file in self._files.found:
            try:
                with open_blocks(file.path, file.compression) as blocks:
                    groups = read_lines(blocks, LONGEST_RECORD)
                    for group in groups:
                        if not group.is_fragment and bytes not in map(type, group.lines):
                            yield from group.lines  # one by one would take as long as to tokenize short lines
                        else:
                            yield from self._checked(
                                chain([group], groups) if group.is_fragment else [group], file.name
                            )
            except UnreadableFile as error:
                raise UserError(f"{file.name}: {error.reason} {error.detail}".rstrip(), code="bad_record") from None

    def _checked(self, groups: Iterable[Lines], name: str) -> Iterator[str]:
        """Lines of which some are not UTF-8 or too long."""
        for _, line in numbered_lines(groups, name, _ignore, keep_blank=True):
            if isinstance(line, BadRecord):
                if not self._bad(line):
                    raise UserError(str(line), hint="Convert the file to UTF-8.", code="bad_record")
                line = ""
            yield line

    def _stdin_lines(self) -> Iterator[str]:
        if sys.stdin is None:  # Python's, where the shell has closed it
            raise UserError("standard input is closed", key="--input", code="no_input")
        # As in a file, a lone carriage return ends a line, too.
        ended = (block.removesuffix(b"\n").removesuffix(b"\r") for block in sys.stdin.buffer)
        for number, line in enumerate((part for block in ended for part in block.split(b"\r")), start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                problem = f"line {number} of standard input is not UTF-8"
                if not self._bad(BadRecord(f"standard input:{number}", NOT_UTF8)):
                    raise UserError(problem, hint="Convert it, e.g. with iconv.", code="bad_record") from None
                text = ""
            yield text


class _Row(NamedTuple):
    text: str
    source: str
    pair: str


def _ignore(**_: Any) -> None:
    pass
