"""Parsing of domain names: what is accepted, what is rejected and why, and that the fast way gives the same."""

import random
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("publicsuffixlist")
pytest.importorskip("idna")

from torchrecipes.data.domains import (
    REASONS,
    NameOptions,
    PublicSuffixList,
    Rejected,
    line_parsing,
    name_hashes,
    parse_lines,
    parse_name,
)
from torchrecipes.data.domains.name_syntax import is_punycode

CASES = {
    "example.com": "example.com",
    "EXAMPLE.COM.": "example.com",
    "  padded.example.org\t": "padded.example.org",
    "www.example.co.uk": "www.example.co.uk",
    "": "blank",
    "# a comment": "comment",
    "https://user:pw@host.example:8443/path?q=1#f": "url",
    "host.example:443": "url",
    "*.wild.example": "wildcard",
    "192.0.2.17": "ip_address",
    "[2001:db8::1]": "ip_address",
    "2001:db8::1": "ip_address",
    "0x7f.0.0.1": "ends_in_number",
    "a.0x7f": "ends_in_number",
    "localhost": "no_registrable_part",
    "com": "no_registrable_part",
    "co.uk": "no_registrable_part",
    "x.ck": "no_registrable_part",
    "www.ck": "www.ck",
    "bücher.example": "xn--bcher-kva.example",
    "пример。испытание": "xn--e1afmkfd.xn--80akhbyknj4f",
    "a\u0378.example": "not_idna",
    "_dmarc.example.net": "underscore",
    "a..b.example": "empty_label",
    ".example.com": "empty_label",
    "example.com..": "empty_label",
    "-lead.example": "hyphen_at_end",
    "trail-.example": "hyphen_at_end",
    "ab--cd.example": "reserved_hyphens",
    "abc--d.example": "abc--d.example",
    "xn--99999999.example": "bad_punycode",
    "xn--.example": "hyphen_at_end",
    "x" * 63 + ".example": "x" * 63 + ".example",
    "x" * 64 + ".example": "label_too_long",
    ("a" * 49 + ".") * 5 + "com": ("a" * 49 + ".") * 5 + "com",
    ("a" * 49 + ".") * 5 + "com.": ("a" * 49 + ".") * 5 + "com",
    ("a" * 49 + ".") * 5 + "info": "name_too_long",
    "exa mple.com": "bad_character",
    "1,ranked.example": "bad_character",
    "nul\0.example": "bad_character",
    "a" * 8193: "line_too_long",
}


@pytest.mark.parametrize("line", CASES, ids=lambda line: repr(line[:20]))
def test_a_line_is_a_name_or_has_a_reason(line):
    found = parse_name(line)
    assert (found.reason if isinstance(found, Rejected) else found) == CASES[line]


def test_all_lines_of_a_buffer_are_parsed_in_their_order():
    parsed = parse_lines("\n".join(CASES).encode())
    good = [(number, found) for number, (line, found) in enumerate(CASES.items()) if "." in found]
    assert list(zip(parsed.line_numbers.tolist(), parsed.names(), strict=True)) == good


def test_options():
    url = NameOptions(strip_url=True)
    assert parse_name("https://user:pw@Host.example:8443/path?q=1#f", url) == "host.example"
    assert parse_name("host.example:443", url) == parse_name("*.host.example", url) == "host.example"
    assert parse_name("http://[2001:db8::1]:80/", url) == Rejected("ip_address")
    assert parse_name("_dmarc.example.net", NameOptions(underscore="accept")) == "_dmarc.example.net"
    assert parse_name("bücher.example", NameOptions(idna=False)) == Rejected("not_ascii")


def odd_line(rng, rules):
    """A line of labels, some of them odd, often with the tail that a rule of the list speaks of."""
    labels = (
        lambda: "".join(rng.choices("abxn012", k=rng.randint(1, 8))),
        lambda: "".join(rng.choices("abcdefghijklmnopqrstuvwxyz-0123456789", k=rng.randint(1, 30))),
        lambda: "xn--" + "".join(rng.choices("abcdefg0129-", k=rng.randint(0, 6))),
        lambda: "x" * rng.randint(60, 66),
        lambda: rng.choice(
            ["-a", "a-", "a--b", "ab--c", "a---b", "", "_a", "--", "xn---a", "xn--bcher-kva", "7", "0x1"]
        ),
        lambda: rng.choice(["bücher", "日本", "Ä", "ß", "a\u200b", "．", "\ud7ff"]),
    )
    kind = rng.random()
    if kind < 0.1:
        return bytes(rng.choices(range(256), k=rng.randint(0, 12))).replace(b"\n", b"")
    line = ".".join(rng.choices(labels, (6, 4, 1, 0.5, 2, 1))[0]() for _ in range(rng.choice((1, 1, 2, 2, 3, 4, 8))))
    if kind < 0.7:
        line += "." * rng.choice((0, 1, 1)) + rng.choice(rules).lstrip("!").replace("*", "any")
    if rng.random() < 0.1:
        line = rng.choice([str.upper, " {}".format, "#{}".format, "http://a@{}:80/?b".format, "*.{}".format])(line)
    if rng.random() < 0.2:
        line += "."
    if rng.random() < 0.05:
        line += rng.choice([" ", "\r", ":80", "/x", ".", "..", "\0", "\t", ",1"])
    return line.encode()


