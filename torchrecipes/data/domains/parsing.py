"""Parses lines with domain names: normalizes, validates, and splits off the public suffix.

`parse_name` is the definition, one line at a time. `parse_lines` gives the same for all lines of a buffer in numpy.

1. A blank line or a comment (`#`) is no name. With `strip_url`, scheme, user, port, path and a leading `*.` go.
2. Unicode becomes ASCII by UTS 46, upper case lower case; a trailing dot is dropped.
3. Names follow RFC 1035 and RFC 5890: letters, digits and hyphens (the underscore by an option), labels of 1 to 63
   characters, 253 in total, no hyphen at either end of a label, none in both of places 3 and 4 except in `xn--`, and
   that with valid punycode.
4. IP addresses, names that end in a number (https://url.spec.whatwg.org/#ends-in-a-number-checker) and names that are a
   public suffix themselves are no names of a registrable domain.
"""

import ipaddress
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from torchrecipes.data.domains.public_suffix_list import PublicSuffixList, default_list
from torchrecipes.errors import UserError

MAX_LINE = 8192  # bytes of UTF-8
MAX_NAME, MAX_LABEL = 253, 63  # characters, RFC 1035 2.3.4 without the root's dot
EXAMPLES = 5  # per reason and buffer
EXAMPLE_CHARACTERS = 80
REASONS = {
    "blank": "The line is blank.",
    "comment": "The line starts with #.",
    "line_too_long": "The line has more than 8,192 bytes.",
    "not_utf8": "The line is not UTF-8.",
    "url": "It has a scheme, user, port or path: strip_url removes them.",
    "wildcard": "It starts with `*.`: strip_url removes that.",
    "ip_address": "It is an IP address.",
    "not_ascii": "It has other characters than ASCII, and idna is off.",
    "not_idna": "UTS 46 does not allow its characters in a domain name.",
    "bad_character": "It has a character other than letters, digits, hyphens and dots.",
    "underscore": "It has an underscore: `underscore: accept` allows them.",
    "empty_label": "It has two dots in a row, or one at its start.",
    "label_too_long": "It has a label of more than 63 characters.",
    "name_too_long": "It has more than 253 characters.",
    "hyphen_at_end": "It has a label that starts or ends with a hyphen.",
    "reserved_hyphens": "It has a label other than `xn--` with hyphens in places 3 and 4 (RFC 5890 reserves these).",
    "bad_punycode": "It has a label with `xn--` that is not valid punycode.",
    "ends_in_number": "Its last label is a number.",
    "no_registrable_part": "It is a public suffix, or a single label.",
}
NO_NAMES = frozenset({"blank", "comment"})  # lines that are as they should be
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
LDH = re.compile(r"[a-z0-9.-]*")
LDH_UNDERSCORE = re.compile(r"[a-z0-9._-]*")
NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")


@dataclass(frozen=True)
class NameOptions:
    """How lines become names.

    Args:
        strip_url: remove the scheme, user, port and path of URLs, and a leading `*.`.
        underscore: "accept" or "reject" names with underscores, as in `_dmarc.example.com`.
        idna: turn Unicode names into punycode by UTS 46 (non-transitional); False: reject them.

    Raises:
        UserError: `underscore` has another value (code `invalid_value`).
    """

    strip_url: bool = False
    underscore: str = "reject"
    idna: bool = True

    def __post_init__(self):
        if self.underscore not in ("accept", "reject"):
            problem = f"'{self.underscore}' is not a valid value"
            raise UserError(problem, key="underscore", hint="Set accept or reject.", code="invalid_value")


class Rejected(NamedTuple):
    """A line that gives no name: one of `REASONS`."""

    reason: str


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


