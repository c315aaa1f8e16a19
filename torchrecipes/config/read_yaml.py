"""Reads YAML files and overrides into merged, with the line of every value.

The nodes of `yaml.compose` carry marks and keep duplicate keys, which a loaded dict no longer does, so they are walked.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from torchrecipes.config.merge import (
    INVALID,
    PATH_KEY,
    KeyPath,
    MergedConfig,
    Problems,
    Provenance,
    format_key,
    format_key_path,
)
from torchrecipes.config.scalars import AmbiguousScalar, read_scalar
from torchrecipes.errors import UserError

_KEY = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
_TAG = "tag:yaml.org,2002:"
_TAGS = {_TAG + name for name in ("null", "bool", "int", "float", "str", "timestamp", "value", "map", "seq")}


def add_file(merged: MergedConfig, path: Path, problems: Problems) -> None:
    """Lay the YAML file at `path` over `merged`; what is wrong with it goes to `problems`.

    Raises:
        UserError: the file cannot be read at all.
    """
    shown = format_key_path(path)

    def at(line: int) -> Provenance:
        return Provenance(f"{shown}:{line}", (0, line))

    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"Cannot read the config file {shown}: {reason}.") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        problems.add(at(_error_line(error)), f"not valid YAML: {_error_reason(error)}")
        return
    if not isinstance(node, yaml.MappingNode):
        what = "the file is empty" if node is None else "this is not a config"
        problems.add(at(1), f"{what}: expected lines of `key: value`")
        return
    # Errors about the config as a whole, such as a missing key, point at its first line.
    provenances: dict[KeyPath, Provenance] = {(): at(1)}
    tree = _Reader(lambda mark: at(mark.line + 1), provenances, problems).read(node, ())
    merged.merge(tree, provenances)


def add_overrides(merged: MergedConfig, overrides: list[str], problems: Problems) -> None:
    """Lay the overrides `key=value` over `merged`, the last one winning; what is wrong with them goes to `problems`.

    A value is one YAML word, or a YAML list, mapping or quoted text where it begins like one; `*.txt`, `a: b` are text.
    """
    parsed = [_split(text, Provenance(f"override '{text}'", (1, n)), problems) for n, text in enumerate(overrides)]
    # A `_component_` drops arguments from below, which those of the same command line, wherever they stand, are not.
    found = sorted((item for item in parsed if item), key=lambda item: not item[0].endswith(PATH_KEY))
    for key, value, provenance in found:
        key_path = _open(merged, key, provenance, problems)
        if key_path:
            provenances = {key_path: provenance}
            merged.merge(_read_override(value, key_path, provenance, provenances, problems), provenances, key_path)


def _split(text: str, provenance: Provenance, problems: Problems) -> tuple[str, str, Provenance] | None:
    key, equals, value = text.partition("=")
    if equals and _KEY.fullmatch(key):
        if value.strip():
            return key, value.strip(), provenance
        problems.add(provenance, f"no value: write {key}=null to switch off, or {key}=\"''\" for empty text")
        return None
    bare = key.lstrip("-")
    if bare != key and _KEY.fullmatch(bare):
        problems.add(provenance, f"not an override: write {bare}={value or 'VALUE'}, without dashes")
    else:
        problems.add(provenance, "not an override: write key=value or nested.key=value, without spaces around the =")
    return None


def _open(merged: MergedConfig, key: str, provenance: Provenance, problems: Problems) -> KeyPath | None:
    # Returns the key_path that `key` names, with a mapping to hold it: what is off or not there begins as an empty one.
    key_path: KeyPath = ()
    for part in key.split("."):
        holder = merged.get(key_path)
        if holder is None and key_path:
            holder = {}
            merged.merge(holder, {key_path: provenance}, key_path)
        if isinstance(holder, list):
            if not part.isdecimal() or int(part) >= len(holder):
                known = f"has {len(holder)} elements, counted from 0"
                problems.add(
                    provenance,
                    f"{format_key(key_path)} is a list that {known}: to replace it write {format_key(key_path)}=[...]",
                )
                return None
            key_path = (*key_path, int(part))
        elif isinstance(holder, dict):
            key_path = (*key_path, part)
        else:
            if holder is not INVALID:
                problems.add(provenance, f"{format_key(key_path)} is {holder!r}, which has no keys of its own")
            return None
    return key_path


def _read_override(
    value: str, key_path: KeyPath, provenance: Provenance, provenances: dict[KeyPath, Provenance], problems: Problems
) -> Any:
    if value[0] not in "[{'\"":
        try:
            return read_scalar(value)
        except AmbiguousScalar as error:
            problems.add(provenance, f"{format_key(key_path)}: {error}")
            return INVALID
    try:
        node = yaml.compose(value, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        problems.add(provenance, f"the value is not valid YAML: {_error_reason(error)}")
        return INVALID
    return _Reader(lambda _: provenance, provenances, problems).read(node, key_path)


@dataclass
class _Reader:
    """Turns YAML nodes into a tree, notes each value's provenance, and gathers problems."""

    origin_of: Callable[[yaml.Mark], Provenance]
    provenances: dict[KeyPath, Provenance]
    problems: Problems
    open_nodes: list[int] = field(default_factory=list)

    def read(self, node: yaml.Node, key_path: KeyPath) -> Any:
        """Return the value of `node`, which stands at `key_path`."""
        provenance = self.provenances.setdefault(key_path, self.origin_of(node.start_mark))
        if node.tag not in _TAGS:
            self.problems.add(
                provenance, f"{format_key(key_path)}: the YAML tag {node.tag} is not allowed here: put text in quotes"
            )
            return INVALID
        if isinstance(node, yaml.ScalarNode):
            return self._read_scalar(node, key_path, provenance)
        if id(node) in self.open_nodes:
            self.problems.add(provenance, f"{format_key(key_path)}: this alias refers to what it is a part of")
            return INVALID
        self.open_nodes.append(id(node))
        if isinstance(node, yaml.SequenceNode):
            result: Any = [self.read(item, (*key_path, index)) for index, item in enumerate(node.value)]
        else:
            result = self._read_mapping(node, key_path)
        self.open_nodes.pop()
        return result

    def _read_mapping(self, node: yaml.MappingNode, key_path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            provenance = self.origin_of(key_node.start_mark)
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.add(provenance, f"{format_key(key_path) or 'the config'}: a key must be one word")
            elif key_node.tag == _TAG + "merge":
                self.problems.add(provenance, "merge keys (<<) are not supported: write the keys out")
            elif key in result:
                first = f"first in {self.provenances[(*key_path, key)].where}"
                self.problems.add(
                    provenance, f"the key '{format_key((*key_path, key))}' is given twice, {first}: remove one"
                )
            else:
                self.provenances[(*key_path, key)] = provenance
                result[key] = self.read(value_node, (*key_path, key))
        return result

    def _read_scalar(self, node: yaml.ScalarNode, key_path: KeyPath, provenance: Provenance) -> Any:
        if node.style is not None:  # quoted, or a block of text
            return node.value
        try:
            return read_scalar(node.value)
        except AmbiguousScalar as error:
            self.problems.add(provenance, f"{format_key(key_path)}: {error}")
            return INVALID


def _error_line(error: yaml.YAMLError) -> int:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    return mark.line + 1 if mark else 1


def _error_reason(error: yaml.YAMLError) -> str:
    reason = getattr(error, "problem", None) or str(error).split("\n", 1)[0]
    hints = {
        r"'\t'": "indent with spaces, not tabs",
        "cannot start any token": "put text that begins with a special character in quotes",
        "undefined alias": "put text that begins with * in quotes",
        "alphabetic or numeric character": "put text that begins with * or & in quotes",
        "mapping values are not allowed": "put text that contains ': ' in quotes, and check the indentation",
        "single document": "keep one config in a file, without a second ---",
        "expected <block end>": "check the indentation of this line",
        "could not find expected ':'": "a key, a colon and a space are expected in this line or the one before",
    }
    hint = next((hint for sign, hint in hints.items() if sign in f"{reason} {error}"), None)
    return f"{reason} ({hint})" if hint else reason
