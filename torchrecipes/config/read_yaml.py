"""Reads YAML files and overrides into a merged config, with the line of every value.

PyYAML's nodes carry line numbers and keep duplicate keys, which a loaded dict does not, so they are walked here.
`ruamel.yaml` keeps lines too, but it is one more dependency, reads scalars by YAML 1.2 where OmegaConf and every other
reader of config.yaml use 1.1, and the refusals of ambiguous words would have to be written all the same.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
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
_ALIAS = "aliases and anchors (* and &) are not supported"
_MAX_DEPTH = 50
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
        raise UserError(f"cannot read the config file {shown}: {reason}", code="unreadable_config") from error
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        problems.add(at(_error_line(error)), **_describe(error))
        return
    if not isinstance(node, yaml.MappingNode):
        what = "the file is empty" if node is None else "this is not a config"
        problems.add(at(1), what, hint="Write lines of `key: value`", code="not_a_config")
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
    found = [item for item in parsed if item]
    # A `_component_` drops the arguments below it; those of the same command line, wherever they stand, are kept.
    with_arguments = {key.rpartition(".")[0] for key, _, _ in found}
    found.sort(key=lambda item: not (item[0].endswith(PATH_KEY) or (item[0] in with_arguments and _is_path(item[1]))))
    for key, value, provenance in found:
        key_path = _open(merged, key, provenance, problems)
        if key_path:
            provenances = {key_path: provenance}
            merged.merge(_read_override(value, key_path, provenance, provenances, problems), provenances, key_path)


def add_tree(
    merged: MergedConfig, tree: dict[str, Any], provenances: dict[KeyPath, Provenance], problems: Problems
) -> None:
    """Lay a tree whose keys may have dots (`optimizer.lr`) over `merged`, a `_component_` before its arguments.

    Args:
        merged: changed in place.
        tree: the values.
        provenances: where they are from, by key path in `tree`.
        problems: gets what is wrong.
    """
    for key in sorted(tree, key=lambda key: not (key.endswith(PATH_KEY) or _is_path(tree[key]))):
        provenance = provenances[key,]
        key_path = _open(merged, key, provenance, problems)
        if key_path:
            below = {(*key_path, *path[1:]): place for path, place in provenances.items() if path[:1] == (key,)}
            merged.merge(tree[key], below, key_path)


def _split(text: str, provenance: Provenance, problems: Problems) -> tuple[str, str, Provenance] | None:
    key, equals, value = text.partition("=")
    if equals and _KEY.fullmatch(key):
        if value.strip():
            return key, value.strip(), provenance
        hint = f"Write {key}=null to switch it off, or {key}=\"''\" for empty text"
        problems.add(provenance, "no value", hint=hint, code="bad_override")
        return None
    bare = key.lstrip("-")
    if bare != key and _KEY.fullmatch(bare):
        hint = f"Write {bare}={value or 'VALUE'}, without dashes"
    else:
        hint = "Write key=value or nested.key=value, without spaces around the ="
    problems.add(provenance, "not an override", hint=hint, code="bad_override")
    return None


def _is_path(text: object) -> bool:
    return isinstance(text, str) and "." in text and all(part.isidentifier() for part in text.split("."))


def _open(merged: MergedConfig, key: str, provenance: Provenance, problems: Problems) -> KeyPath | None:
    # Returns the key path that `key` names, with a mapping to hold it: an empty one where there is none yet.
    key_path: KeyPath = ()
    for part in key.split("."):
        holder = merged.get(key_path)
        if key_path and (holder is None or _is_path(holder)):  # off, or a component that is given by its bare path
            place = merged.nearest(key_path)
            holder = {} if holder is None else {PATH_KEY: holder}
            merged.merge(holder, {key_path: provenance, (*key_path, PATH_KEY): place}, key_path)
        if isinstance(holder, list):
            if not part.isdecimal() or int(part) >= len(holder):
                name = format_key(key_path)
                problems.add(
                    provenance,
                    f"{name} is a list with {len(holder)} elements, counted from 0",
                    hint=f"Write {name}=[...] to replace it",
                    code="unknown_key",
                )
                return None
            key_path = (*key_path, int(part))
        elif isinstance(holder, dict):
            key_path = (*key_path, part)
        else:
            if holder is not INVALID:
                name = format_key(key_path)
                problems.add(provenance, f"{name} is {holder!r}, which has no keys of its own", code="unknown_key")
            return None
    return key_path


def _read_override(
    value: str, key_path: KeyPath, provenance: Provenance, provenances: dict[KeyPath, Provenance], problems: Problems
) -> Any:
    if value[0] not in "[{'\"":
        try:
            return read_scalar(value)
        except AmbiguousScalar as error:
            _add_ambiguous(problems, provenance, key_path, error)
            return INVALID
    try:
        node = yaml.compose(value, Loader=_Loader)
    except yaml.YAMLError as error:
        problems.add(provenance, key=format_key(key_path), **_describe(error))
        return INVALID
    return _Reader(lambda _: provenance, provenances, problems).read(node, key_path)


class _Loader(yaml.SafeLoader):
    """Refuses anchors and aliases, which can make a file of ten lines a tree that no memory holds, and deep nesting."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node:
        event = self.peek_event()
        if getattr(event, "anchor", None):
            raise yaml.composer.ComposerError(problem=_ALIAS, problem_mark=event.start_mark)
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise yaml.composer.ComposerError(problem="nested too deeply", problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


@dataclass
class _Reader:
    """Turns YAML nodes into a tree with the provenance of each value, and gathers problems."""

    origin_of: Callable[[yaml.Mark], Provenance]
    provenances: dict[KeyPath, Provenance]
    problems: Problems

    def read(self, node: yaml.Node, key_path: KeyPath) -> Any:
        """Return the value of `node`, which stands at `key_path`."""
        provenance = self.provenances.setdefault(key_path, self.origin_of(node.start_mark))
        if node.tag not in _TAGS:
            self._add(provenance, key_path, f"the YAML tag {node.tag} is not allowed", "Put text in quotes", "yaml_tag")
            return INVALID
        if isinstance(node, yaml.ScalarNode):
            return self._read_scalar(node, key_path, provenance)
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item, (*key_path, index)) for index, item in enumerate(node.value)]
        return self._read_mapping(node, key_path)

    def _add(self, provenance: Provenance, key_path: KeyPath, problem: str, hint: str, code: str) -> None:
        self.problems.add(provenance, problem, key=format_key(key_path) or None, hint=hint, code=code)

    def _read_mapping(self, node: yaml.MappingNode, key_path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            provenance = self.origin_of(key_node.start_mark)
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode):
                self._add(provenance, key_path, "this key is not a word", "Keys are single words", "bad_key")
                continue
            here = (*key_path, key)
            if key_node.tag == _TAG + "merge":
                self._add(provenance, key_path, "merge keys (<<) are not supported", "Write the keys out", "bad_key")
            elif key in result:
                first = f"this key is given twice, first in {self.provenances[here].where}"
                self._add(provenance, here, first, "Remove one", "duplicate_key")
            else:
                self.provenances[here] = provenance
                result[key] = self.read(value_node, here)
        return result

    def _read_scalar(self, node: yaml.ScalarNode, key_path: KeyPath, provenance: Provenance) -> Any:
        if node.style is not None:  # quoted, or a block of text
            return node.value
        try:
            return read_scalar(node.value)
        except AmbiguousScalar as error:
            _add_ambiguous(self.problems, provenance, key_path, error)
            return INVALID


