"""Parsing of domain names: what is accepted, what is rejected and why, and that the fast way gives the same."""

import pytest

publicsuffixlist = pytest.importorskip("publicsuffixlist")
pytest.importorskip("idna")

from torchrecipes.data.domains import NameOptions, Rejected, parse_lines, parse_name  # noqa: E402

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
