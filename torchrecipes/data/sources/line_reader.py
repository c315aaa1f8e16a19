"""Reads a file as numbered lines, block by block, in constant memory.

1. The first bytes tell whether it is text at all: UTF-16, archives, PDF, databases and other formats are named.
2. Line ends: `\\n`, `\\r\\n` and a lone `\\r` end a line, in every format; nothing else does (form feed, NEL, U+2028).
   A byte order mark at the start is dropped.
3. Blocks are cut at line ends, decoded at once and split; only a block that is not UTF-8 is decoded line by line.
4. A line longer than a limit comes in fragments, so a line of a terabyte takes no more memory than any other.

Why not a library: `datasets`' text loader and `pyarrow.csv` split at other characters, stop at the first byte that is
not UTF-8 without its line, or hold a long line in memory.
"""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

BLOCK = 1 << 20  # bytes read at a time
HEAD = 4096  # bytes that tell what a file is

UNPACK = "unpack it first"
EXPORT = "export its text to .txt, .jsonl, .csv or .parquet first"
FORMATS = (  # offset, first bytes, what it is, what to do
    (0, b"\x1f\x8b", "gzip data", "give it a name that ends in .gz"),
    (0, b"PAR1\x15", "Parquet data", "give it a name that ends in .parquet"),
    (0, b"ARROW1\x00\x00", "an Arrow file", "convert it to Parquet, or read a folder of datasets with hf_dataset"),
    (0, b"\xff\xff\xff\xff", "an Arrow stream", "read its folder with hf_dataset"),
    (0, b"\x28\xb5\x2f\xfd", "zstd data", "unpack it first: zstd -d FILE"),
    (0, b"\xfd7zXZ\x00", "xz data", "unpack it first: xz -d FILE"),
    (4, b"1AY&SY", "bzip2 data", "unpack it first: bzip2 -d FILE"),
    (0, b"\x04\x22\x4d\x18", "lz4 data", UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (0, b"Rar!\x1a\x07", "a RAR archive", UNPACK),
    (257, b"ustar\x00", "a tar archive", UNPACK),
    (257, b"ustar  \x00", "a tar archive", UNPACK),
    (0, b"PK\x03\x04", "a zip archive", UNPACK),
    (0, b"%PDF-", "a PDF", "extract its text first, e.g. pdftotext"),
    (0, b"{\\rtf1", "an RTF document", EXPORT),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document (.doc, .xls)", EXPORT),
    (0, b"SQLite format 3\x00", "an SQLite database", EXPORT),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file", EXPORT),
    (0, b"\x93NUMPY", "a NumPy array", EXPORT),
    (0, b"Obj\x01", "an Avro file", "convert it to Parquet"),
    (0, b"GGUF\x03\x00\x00\x00", "a GGUF model", "it holds no text"),
    (0, b"\x7fELF", "a program", "it holds no text"),
    (0, b"\x89PNG\r\n", "a PNG image", "it holds no text"),
    (0, b"\xff\xd8\xff", "a JPEG image", "it holds no text"),
)
ZIP_CONTENTS = (  # names of the first files in a zip archive
    (b"word/", "a Word document (.docx)"),
    (b"xl/", "an Excel workbook (.xlsx)"),
    (b"[Content_Types].xml", "an Office document (.docx, .xlsx, .pptx)"),
    (b"application/epub", "an EPUB book"),
    (b"application/vnd.oasis", "an OpenDocument file (.odt, .ods)"),
)
ENCODINGS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
MARK = b"\xef\xbb\xbf"  # a byte order mark in UTF-8


class UnreadableFile(Exception):
    """A file that, from its start or some point on, is not what its name says: a reason and a detail."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class Lines(NamedTuple):
    """Consecutive lines without their ends; a line that is not UTF-8 is bytes.

    `is_fragment`: there is one line, and the next `Lines` continue it.
    """

    first: int  # number of the first line, from 1
    lines: list[str | bytes]
    is_fragment: bool = False


@contextmanager
def open_blocks(path: str, gzipped: bool = False) -> Iterator[Iterator[bytes]]:
    """Open a file as an iterator of blocks with `\\n` as the only line end.

    Raises:
        UnreadableFile: from the iterator: it is not UTF-8 text, or its gzip data is corrupt.
        OSError: the file cannot be opened or read.
    """
    with open(path, "rb") as raw:
        if gzipped:
            with gzip.GzipFile(fileobj=raw) as stream:
                yield _unify_line_ends(_check_head(_unpack(stream)))
        else:
            yield _unify_line_ends(_check_head(_read(raw)))


def read_lines(blocks: Iterator[bytes], longest: int) -> Iterator[Lines]:
    """Yield the lines of `blocks`, as many at a time as the blocks hold.

    Args:
        blocks: bytes with `\\n` as the only line end.
        longest: bytes of a line that are held in memory, at least a block; a longer line comes in fragments of that
            size, which depend on the line only, not on where the blocks begin.
    """
    assert longest >= BLOCK, "a line inside a block is never a fragment"
    first = 1
    tail = bytearray()
    for block in blocks:
        end = block.find(b"\n")
        if end < 0:
            tail += block
            while len(tail) > longest:
                yield _fragment(tail, longest, first)
            continue
        if len(tail) + end > longest:
            tail += block[: end + 1]
            block = block[end + 1 :]
            while len(tail) - 1 > longest:
                yield _fragment(tail, longest, first)
            yield Lines(first, _decode(tail[:-1]))
            first += 1
            tail.clear()
        last = block.rfind(b"\n")
        if last >= 0:
            lines = _decode(tail + block[:last] if tail else block[:last])
            yield Lines(first, lines)
            first += len(lines)
        tail = bytearray(block[last + 1 :]) if last >= 0 else tail + block
    while len(tail) > longest:
        yield _fragment(tail, longest, first)
    if tail:
        yield Lines(first, _decode(tail))


def not_utf8(line: bytes) -> str:
    """Return where the first byte of a line is that is not UTF-8."""
    try:
        line.decode()
    except UnicodeDecodeError as error:
        what = "ends inside a character" if error.reason == "unexpected end of data" else "is no part of a character"
        return f"byte {error.start + 1} of the line, 0x{line[error.start]:02x}, {what}"
    raise AssertionError("this line is UTF-8")


def describe_format(head: bytes) -> tuple[str, str] | None:
    """Return what a file that begins with `head` is and what to do with it, or None where it may be text."""
    for offset, magic, what, remedy in FORMATS:
        if head[offset : offset + len(magic)] == magic:
            if what == "a zip archive":
                office = next((name for content, name in ZIP_CONTENTS if content in head), None)
                return (office, EXPORT) if office else (what, remedy)
            return what, remedy
    return None


def _fragment(tail: bytearray, longest: int, number: int) -> Lines:
    cut = longest
    while cut > longest - 3 and tail[cut] & 0xC0 == 0x80:  # not inside a character
        cut -= 1
    lines = _decode(tail[:cut])
    del tail[:cut]
    return Lines(number, lines, is_fragment=True)


def _decode(data: bytes | bytearray) -> list[str | bytes]:
    try:
        return data.decode().split("\n")
    except UnicodeDecodeError:
        return [decode_or_keep(line) for line in bytes(data).split(b"\n")]


def decode_or_keep(line: bytes) -> str | bytes:
    """Return a line as text, or as it is where it is not UTF-8."""
    try:
        return line.decode()
    except UnicodeDecodeError:
        return line


def _read(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(BLOCK):
        yield block


def _unpack(stream: gzip.GzipFile) -> Iterator[bytes]:
    try:
        while block := stream.read1(BLOCK):
            yield block
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UnreadableFile("corrupt or truncated gzip data", str(error)) from error


def _check_head(blocks: Iterator[bytes]) -> Iterator[bytes]:
    head, broken = b"", None
    try:
        for block in blocks:
            head += block
            if len(head) >= HEAD:
                break
    except UnreadableFile as error:
        broken = error
    for mark, encoding in ENCODINGS:
        if head.startswith(mark):
            raise UnreadableFile("not UTF-8", f"it is {encoding}: convert it, e.g. iconv -f {encoding} -t UTF-8")
    if known := describe_format(head):
        raise UnreadableFile("not text", f"it is {': '.join(known)}")
    if _looks_like_utf16(head[:HEAD]):
        raise UnreadableFile("not UTF-8", "it looks like UTF-16 without a mark: convert it, e.g. iconv -t UTF-8")
    if head.removeprefix(MARK):
        yield head.removeprefix(MARK)
    if broken:  # the text before the damage is good
        raise broken
    yield from blocks


def _looks_like_utf16(head: bytes) -> bool:
    # Latin letters in UTF-16 have a NUL at every second byte; a run of NULs in a text file has them everywhere.
    even, odd, half = head[::2].count(0), head[1::2].count(0), len(head) // 2
    return half > 8 and (even > 0.7 * half > 0.1 * half > odd or odd > 0.7 * half > 0.1 * half > even)


def _unify_line_ends(blocks: Iterator[bytes]) -> Iterator[bytes]:
    held = b""
    for block in blocks:
        if held or b"\r" in block:
            block = held + block
            held = b""
            if block.endswith(b"\r"):  # half of a \r\n, maybe
                block, held = block[:-1], b"\r"
            block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if block:
            yield block
    if held:
        yield b"\n"
