"""Writes a config as YAML that `load` reads again, each value with its provenance beside it."""

import math
import re
from typing import Any

import yaml

from torchrecipes.config.check import to_tree
from torchrecipes.config.merge import DEFAULT, KeyPath, Provenance
from torchrecipes.config.scalars import AmbiguousScalar, read_scalar

_PLAIN_TEXT = re.compile(r"[A-Za-z0-9_./~][\w./ +-]*(?<! )")

_ABSENT = object()


class _Interpolation(str):
    """Text with `${...}` that is not escaped."""


def to_yaml(config: Any) -> str:
    """Return the resolved config as YAML, each value with a trailing comment on where it is from.

    The comment is `default`, `file:line`, `override`, or `set in code` where the value is not the one that was loaded.
    Numbers are written in full, text is quoted where it could be read as something else. Text from the
    environment stays an interpolation (`${oc.env:TOKEN}`), so that a secret is not written to disk.
    """
    tree = to_tree(config)
    loaded, provenances, interpolations = getattr(config, "_loaded", ({}, {}, {}))
    for key_path, text in interpolations.items():
        value = _at(tree, key_path)
        if value == _at(loaded, key_path) and not isinstance(value, bool | int | float):
            for root in (tree, loaded):
                _at(root, key_path[:-1])[key_path[-1]] = _Interpolation(text)
    lines: list[tuple[str, str]] = []
    _write(tree, loaded, provenances, (), "", lines)
    width = min(max((len(text) for text, comment in lines if comment), default=0), 60)
    return "".join(f"{text:<{width}}  # {comment}\n" if comment else f"{text}\n" for text, comment in lines)


def _write(
    tree: Any, loaded: Any, provenances: dict[KeyPath, Provenance], key_path: KeyPath, indent: str, lines: list
) -> None:
    # Appends (text, comment) pairs to `lines`; `loaded` is what `tree` was when `provenances` were noted.
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in pairs:
        here = (*key_path, key)
        before = _item(loaded, key)
        head = f"{indent}{_word(key)}:" if isinstance(tree, dict) else f"{indent}-"
        if isinstance(value, dict | list) and not _fits_a_line(value):
            if isinstance(tree, list) and isinstance(value, dict):
                # `- key: value`: the first key stands beside the dash.
                start = len(lines)
                _write(value, before, provenances, here, f"{indent}  ", lines)
                text, comment = lines[start]
                lines[start] = (f"{indent}- {text.removeprefix(indent + '  ')}", comment)
            else:
                lines.append((head, ""))
                _write(value, before, provenances, here, f"{indent}  ", lines)
            continue
        known = before == value and type(before) is type(value)
        lines.append((f"{head} {inline(value)}", provenances.get(here, DEFAULT).short if known else "set in code"))


def _item(tree: Any, key: str | int) -> Any:
    if isinstance(tree, dict):
        return tree.get(key, _ABSENT)
    return tree[key] if isinstance(tree, list) and isinstance(key, int) and key < len(tree) else _ABSENT


def _at(tree: Any, key_path: KeyPath) -> Any:
    for key in key_path:
        tree = _item(tree, key)
    return tree


def _fits_a_line(value: dict | list) -> bool:
    if isinstance(value, dict):
        return not value
    return not any(isinstance(item, dict | list) and item for item in value)


def inline(value: Any) -> str:
    """Return a value as YAML of one line."""
    if isinstance(value, dict):
        return "{}"
    if isinstance(value, list):
        return "[" + ", ".join(inline(item) for item in value) + "]"
    if isinstance(value, _Interpolation):
        return _word(str(value))
    if isinstance(value, str):
        return _word(value.replace("${", "\\${"))  # a plain ${, not an interpolation
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    return repr(value)


def _word(text: str) -> str:
    # Text in YAML: plain where it reads back as the same text, quoted otherwise.
    try:
        plain = bool(_PLAIN_TEXT.fullmatch(text)) and type(read_scalar(text)) is str
    except AmbiguousScalar:
        plain = False
    return text if plain else yaml.safe_dump(text, default_style='"', allow_unicode=True, width=2**31).strip()
