import math

import pytest
import yaml

from torchrecipes.config.scalars import AmbiguousScalar, read_number, read_scalar

SAME_AS_YAML = """
0 7 -3 +12 1_000 0x1F 0b101 1.5 -0.25 .5 5. 1_000.5 1.5e+3 2.0e-4 .inf -.inf .Inf true True FALSE null Null ~ text
my/file.txt 1.2.3 127.0.0.1:80 C:\\data a-b 10B 500k neobert/quickstart runs/2024-01-05 08x 1e y n nan inf 0o17
""".split()


@pytest.mark.parametrize("text", SAME_AS_YAML)
def test_unambiguous_words_are_read_as_yaml_reads_them(text):
    assert read_scalar(text) == yaml.safe_load(text)
    assert type(read_scalar(text)) is type(yaml.safe_load(text))


def test_not_a_number():
    assert math.isnan(read_scalar(".nan"))


@pytest.mark.parametrize(("text", "value"), [("1e-3", 0.001), ("1E6", 1e6), ("-2e+5", -2e5), ("1_0e1", 100.0)])
def test_exponents_without_a_point_are_numbers(text, value):
    assert yaml.safe_load(text) == text
    assert read_scalar(text) == value and isinstance(read_scalar(text), float)


def test_dates_stay_text():
    assert read_scalar("2024-01-05") == "2024-01-05"


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("1:30", "in full"),
        ("12:30:45", "in full"),
        ("1:30.5", "in full"),
        ("010", "Write 10, or '010'"),
        ("-007", "Write 7, or '-007'"),
        ("00", "Write 0,"),
        ("on", "Write true, or 'on'"),
        ("Yes", "Write true, or 'Yes'"),
        ("OFF", "Write false"),
        ("no", "Write false"),
        ("None", "Write null"),
    ],
)
def test_ambiguous_words_are_refused_with_the_remedy(text, remedy):
    assert yaml.safe_load(text) != text or text.lower() == "none" or text == "1:30.5"
    with pytest.raises(AmbiguousScalar) as caught:
        read_scalar(text)
    assert remedy in caught.value.hint
    assert "quotes" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10B", 10_000_000_000),
        ("500k", 500_000),
        ("500K", 500_000),
        ("2.5M", 2_500_000),
        ("2.3M", 2_300_000),  # in binary floating point 2.3 * 10**6 is 2299999.9999999995
        ("1T", 10**12),
        ("10_000", 10_000),
        ("1e-3", 0.001),
        ("1e6", 1_000_000),
        (" 7 ", 7),
        ("-1.5k", -1500),
        ("1.5", 1.5),
        ("0.0001k", 0.1),
    ],
)
def test_numbers_for_people(text, value):
    assert read_number(text) == value
    assert type(read_number(text)) is type(value)


@pytest.mark.parametrize("text", ["", "k", "10m", "10b", "10 B", "1,000", "ten", "10kk", "1e", "--1", "inf", "0x10"])
def test_other_text_is_not_a_number(text):
    assert read_number(text) is None


def test_a_huge_exponent_takes_no_time():
    assert read_number("1e999999") == math.inf
