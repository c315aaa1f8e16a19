"""Reads YAML files and overrides into layers, with the line of every value.

The nodes of `yaml.compose` carry marks and keep duplicate keys, which a loaded dict no longer does, so they are walked.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from torchrecipes.config.layers import BROKEN, PATH_KEY, Layers, Origin, Place, Problems, show, show_path
from torchrecipes.config.numbers import AmbiguousScalar, read_scalar
from torchrecipes.errors import UserError

_KEY = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
_TAG = "tag:yaml.org,2002:"
_TAGS = {_TAG + name for name in ("null", "bool", "int", "float", "str", "timestamp", "value", "map", "seq")}


def add_file(layers: Layers, path: Path, problems: Problems) -> None:
    """Lay the YAML file at `path` over `layers`; what is wrong with it goes to `problems`.

    Raises:
        UserError: the file cannot be read at all.
    """
    shown = show_path(path)

    def at(line: int) -> Origin:
        return Origin(f"{shown}:{line}", (0, line))

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
    origins: dict[Place, Origin] = {(): at(1)}
    tree = _Reader(lambda mark: at(mark.line + 1), origins, problems).read(node, ())
    layers.put(tree, origins)


def add_overrides(layers: Layers, overrides: list[str], problems: Problems) -> None:
    """Lay the overrides `key=value` over `layers`, the last one winning; what is wrong with them goes to `problems`.

    A value is one YAML word, or a YAML list, mapping or quoted text where it begins like one; `*.txt`, `a: b` are text.
    """
    parsed = [_split(text, Origin(f"override '{text}'", (1, n)), problems) for n, text in enumerate(overrides)]
    # A `_component_` drops arguments from below, which those of the same command line, wherever they stand, are not.
    found = sorted((item for item in parsed if item), key=lambda item: not item[0].endswith(PATH_KEY))
    for key, value, origin in found:
        place = _open(layers, key, origin, problems)
        if place:
            origins = {place: origin}
            layers.put(_read_override(value, place, origin, origins, problems), origins, place)


def _split(text: str, origin: Origin, problems: Problems) -> tuple[str, str, Origin] | None:
    key, equals, value = text.partition("=")
    if equals and _KEY.fullmatch(key):
        if value.strip():
            return key, value.strip(), origin
        problems.add(origin, f"no value: write {key}=null to switch off, or {key}=\"''\" for empty text")
        return None
    bare = key.lstrip("-")
    if bare != key and _KEY.fullmatch(bare):
        problems.add(origin, f"not an override: write {bare}={value or 'VALUE'}, without dashes")
    else:
        problems.add(origin, "not an override: write key=value or nested.key=value, without spaces around the =")
    return None


def _open(layers: Layers, key: str, origin: Origin, problems: Problems) -> Place | None:
    # Returns the place that `key` names, with a mapping to hold it: what is off or not there begins as an empty one.
    place: Place = ()
    for part in key.split("."):
        holder = layers.get(place)
        if holder is None and place:
            holder = {}
            layers.put(holder, {place: origin}, place)
        if isinstance(holder, list):
            if not part.isdecimal() or int(part) >= len(holder):
                known = f"has {len(holder)} elements, counted from 0"
                problems.add(origin, f"{show(place)} is a list that {known}: to replace it write {show(place)}=[...]")
                return None
            place = (*place, int(part))
        elif isinstance(holder, dict):
            place = (*place, part)
        else:
            if holder is not BROKEN:
                problems.add(origin, f"{show(place)} is {holder!r}, which has no keys of its own")
            return None
    return place


def _read_override(value: str, place: Place, origin: Origin, origins: dict[Place, Origin], problems: Problems) -> Any:
    if value[0] not in "[{'\"":
        try:
            return read_scalar(value)
        except AmbiguousScalar as error:
            problems.add(origin, f"{show(place)}: {error}")
            return BROKEN
    try:
        node = yaml.compose(value, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        problems.add(origin, f"the value is not valid YAML: {_error_reason(error)}")
        return BROKEN
    return _Reader(lambda _: origin, origins, problems).read(node, place)


@dataclass
class _Reader:
    """Turns YAML nodes into a tree, notes each value's origin, and gathers problems."""

    origin_of: Callable[[yaml.Mark], Origin]
    origins: dict[Place, Origin]
    problems: Problems
    open_nodes: list[int] = field(default_factory=list)

    def read(self, node: yaml.Node, place: Place) -> Any:
        """Return the value of `node`, which stands at `place`."""
        origin = self.origins.setdefault(place, self.origin_of(node.start_mark))
        if node.tag not in _TAGS:
            self.problems.add(origin, f"{show(place)}: the YAML tag {node.tag} is not allowed here: put text in quotes")
            return BROKEN
        if isinstance(node, yaml.ScalarNode):
            return self._read_scalar(node, place, origin)
        if id(node) in self.open_nodes:
            self.problems.add(origin, f"{show(place)}: this alias refers to what it is a part of")
            return BROKEN
        self.open_nodes.append(id(node))
        if isinstance(node, yaml.SequenceNode):
            result: Any = [self.read(item, (*place, index)) for index, item in enumerate(node.value)]
        else:
            result = self._read_mapping(node, place)
        self.open_nodes.pop()
        return result

    def _read_mapping(self, node: yaml.MappingNode, place: Place) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            origin = self.origin_of(key_node.start_mark)
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.add(origin, f"{show(place) or 'the config'}: a key must be one word")
            elif key_node.tag == _TAG + "merge":
                self.problems.add(origin, "merge keys (<<) are not supported: write the keys out")
            elif key in result:
                first = f"first in {self.origins[(*place, key)].where}"
                self.problems.add(origin, f"the key '{show((*place, key))}' is given twice, {first}: remove one")
            else:
                self.origins[(*place, key)] = origin
                result[key] = self.read(value_node, (*place, key))
        return result

    def _read_scalar(self, node: yaml.ScalarNode, place: Place, origin: Origin) -> Any:
        if node.style is not None:  # quoted, or a block of text
            return node.value
        try:
            return read_scalar(node.value)
        except AmbiguousScalar as error:
            self.problems.add(origin, f"{show(place)}: {error}")
            return BROKEN


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
