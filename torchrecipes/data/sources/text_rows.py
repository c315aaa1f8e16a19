"""`TextRows`: one text for every line, record or row, empty ones included, so that results stay aligned with them."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torchrecipes.data.sources.line_reader import (
    LONGEST_RECORD,
    UnreadableFile,
    numbered_lines,
    open_blocks,
    read_lines,
)
from torchrecipes.data.sources.record_columns import RecordColumns
from torchrecipes.data.sources.records import BadRecord, Document
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

    Attributes:
        num_bytes: size of the files as stored; None for standard input.

    Raises:
        UserError: no such file; plain text beside tables (code `mixed_formats`); when it is read, a row without a text
            (`bad_record`).
    """

    path: str
    text_column: str = "text"

    def __post_init__(self):
        self.num_bytes = None
        if self.path == STDIN:
            return
        self._files = files(self.path, text_column=self.text_column, sample_by="line")
        formats = {file.format for file in self._files.found}
        if "text" in formats and len(formats) > 1:
            problem = f"{self.path} has plain text beside {', '.join(sorted(formats - {'text'}))}"
            raise UserError(problem, key="path", hint="Give files of one kind.", code="mixed_formats")
        self._is_plain = formats == {"text"}
        self.num_bytes = self._files.num_bytes

    def __iter__(self) -> Iterator[str]:
        if self.path == STDIN:
            return _stdin_lines()
        if self._is_plain:
            return self._lines()
        columns = RecordColumns({self.text_column: "text_column"}, _text_or_empty)
        return (document.text for document in self._files.records(columns))

    def _lines(self) -> Iterator[str]:
        for file in self._files.found:
            try:
                with open_blocks(file.path, file.compression) as blocks:
                    lines = numbered_lines(read_lines(blocks, LONGEST_RECORD), file.name, _ignore, keep_blank=True)
                    for _, line in lines:
                        if isinstance(line, BadRecord):
                            raise UserError(str(line), hint="Convert the file to UTF-8.", code="bad_record")
                        yield line
            except UnreadableFile as error:
                raise UserError(f"{file.name}: {error.reason} {error.detail}".rstrip(), code="bad_record") from None


def _text_or_empty(values: Sequence[Any], source: str) -> Document | BadRecord:
    text = checked_text(values[0], source)
    if isinstance(text, BadRecord):
        return Document("", source) if text.reason == EMPTY_TEXT or values[0] is None else text
    return Document(text, source)


def _stdin_lines() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            problem = f"line {number} of standard input is not UTF-8"
            raise UserError(problem, hint="Convert it, e.g. with iconv.", code="bad_record") from None


def _ignore(**_: Any) -> None:
    pass
