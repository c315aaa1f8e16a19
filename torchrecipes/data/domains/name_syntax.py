"""`parse_name`: from a line to a normalized domain name, or the reason why there is none.

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

from torchrecipes.data.domains.public_suffix_list import PublicSuffixList, default_list
from torchrecipes.errors import UserError

MAX_LINE = 8192  # bytes of UTF-8
MAX_NAME, MAX_LABEL = 253, 63  # characters, RFC 1035 2.3.4 without the root's dot
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
PUNYCODE_DIGITS = {digit: value for value, digit in enumerate("abcdefghijklmnopqrstuvwxyz0123456789")}
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


def parse_name(line: str, options: NameOptions | None = None, psl: PublicSuffixList | None = None) -> str | Rejected:
    """Return the normalized name of a line, or why it has none.

    Args:
        line: the line without its end.
        options: what is removed and accepted; None: the defaults.
        psl: the public suffixes; None: those of the package `publicsuffixlist`.
    """
    name = _normalize(line, options or NameOptions())
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
            if not is_punycode(label[4:]):
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


def is_punycode(text: str) -> bool:
    """Return whether what follows `xn--` stands for a text with other characters than ASCII.

    The decoder of RFC 3492, section 6.2, without the text; every text has one form, so that nothing is encoded again.
    """
    split = text.rfind("-")
    digits = text[split + 1 :]
    if split == 0 or not digits:
        return False
    length, code, place, bias, damp = max(split, 0), 128, 0, 72, 700
    delta, weight, base = 0, 1, 36
    for digit in digits:
        value = PUNYCODE_DIGITS.get(digit)
        if value is None:
            return False
        delta += value * weight
        threshold = 1 if base <= bias else 26 if base >= bias + 26 else base - bias
        if value >= threshold:  # more digits follow
            weight *= 36 - threshold
            base += 36
            continue
        length += 1
        place += delta
        code += place // length
        place = place % length + 1
        if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
            return False
        delta //= damp
        delta += delta // length
        bias, damp = 0, 2
        while delta > 455:
            delta //= 35
            bias += 36
        bias += 36 * delta // (delta + 38)
        delta, weight, base = 0, 1, 36
    return base == 36
