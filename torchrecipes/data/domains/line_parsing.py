"""`parse_lines`: from a buffer of lines to domain names, many at a time.

What `name_syntax` says of a line, in numpy, on pieces that fit a core's cache:

1. A table turns upper case into lower case and every character that a name cannot have into 0 (`bytes.translate`).
2. The places of line ends, dots, hyphens and zeros say nearly all. A line is plain if there is no zero in it, no two of
   the others follow each other, but for two hyphens and for a dot at its end, its labels and itself are short enough,
   and no digit begins the last label.
3. A line that is not plain goes through `parse_name`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from torchrecipes.data.domains.hashing import hash_words, name_hashes, words_of
from torchrecipes.data.domains.name_syntax import (
    MAX_LABEL,
    MAX_LINE,
    MAX_NAME,
    REASONS,
    NameOptions,
    Rejected,
    is_punycode,
    parse_name,
)
from torchrecipes.data.domains.public_suffix_list import PublicSuffixList, default_list
from torchrecipes.data.domains.suffix_table import PADDING

PIECE = 1 << 18  # bytes
EXAMPLES = 5  # per reason and buffer
EXAMPLE_CHARACTERS = 80
DOT, HYPHEN, END, ZERO, NINE = (ord(character) for character in ".-\n09")
BEFORE, AFTER = b"\0" * (PADDING - 1) + b"\n", b"\0" * PADDING  # around a piece: the end of a line before the first


def _plain_characters(more: str) -> bytes:
    table = bytearray(256)
    for character in ".-\nabcdefghijklmnopqrstuvwxyz0123456789" + more:
        table[ord(character.upper())] = table[ord(character)] = ord(character)
    return bytes(table)


PLAIN = {"reject": _plain_characters(""), "accept": _plain_characters("_")}
CODES = {reason: code for code, reason in enumerate(REASONS)}


class RejectedLines(NamedTuple):
    """Lines that were rejected for one reason: how many, and the first ones with their numbers from 0."""

    count: int
    examples: list[tuple[int, str]]


@dataclass
class ParsedNames:
    """The names of a buffer of lines, in the order of the lines.

    Attributes:
        characters: lower-case ASCII of all names, one after the other, `[C]` uint8.
        lengths: characters of each name, `[D]` int64.
        suffix_starts: characters of each name before its public suffix, at least 2, `[D]` int64.
        line_numbers: the line of each name, from 0, `[D]` int64.
        hashes: `name_hashes` of the names, `[D]` uint64.
        rejected: for each reason that occurred (a key of `REASONS`), the number of lines and examples.
        rejected_lines: the numbers of the rejected lines, ascending, `[R]` int64.
        rejected_reasons: their reasons, as indices into the keys of `REASONS`, `[R]` uint8.
    """

    characters: np.ndarray
    lengths: np.ndarray
    suffix_starts: np.ndarray
    line_numbers: np.ndarray
    hashes: np.ndarray
    rejected: dict[str, RejectedLines]
    rejected_lines: np.ndarray
    rejected_reasons: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def names(self) -> list[str]:
        """Return the names as strings."""
        text, ends = self.characters.tobytes().decode("ascii"), np.cumsum(self.lengths).tolist()
        return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def select(self, mask: np.ndarray) -> "ParsedNames":
        """Return the names where `mask`, `[D]` bool, is true; what was rejected stays."""
        if mask.all():
            return self
        characters = self.characters[np.repeat(mask, self.lengths)]
        arrays = (array[mask] for array in (self.lengths, self.suffix_starts, self.line_numbers, self.hashes))
        return ParsedNames(characters, *arrays, self.rejected, self.rejected_lines, self.rejected_reasons)


def parse_lines(
    data: bytes | np.ndarray,
    options: NameOptions | None = None,
    psl: PublicSuffixList | None = None,
) -> ParsedNames:
    """Return the names of all lines of a buffer; each is what `parse_name` gives.

    Args:
        data: complete lines that end in `\\n` (the last one may lack it), as bytes or `[N]` uint8.
        options: what is removed and accepted; None: the defaults.
        psl: the public suffixes; None: those of the package `publicsuffixlist`.
    """
    data, options, psl = bytes(data), options or NameOptions(), psl or default_list()
    if data and not data.endswith(b"\n"):
        data += b"\n"
    pieces, start, line = [], 0, 0
    while start < len(data):
        end = data.rfind(b"\n", start, start + PIECE) + 1 or data.find(b"\n", start) + 1
        pieces.append(_parse_piece(data[start:end], line, options, psl))
        start, line = end, line + pieces[-1].num_lines
    return _join(pieces)


class _Piece(NamedTuple):
    """The names of some lines."""

    characters: bytes
    lengths: np.ndarray
    suffix_starts: np.ndarray
    line_numbers: np.ndarray
    hashes: np.ndarray
    rejected: list[tuple[int, int, bytes]]  # line, code, text
    num_lines: int


def _parse_piece(data: bytes, first_line: int, options: NameOptions, psl: PublicSuffixList) -> _Piece:
    text = b"".join((BEFORE, data.translate(PLAIN[options.underscore]), AFTER))
    buffer = np.frombuffer(text, np.uint8)
    words = words_of(buffer)
    # Places in `buffer` of all that is neither letter nor digit; the first is the line end before the lines.
    special = np.flatnonzero(buffer[PADDING - 1 : -PADDING] < ZERO)
    special += PADDING - 1
    signs = buffer[special]
    follows = np.flatnonzero(special[1:] - special[:-1] == 1)  # the first of two in a row

    before, after = signs[follows], signs[follows + 1]
    is_root = (before == DOT) & (after == END)
    is_delimiter = signs != HYPHEN
    is_delimiter[follows[is_root]] = False  # a dot at the end of a line
    delimiters = special.compress(is_delimiter)
    line_ends = np.flatnonzero(signs.compress(is_delimiter) == END)
    num_labels = line_ends[1:] - line_ends[:-1]
    last = line_ends[1:] - 1
    label_starts = delimiters + 1  # a label starts after every delimiter but the last
    label_ends = delimiters[1:]
    stops, starts = delimiters[line_ends[1:]], label_starts[line_ends[:-1]]
    ends = stops
    odd = [special[signs == 0], label_ends[label_ends - delimiters[:-1] > MAX_LABEL + 1]]
    has_root = False
    if len(follows):
        is_double = (before == HYPHEN) & (after == HYPHEN)
        odd.append(special[follows[~is_double & ~is_root] + 1])
        odd.append(_invalid_hyphens(text, special[follows[is_double]], delimiters))
        has_root = bool(is_root.any())
        if has_root:
            ends = stops - (buffer[stops - 1] == DOT)
    lengths = ends - starts
    is_plain = (lengths <= MAX_NAME) & (buffer[label_starts[last]] > NINE)
    is_plain[np.searchsorted(stops, np.concatenate(odd))] = False

    suffix_labels = psl.table.suffix_labels(words, ends, label_starts, last, num_labels)
    suffix_starts = label_starts[line_ends[1:] - suffix_labels] - starts
    is_name = is_plain & (suffix_starts > 0)
    line_numbers = np.arange(first_line, first_line + len(ends))
    if is_name.all():
        characters = _without_ends(text[PADDING:-PADDING], has_root)
        return _Piece(
            characters, lengths, suffix_starts, line_numbers, hash_words(words, starts, lengths), [], len(ends)
        )

    lengths[~is_name] = 1  # such a line may be as long as the buffer
    hashes = hash_words(words, starts, lengths)
    parts, rejected, done, names = [], [], PADDING, {}
    for line in np.flatnonzero(~is_name).tolist():
        start, stop = int(starts[line]), int(stops[line])
        parts.append(text[done:start])
        done = stop + 1
        content = data[start - PADDING : stop - PADDING]
        name = Rejected("no_registrable_part") if is_plain[line] else _parse_bytes(content, options, psl)
        if isinstance(name, Rejected):
            rejected.append((first_line + line, CODES[name.reason], content))
        else:
            names[line] = name
            parts.append(name.encode())
    parts.append(text[done:-PADDING])
    if names:
        lines = np.array(list(names))
        lengths[lines] = [len(name) for name in names.values()]
        suffix_starts[lines] = [psl.suffix_start(name) for name in names.values()]
        hashes[lines] = name_hashes(np.frombuffer("".join(names.values()).encode(), np.uint8), lengths[lines])
        is_name[lines] = True
    characters = _without_ends(b"".join(parts), has_root)
    arrays = (array.compress(is_name) for array in (lengths, suffix_starts, line_numbers, hashes))
    return _Piece(characters, *arrays, rejected, len(ends))


def _without_ends(lines: bytes, has_root: bool) -> bytes:
    return (lines.replace(b".\n", b"\n") if has_root else lines).replace(b"\n", b"")


def _invalid_hyphens(text: bytes, places: np.ndarray, delimiters: np.ndarray) -> np.ndarray:
    """Return those of some double hyphens that are in places 3 and 4 of a label, but for `xn--` and valid punycode."""
    labels = np.searchsorted(delimiters, places)
    reserved = places - delimiters[labels - 1] == 3
    places, label_ends = places[reserved].tolist(), delimiters[labels[reserved]].tolist()
    return np.array(
        [
            place
            for place, end in zip(places, label_ends, strict=True)
            if text[place - 2 : place] != b"xn" or not is_punycode(text[place + 2 : end].decode("ascii"))
        ],
        np.int64,
    )


def _parse_bytes(line: bytes, options: NameOptions, psl: PublicSuffixList) -> str | Rejected:
    if len(line) > MAX_LINE:
        return Rejected("line_too_long")
    try:
        return parse_name(line.decode(), options, psl)
    except UnicodeDecodeError:
        return Rejected("not_utf8")


def _join(pieces: list[_Piece]) -> ParsedNames:
    rejected: dict[str, RejectedLines] = {}
    lines = [item for piece in pieces for item in piece.rejected]
    reasons = list(REASONS)
    for line, code, content in lines:
        count, examples = rejected.get(reasons[code], (0, []))
        if len(examples) < EXAMPLES:
            examples.append((line, beginning_of_line(content)))
        rejected[reasons[code]] = RejectedLines(count + 1, examples)
    empty = _Piece(b"", *(np.empty(0, kind) for kind in (np.int64, np.int64, np.int64, np.uint64)), [], 0)
    arrays = (np.concatenate(some) for some in zip(*(piece[1:5] for piece in pieces or [empty]), strict=True))
    return ParsedNames(
        np.frombuffer(b"".join(piece.characters for piece in pieces), np.uint8),
        *arrays,
        rejected,
        np.array([line for line, _, _ in lines], np.int64),
        np.array([code for _, code, _ in lines], np.uint8),
    )


def beginning_of_line(line: bytes) -> str:
    """Return the first characters of a line, to show it."""
    return line[: 4 * EXAMPLE_CHARACTERS].decode(errors="replace")[:EXAMPLE_CHARACTERS]