def parse_name(line: str, options: NameOptions = NameOptions(), psl: PublicSuffixList | None = None) -> str | Rejected:
    """Return the normalized name of a line, or why it has none.

    Args:
        line: the line without its end.
        options: what is removed and accepted.
        psl: the public suffixes; None: those of the package `publicsuffixlist`.
    """
    name = _normalize(line, options)
    if not isinstance(name, Rejected) and not (psl or default_list()).suffix_start(name):
        return Rejected("no_registrable_part")
    return name


def _normalize(line: str, options: NameOptions) -> str | Rejected:
    if len(line) > MAX_LINE or len(line.encode("utf-8", "surrogatepass")) > MAX_LINE:
        return Rejected("line_too_long")
    name = line.strip()
    if not name:
        return Rejected("blank")
    if name.startswith("#"):
        return Rejected("comment")
    if _is_address(name):
        return Rejected("ip_address")
    if options.strip_url:
        name = _strip_url(name)
        if _is_address(name):
            return Rejected("ip_address")
    elif name.startswith("*."):
        return Rejected("wildcard")
    elif any(sign in name for sign in ":/@?"):
        return Rejected("url")
    if not name.isascii():
        name = _to_ascii(name, options)
        if isinstance(name, Rejected):
            return name
    return _check(name.lower().removesuffix("."), options)


def _check(name: str, options: NameOptions) -> str | Rejected:
    if not (LDH_UNDERSCORE if options.underscore == "accept" else LDH).fullmatch(name):
        return Rejected("underscore" if LDH_UNDERSCORE.fullmatch(name) else "bad_character")
    labels = name.split(".")
    if not all(labels):
        return Rejected("empty_label")
    if max(map(len, labels)) > MAX_LABEL:
        return Rejected("label_too_long")
    if len(name) > MAX_NAME:
        return Rejected("name_too_long")
    for label in labels:
        if label[0] == "-" or label[-1] == "-":
            return Rejected("hyphen_at_end")
        if label[2:4] == "--":
            if label[:2] != "xn":
                return Rejected("reserved_hyphens")
            if not _is_punycode(label[4:]):
                return Rejected("bad_punycode")
    if NUMBER.fullmatch(labels[-1]):
        return Rejected("ip_address" if len(labels) > 1 and _is_address(name) else "ends_in_number")
    return name


def _strip_url(name: str) -> str:
    scheme = SCHEME.match(name)
    host = re.split(r"[/?#]", name[scheme.end() if scheme else 0 :].removeprefix("//"), maxsplit=1)[0]
    host = host.rpartition("@")[2]
    if not host.startswith("[") and host.count(":") == 1:
        host = re.sub(r":[0-9]*$", "", host)
    elif host.startswith("["):
        host = re.sub(r"\]:[0-9]*$", "]", host)
    return host.removeprefix("*.")


def _is_address(name: str) -> bool:
    text = name[1:-1] if name.startswith("[") and name.endswith("]") else name
    if len(text) > 64 or (":" not in text and not text[-1:].isdigit()):
        return False
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _to_ascii(name: str, options: NameOptions) -> str | Rejected:
    if not options.idna:
        return Rejected("not_ascii")
    if len(name) > MAX_NAME + 1:
        return Rejected("name_too_long")
    try:
        import idna
    except ImportError as error:
        problem, hint = "the package idna is not installed", "pip install 'torchrecipes[domains]', or set idna: false."
        raise UserError(problem, hint=hint, code="missing_package") from error
    try:
        labels = idna.uts46_remap(name, std3_rules=False, transitional=False).split(".")
        return ".".join(label if label.isascii() else idna.alabel(label).decode("ascii") for label in labels)
    except (idna.IDNAError, UnicodeError):
        return Rejected("not_idna")


def _is_punycode(text: str) -> bool:
    """Whether what follows `xn--` stands for a text with other characters than ASCII, in the one way it is written."""
    try:
        decoded = text.encode("ascii").decode("punycode")
        return not decoded.isascii() and decoded.encode("punycode").decode("ascii") == text
    except (UnicodeError, OverflowError, ValueError):
        return False


