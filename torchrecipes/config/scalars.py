"""Reads one unquoted YAML word: numbers as people write them, and words that YAML 1.1 would change.

YAML 1.1 (which PyYAML and OmegaConf implement) reads `1:30` silently as 90, `010` as 8 and `on` as true, and `1e-3`
and `None` as text. Here `1e-3` is a number, and ambiguous words are refused with the remedy.
"""

import re
from decimal import Decimal

_NULL = {"", "~", "null", "Null", "NULL"}
_TRUE = {"true", "True", "TRUE"}
_FALSE = {"false", "False", "FALSE"}
_SEXAGESIMAL = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
_OTHER_BASE = re.compile(r"[-+]?0(x[0-9a-fA-F_]+|b[01_]+)")
_FLOAT = re.compile(r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"([-+]?)\.(inf|Inf|INF|nan|NaN|NAN)")
_FOR_PEOPLE = re.compile(r"([-+]?)([0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?([kKMBT]?)")
_FACTORS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


class AmbiguousScalar(Exception):
    """An unquoted word that YAML 1.1 reads as something else than it looks like: what it is, and the remedy."""

    def __init__(self, problem: str, hint: str):
        super().__init__(problem)
        self.problem, self.hint = problem, hint


class PlainNone(str):
    """`none` without quotes: text where a key has it among its choices, and a mistake for `null` elsewhere."""


def read_scalar(text: str) -> bool | int | float | str | None:
    """Return what the unquoted YAML word `text` stands for; a word that is nothing else is text.

    Raises:
        AmbiguousScalar: for `yes`, `no`, `on`, `off`, `None`, `1:30` and `010`.
    """
    word = text.lower()
    if text in _NULL:
        return None
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    if word in {"yes", "on", "no", "off"}:
        meant = "true" if word in {"yes", "on"} else "false"
        raise AmbiguousScalar(f"{text} is {meant} to YAML", f"Write {meant}, or '{text}' in quotes for text")
    if text == "none":
        return PlainNone(text)
    if word == "none":
        raise AmbiguousScalar(f"{text} is text to YAML", none_hint(text))
    if _SEXAGESIMAL.fullmatch(text):
        remedy = "Write the number in full, or put it in quotes for text"
        raise AmbiguousScalar(f"{text} is a number in base 60 to YAML", remedy)
    if _LEADING_ZERO.fullmatch(text):
        plain = text.replace("_", "").lstrip("+-0") or "0"
        raise AmbiguousScalar(f"{text} is an octal number to YAML", f"Write {plain}, or '{text}' in quotes for text")
    if _INTEGER.fullmatch(text):
        return int(text.replace("_", ""))
    if _OTHER_BASE.fullmatch(text):
        return int(text.replace("_", ""), 0)
    if _FLOAT.fullmatch(text):
        return float(text.replace("_", ""))
    if match := _NOT_FINITE.fullmatch(text):
        return float(match[1] + match[2])
    return text


def none_hint(text: str) -> str:
    """Return the remedy for a `none` that is none of a key's choices."""
    return f"Write null to switch off, or '{text}' in quotes for text"


def read_number(text: str) -> int | float | None:
    """Return the number that `text` writes for people (`10B`, `500k`, `2.5M`, `10_000`, `1e-3`), or None.

    Suffixes are k, M, B and T (10^3, 10^6, 10^9, 10^12). The arithmetic is decimal, so `2.3M` is exactly 2300000; a
    whole result is an int.
    """
    match = _FOR_PEOPLE.fullmatch(text.strip())
    if not match:
        return None
    sign, digits, exponent, suffix = match.groups()
    number = Decimal(sign + digits.replace("_", "") + (exponent or "")) * _FACTORS[suffix]
    # An exponent as large as 1e999999999 is a float's business (it is inf), not a billion digits of int.
    if number.adjusted() < 30 and number == number.to_integral_value():
        return int(number)
    return float(number)