def _add_ambiguous(problems: Problems, provenance: Provenance, key_path: KeyPath, error: AmbiguousScalar) -> None:
    problems.add(provenance, error.problem, key=format_key(key_path), hint=error.hint, code="ambiguous_word")


def _error_line(error: yaml.YAMLError) -> int:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    return mark.line + 1 if mark else 1


def _describe(error: yaml.YAMLError) -> dict[str, str | None]:
    reason = getattr(error, "problem", None) or str(error).split("\n", 1)[0]
    if reason == _ALIAS:
        return {
            "problem": reason,
            "hint": "Write the value out, or refer to it as ${key}; text that begins with * or & needs quotes",
            "code": "yaml_alias",
        }
    hints = {
        r"'\t'": "Indent with spaces, not tabs",
        "cannot start any token": "Put text that begins with a special character in quotes",
        "alphabetic or numeric character": "Put text that begins with * or & in quotes",
        "mapping values are not allowed": "Put text that contains ': ' in quotes, and check the indentation",
        "single document": "Keep one config in a file, without a second ---",
        "expected <block end>": "Check the indentation of this line",
        "could not find expected ':'": "A key, a colon and a space are expected in this line or the one before",
    }
    hint = next((hint for sign, hint in hints.items() if sign in f"{reason} {error}"), None)
    return {"problem": f"not valid YAML: {reason}", "hint": hint, "code": "invalid_yaml"}