def name_hashes(characters: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return a 64-bit hash of every name, the same on any machine; all its bits are well mixed.

    The bytes of a name, padded with zeros to a multiple of 16, are little-endian words `w0, w1, ...` of 8 bytes. Modulo
    2^64, starting from `h = length * K0`, every 16 bytes make `h = mix(h ^ (w0 * K1 + w1 * K2))`, where `mix` is the
    finalizer of splitmix64 (https://prng.di.unimi.it/splitmix64.c).

    Args:
        characters: ASCII of the names, one after the other, `[C]` uint8.
        lengths: characters of each name, 1 or more, `[D]`.

    Returns:
        `[D]` uint64.
    """
    buffer = np.zeros(len(characters) + 16, np.uint8)
    buffer[: len(characters)] = characters
    return hash_words(buffer, np.cumsum(lengths) - lengths, lengths)


K0, K1, K2 = (np.uint64(key) for key in (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, 0xC2B2AE3D27D4EB4F))
WORD_MASKS = np.array([(1 << 8 * count) - 1 for count in range(9)], np.uint64)  # by the number of bytes to keep


def hash_words(buffer: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`name_hashes` of names that start anywhere in a buffer with 16 bytes after the last one."""
    words = np.ndarray((len(buffer) - 7,), "<u8", buffer, 0, (1,))  # the word at every byte
    hashes = lengths.astype(np.uint64) * K0
    which: np.ndarray | slice = slice(None)
    for chunk in range(0, int(lengths.max(initial=0)), 16):
        if chunk:
            which = np.flatnonzero(lengths > chunk)
        start, left = starts[which] + chunk, lengths[which] - chunk
        first = words[start] & WORD_MASKS[np.minimum(left, 8)]
        second = words[start + 8] & WORD_MASKS[np.clip(left - 8, 0, 8)]
        hashes[which] = mix(hashes[which] ^ (first * K1 + second * K2))
    return hashes


def mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64, elementwise on uint64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def parse_lines(
    data: bytes | np.ndarray,
    options: NameOptions = NameOptions(),
    psl: PublicSuffixList | None = None,
) -> ParsedNames:
    """Return the names of all lines of a buffer; each is what `parse_name` gives.

    Args:
        data: complete lines that end in `\\n` (the last one may lack it), as bytes or `[N]` uint8.
        options: what is removed and accepted.
        psl: the public suffixes; None: those of the package `publicsuffixlist`.
    """
    psl = psl or default_list()
    lines = bytes(data).removesuffix(b"\n").split(b"\n") if len(data) else []
    names, line_numbers = [], []
    rejected: dict[str, RejectedLines] = {}
    rejected_lines: list[int] = []
    rejected_reasons: list[int] = []
    codes = {reason: code for code, reason in enumerate(REASONS)}
    for number, line in enumerate(lines):
        try:
            name = Rejected("line_too_long") if len(line) > MAX_LINE else parse_name(line.decode(), options, psl)
        except UnicodeDecodeError:
            name = Rejected("not_utf8")
        if not isinstance(name, Rejected):
            names.append(name)
            line_numbers.append(number)
            continue
        rejected_lines.append(number)
        rejected_reasons.append(codes[name.reason])
        count, examples = rejected.get(name.reason, (0, []))
        if len(examples) < EXAMPLES:
            examples.append((number, line[: 4 * EXAMPLE_CHARACTERS].decode(errors="replace")[:EXAMPLE_CHARACTERS]))
        rejected[name.reason] = RejectedLines(count + 1, examples)
    characters = np.frombuffer("".join(names).encode(), np.uint8)
    lengths = np.array([len(name) for name in names], np.int64)
    return ParsedNames(
        characters,
        lengths,
        psl.suffix_starts(characters, lengths),
        np.array(line_numbers, np.int64),
        name_hashes(characters, lengths),
        rejected,
        np.array(rejected_lines, np.int64),
        np.array(rejected_reasons, np.uint8),
    )
