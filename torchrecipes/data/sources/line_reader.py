"""Reads a file as numbered lines, block by block, in constant memory.

1. The first bytes tell whether it is text at all: UTF-16, archives, PDF, databases and other formats are named.
2. Line ends: `\\n`, `\\r\\n` and a lone `\\r` end a line, in every format; nothing else does (form feed, NEL, U+2028).
   A byte order mark at the start is dropped.
3. Blocks are cut at line ends, decoded at once and split; only a block that is not UTF-8 is decoded line by line.
4. A line longer than a limit comes in fragments, so a line of a terabyte takes no more memory than any other.
5. Every group of lines carries the byte at which it starts, from which reading can start again.

Why not a library: `datasets`' text loader and `pyarrow.csv` split at other characters, stop at the first byte that is
not UTF-8 without its line, or hold a long line in memory.
"""

import gzip
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from itertools import chain
from typing import BinaryIO, NamedTuple

from torchrecipes.data.sources.records import BadRecord

BLOCK = 1 << 20  # bytes read at a time
HEAD = 4096  # bytes that tell what a file is
LONGEST_RECORD = 256 << 20  # bytes of a record that must be in memory to be parsed: JSON, a row of a table

NOT_UTF8 = "not UTF-8"
TOO_LONG = f"a record of more than {LONGEST_RECORD >> 20} MiB"

