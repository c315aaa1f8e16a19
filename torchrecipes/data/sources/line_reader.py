"""From the bytes of a file to its numbered lines, a block at a time, in flat memory.

1. The first bytes tell whether it is text at all: UTF-16, gzip, an archive are named for what they are.
2. Line ends: `\\n`, `\\r\\n` and a lone `\\r` end a line, in every format; nothing else (form feed, NEL, U+2028).
   A byte order mark at the start is dropped.
3. Blocks are cut at line ends, decoded at once and split; only a block that is not UTF-8 is decoded line by line.
4. A line longer than a limit comes in fragments, so that one line of a terabyte is no more than a slow file.
"""

import gzip
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

BLOCK = 1 << 20  # bytes read at a time
HEAD = 4096  # bytes that tell what a file is

ARCHIVES = (
    (b"\x1f\x8b", "gzip data", "give it a name that ends in .gz"),
    (b"PK\x03\x04", "a zip archive", "unpack it first"),
    (b"\x28\xb5\x2f\xfd", "zstd data", "unpack it first"),
    (b"\xfd7zXZ\x00", "xz data", "unpack it first"),
    (b"%PDF-", "a PDF", "extract its text first"),
    (b"PAR1\x15", "Parquet data", "give it a name that ends in .parquet"),
)
ENCODINGS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)


class UnreadableFile(Exception):
    """A file that as a whole, or from some point on, is not what its name says: a reason and a detail."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class Lines(NamedTuple):
    """Consecutive lines without their ends; one that is not UTF-8 is bytes.

    `goes_on`: there is one line, and it is a fragment of one that the next `Lines` go on with.
    """

    first: int  # number of the first line, from 1
    lines: list[str | bytes]
    goes_on: bool = False


@contextmanager
def open_blocks(path: str, gzipped: bool, start: int = 0, stop: int | None = None) -> Iterator[Iterator[bytes]]:
    """Open a file, or its bytes from `start` up to `stop`, as an iterator of blocks with `\\n` as the only line end.

    Raises:
        UnreadableFile: from the iterator: it is no UTF-8 text, or its gzip data is damaged.
        OSError: the file cannot be opened or read.
    """
    with open(path, "rb") as raw:
        raw.seek(start)
        if gzipped:
            with gzip.GzipFile(fileobj=raw) as stream:
                yield _one_line_end(_check_head(_unpack(stream)))
        else:
            blocks = _read(raw, stop - start if stop is not None else None)
            yield _one_line_end(blocks if start else _check_head(blocks))


def read_lines(blocks: Iterator[bytes], longest: int, first: int = 1) -> Iterator[Lines]:
    """Yield the lines of `blocks`, as many at a time as the blocks hold.

    Args:
        blocks: bytes with `\\n` as the only line end.
        longest: bytes of a line that are held in memory, at least a block; a longer line comes in fragments of that
            size, which depend on the line only, not on where the blocks begin.
        first: number of the first line.
    """
    assert longest >= BLOCK, "a line inside a block is never a fragment"
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
            lines = _decode(tail[:-1])
            yield Lines(first, lines)
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


def slice_at(path: str, size: int, target: int, separator: bytes) -> list[tuple[int, int, int]]:
    """Cut a file into slices that end after a match of `separator`: (start, stop, number of the first line) of each.

    The file is read once, because a slice has to know the number of its first line.

    Args:
        path: an uncompressed text file of `size` bytes.
        size: bytes of the file, more than 0.
        target: least bytes of a slice.
        separator: regular expression that ends with `\\n`, of three bytes at most.
    """
    pattern = re.compile(separator)
    slices, start, line = [], 0, 1
    with open(path, "rb") as file:
        while start < size:
            stop = _after_match(file, pattern, start + target, size)
            slices.append((start, stop, line))
            line += _count_lines(file, start, stop)
            start = stop
    return slices


def not_utf8(line: bytes) -> str:
    """Return where in a line the first byte is that is not UTF-8."""
    try:
        line.decode()
    except UnicodeDecodeError as error:
        what = "ends inside a character" if error.reason == "unexpected end of data" else "is no part of a character"
        return f"byte {error.start + 1} of the line, 0x{line[error.start]:02x}, {what}"
    raise AssertionError("this line is UTF-8")


def _fragment(tail: bytearray, longest: int, number: int) -> Lines:
    cut = longest
    while cut > longest - 3 and tail[cut] & 0xC0 == 0x80:  # not inside a character
        cut -= 1
    lines = _decode(tail[:cut])
    del tail[:cut]
    return Lines(number, lines, goes_on=True)


def _decode(data: bytes | bytearray) -> list[str | bytes]:
    try:
        return data.decode().split("\n")
    except UnicodeDecodeError:
        return [_decode_line(line) for line in bytes(data).split(b"\n")]


def _decode_line(line: bytes) -> str | bytes:
    try:
        return line.decode()
    except UnicodeDecodeError:
        return line


def _read(file: BinaryIO, size: int | None) -> Iterator[bytes]:
    while block := file.read(BLOCK if size is None else min(BLOCK, size)):
        if size is not None:
            size -= len(block)
        yield block


def _unpack(stream: gzip.GzipFile) -> Iterator[bytes]:
    try:
        while block := stream.read1(BLOCK):
            yield block
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UnreadableFile("damaged or cut short gzip data", str(error)) from error


def _check_head(blocks: Iterator[bytes]) -> Iterator[bytes]:
    head, broken = b"", None
    try:
        for block in blocks:
            head += block
            if len(head) >= HEAD:
                break
    except UnreadableFile as error:
        broken = error
    for magic, what, remedy in ARCHIVES:
        if head.startswith(magic):
            raise UnreadableFile("not text", f"it is {what}: {remedy}")
    for mark, encoding in ENCODINGS:
        if head.startswith(mark):
            raise UnreadableFile("not UTF-8", f"it is {encoding}: convert it, e.g. iconv -f {encoding} -t UTF-8")
    if _looks_like_utf16(head[:HEAD]):
        raise UnreadableFile("not UTF-8", "it looks like UTF-16 without a mark: convert it, e.g. iconv -t UTF-8")
    if head.removeprefix(b"\xef\xbb\xbf"):
        yield head.removeprefix(b"\xef\xbb\xbf")
    if broken:  # what came before the damage is good
        raise broken
    yield from blocks


def _looks_like_utf16(head: bytes) -> bool:
    # Latin letters in UTF-16 have a NUL at every second byte; a run of NULs in a text file has them at all.
    even, odd, half = head[::2].count(0), head[1::2].count(0), len(head) // 2
    return half > 8 and (even > 0.7 * half > 0.1 * half > odd or odd > 0.7 * half > 0.1 * half > even)


def _one_line_end(blocks: Iterator[bytes]) -> Iterator[bytes]:
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


def _after_match(file: BinaryIO, pattern: re.Pattern, position: int, size: int) -> int:
    overlap = 2  # a separator of three bytes may straddle two windows
    position = max(position - overlap, 0)
    while position < size:
        file.seek(position)
        window = file.read(BLOCK)
        if match := pattern.search(window):
            return position + match.end()
        if len(window) < BLOCK:
            break
        position += BLOCK - overlap
    return size


def _count_lines(file: BinaryIO, start: int, stop: int) -> int:
    file.seek(start)
    count, last = 0, b""
    for block in _read(file, stop - start):
        count += block.count(b"\n")
        if b"\r" in block or last == b"\r":
            count += block.count(b"\r") - (last + block).count(b"\r\n")
        last = block[-1:]
    return count