@pytest.mark.parametrize(
    "options", [NameOptions(), NameOptions(True, "accept"), NameOptions(idna=False)], ids=["default", "more", "ascii"]
)
def test_many_lines_at_a_time_are_parsed_as_one_by_one(monkeypatch, options):
    monkeypatch.setattr(line_parsing, "PIECE", 3000)
    rng, psl = random.Random(0), PublicSuffixList()
    lines = [odd_line(rng, psl.lines) for _ in range(4000)]
    parsed = parse_lines(np.frombuffer(b"\n".join(lines), np.uint8), options, psl)
    found = dict(zip(parsed.line_numbers.tolist(), parsed.names(), strict=True))
    reasons = list(REASONS)
    for line, code in zip(parsed.rejected_lines.tolist(), parsed.rejected_reasons.tolist(), strict=True):
        assert line not in found
        found[line] = Rejected(reasons[code])
    assert len(found) == len(lines)
    for number, line in enumerate(lines):
        try:
            expected = parse_name(line.decode(), options, psl)
        except UnicodeDecodeError:
            expected = Rejected("not_utf8")
        assert found[number] == expected, line
    starts = [psl.suffix_start(name) for name in parsed.names()]
    assert parsed.suffix_starts.tolist() == starts and min(starts) > 1
    assert parsed.lengths.tolist() == list(map(len, parsed.names()))
    assert parsed.hashes.tolist() == [hash_of(name.encode()) for name in parsed.names()]
    for reason, (count, examples) in parsed.rejected.items():
        numbers = [line for line, name in found.items() if name == Rejected(reason)]
        assert count == len(numbers) and [line for line, _ in examples] == sorted(numbers)[:5]
    assert len(parsed) > 1000 and len(parsed.rejected) > 9


def hash_of(name):
    """`name_hashes` of one name, in integers."""
    mask = (1 << 64) - 1
    value = len(name) * 0x9E3779B97F4A7C15 & mask
    for start in range(0, len(name), 16):
        chunk = name[start : start + 16].ljust(16, b"\0")
        first, second = int.from_bytes(chunk[:8], "little"), int.from_bytes(chunk[8:], "little")
        value ^= (first * 0xD6E8FEB86659FD93 + second * 0xC2B2AE3D27D4EB4F) & mask
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & mask
        value = (value ^ value >> 27) * 0x94D049BB133111EB & mask
        value ^= value >> 31
    return value


def test_hashes_are_spread_over_all_bits():
    names = [f"name{i}.com" for i in range(20_000)]
    hashes = name_hashes(np.frombuffer("".join(names).encode(), np.uint8), np.array(list(map(len, names))))
    assert len(np.unique(hashes)) == 20_000
    shares = [(hashes >> np.uint64(bit) & np.uint64(1)).mean() for bit in range(64)]
    assert min(shares) > 0.485 and max(shares) < 0.515  # 4 standard deviations


def test_punycode_is_what_python_decodes():
    rng = random.Random(0)
    for number in range(2000):
        if number % 2:
            text = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz0123456789-", k=rng.randint(0, 12)))
        else:
            ranges = ((97, 122), (128, 1000), (0x4E00, 0x9000), (0xE000, 0x10FFFF))
            decoded = "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 10)))
            text = decoded.encode("punycode").decode()[: 99 - number % 5 // 4 * 98 or None]
        try:
            decoded = text.encode().decode("punycode")
            decoded.encode()
            expected = not decoded.isascii() and decoded.encode("punycode").decode() == text
        except (UnicodeError, OverflowError):
            expected = False
        assert is_punycode(text) == expected, text


def test_nothing_and_a_very_long_line():
    assert len(parse_lines(b"")) == 0
    parsed = parse_lines(b"one.com\n" + b"x" * 3_000_000 + b"\ntwo.com")
    assert parsed.names() == ["one.com", "two.com"] and parsed.rejected["line_too_long"].count == 1
    assert len(parsed.rejected["line_too_long"].examples[0][1]) < 100
    kept = parsed.select(np.array([False, True]))
    assert kept.names() == ["two.com"] and kept.line_numbers.tolist() == [2] and kept.rejected == parsed.rejected


def test_the_documentation_has_every_reason():
    page = (Path(__file__).parents[3] / "docs" / "domain-names.md").read_text("utf-8")
    assert [reason for reason in REASONS if f"`{reason}`" not in page] == []