UNPACK = "unpack it first"
EXPORT = "export its text to .txt, .jsonl, .csv or .parquet first"
FORMATS = (  # offset, first bytes, what it is, what to do
    (0, b"\x1f\x8b", "gzip data", "give it a name that ends in .gz"),
    (0, b"PAR1\x15", "Parquet data", "give it a name that ends in .parquet"),
    (0, b"ARROW1\x00\x00", "an Arrow file", "convert it to Parquet, or read a folder of datasets with hf_dataset"),
    (0, b"\xff\xff\xff\xff", "an Arrow stream", "read its folder with hf_dataset"),
    (0, b"\x28\xb5\x2f\xfd", "zstd data", "give it a name that ends in .zst"),
    (0, b"\xfd7zXZ\x00", "xz data", "give it a name that ends in .xz"),
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
COMPRESSIONS = {".gz": "gzip", ".xz": "xz", ".zst": "zstd"}  # by the end of a file's name
ZSTD_BLOCK = 1 << 16  # bytes: of corrupt data, the last block is lost


class UnreadableFile(Exception):
    """A file that, from its start or some point on, is not what its name says: a reason and a detail."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class Block(NamedTuple):
    """Bytes of a file with `\\n` as the only line end.

    Positions in the (unpacked) file: where the block starts and stops, and where its second line starts, if it has one.
    """

    data: bytes
    start: int
    stop: int
    second_line: int


class Lines(NamedTuple):
    """Consecutive lines without their ends; a line that is not UTF-8 is bytes.

    `is_fragment`: there is one line, and the next `Lines` continue it.
    """

    first: int  # number of the first line, from 1
    lines: list[str | bytes]
    byte: int  # position in the file (unpacked) at which they start
    is_fragment: bool = False


@contextmanager
def open_blocks(path: str, compression: str | None = None, start: int = 0) -> Iterator[Iterator[Block]]:
    """Open a file as an iterator of blocks with `\\n` as the only line end.

    Args:
        path: the file.
        compression: "gzip", "xz", "zstd" or None.
        start: the position to read from, in unpacked bytes: the start of a line. Where nothing is compressed, the bytes
            before it are not read.

    Raises:
        UnreadableFile: from the iterator: it is not UTF-8 text, or its compressed data is corrupt.
        OSError: the file cannot be opened or read.
    """
    with open(path, "rb") as raw:
        if compression is None:
            raw.seek(start)
            # The first block ends where one of a reader from the start does, so that both name the same places.
            blocks = chain([raw.read(BLOCK - start % BLOCK)], _read(raw.read))
            yield _unify_line_ends(blocks if start else _check_head(blocks), start)
        else:
            with closing(_decompressor(raw, compression)) as stream:
                blocks = _unpack(stream, compression)
                yield _unify_line_ends(_drop(blocks, start) if start else _check_head(blocks), start)


def read_lines(blocks: Iterator[Block], longest: int, first: int = 1, separator: bytes = b"") -> Iterator[Lines]:
    """Yield the lines of `blocks`, as many at a time as the blocks hold.

    Args:
        blocks: what `open_blocks` gives.
        longest: bytes of a line that are held in memory, at least a block; a longer line comes in fragments of that
            size, which depend on the line only, not on where the blocks begin.
        first: number of the first line.
        separator: a fragment does not end inside these bytes.
    """
    assert longest >= BLOCK, "a line inside a block is never a fragment"
    tail, start = bytearray(), 0

    def fragments(keep: int) -> Iterator[Lines]:
        nonlocal start
        while len(tail) > longest + keep:
            cut = _fragment_end(tail, longest, separator)
            yield Lines(first, _decode(tail[:cut]), start, is_fragment=True)
            start += cut
            del tail[:cut]

    for block, block_start, stop, second_line in blocks:
        if not tail:
            start = block_start
        end = block.find(b"\n")
        if end < 0:
            tail += block
            yield from fragments(0)
            continue
        if len(tail) + end > longest:
            tail += block[: end + 1]
            block = block[end + 1 :]
            yield from fragments(1)
            yield Lines(first, _decode(tail[:-1]), start)
            first += 1
            start = second_line
            tail.clear()
        last = block.rfind(b"\n")
        if last >= 0:
            lines = _decode(tail + block[:last] if tail else block[:last])
            yield Lines(first, lines, start)
            first += len(lines)
            tail.clear()
        tail += block[last + 1 :]
        start = stop - len(tail)  # there is no line end in the tail, so nothing in it was changed
    yield from fragments(0)
    if tail:
        yield Lines(first, _decode(tail), start)


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
                yield number, BadRecord(f"{name}:{number}", TOO_LONG)
            too_long = is_fragment
            lines, number = lines[1:], number + (not is_fragment)
        for line in lines:
            if type(line) is bytes:
                yield number, BadRecord(f"{name}:{number}", NOT_UTF8, not_utf8(line))
            elif keep_blank or (line and not line.isspace()):
                yield number, line
            number += 1


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


def _fragment_end(tail: bytearray, longest: int, separator: bytes) -> int:
    cut = longest
    while cut > longest - 3 and tail[cut] & 0xC0 == 0x80:  # not inside a character
        cut -= 1
    inside = (size for size in range(1, len(separator)) if tail[cut - size : cut] == separator[:size])
    return cut - max(inside, default=0)


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


def _read(read: Callable[[int], bytes], size: int | None = None) -> Iterator[bytes]:
    while block := read(size or BLOCK):
        yield block


def _decompressor(raw: BinaryIO, compression: str):
    if compression == "gzip":
        return gzip.GzipFile(fileobj=raw)
    if compression == "xz":
        return lzma.LZMAFile(raw)
    import pyarrow

    return pyarrow.CompressedInputStream(raw, "zstd")


def _unpack(stream, compression: str) -> Iterator[bytes]:
    try:
        if compression == "zstd":
            yield from _read(stream.read, ZSTD_BLOCK)
        else:
            yield from _read(stream.read1)
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the disk's, not the file's
            raise
        raise UnreadableFile(f"corrupt or truncated {compression} data", str(error)) from error


def _drop(blocks: Iterator[bytes], count: int) -> Iterator[bytes]:
    for block in blocks:
        if count < len(block):
            yield block[count:]
        count = max(0, count - len(block))


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
    if head:
        yield head
    if broken:  # the text before the damage is good
        raise broken
    yield from blocks


def _looks_like_utf16(head: bytes) -> bool:
    # Latin letters in UTF-16 have a NUL at every second byte; a run of NULs in a text file has them everywhere.
    even, odd, half = head[::2].count(0), head[1::2].count(0), len(head) // 2
    return half > 8 and (even > 0.7 * half > 0.1 * half > odd or odd > 0.7 * half > 0.1 * half > even)


def _unify_line_ends(blocks: Iterator[bytes], position: int) -> Iterator[Block]:
    held = b""
    for block in blocks:
        start = position - len(held)
        position += len(block)
        if not start and block.startswith(MARK):
            block, start = block[len(MARK) :], len(MARK)
        second_line = start + block.find(b"\n") + 1
        if held or b"\r" in block:
            block = held + block
            held = b""
            if block.endswith(b"\r"):  # half of a \r\n, maybe
                block, held = block[:-1], b"\r"
            first_end = min((end for end in (block.find(b"\n"), block.find(b"\r")) if end >= 0), default=0)
            second_line = start + first_end + (2 if block[first_end : first_end + 2] == b"\r\n" else 1)
            block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if block:
            yield Block(block, start, position - len(held), second_line)
    if held:
        yield Block(b"\n", position - 1, position, position)
