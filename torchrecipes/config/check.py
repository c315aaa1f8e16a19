"""Checks a merged tree against a recipe's `Config` dataclass and turns it into an instance, gathering every problem.

A component's arguments are checked like keys, against the signature and the annotations of what the component names.
"""

import dataclasses
import inspect
import re
import typing
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from torchrecipes.config import coerce
from torchrecipes.config.components import MISSING, Component, parameters, resolve, suggest_path
from torchrecipes.config.merge import INVALID, PATH_KEY, KeyPath, MergedConfig, Problems, format_key, leaves
from torchrecipes.config.suggest import closest, did_you_mean
from torchrecipes.errors import UserError


@dataclass(frozen=True)
class ComponentSpec:
    """A key_path where a component may stand.

    `injected` names the arguments that the recipe passes, `default` is the path of the default component; `anywhere` is
    True among a component's arguments, where a component may stand for a value of any type.
    """

    injected: tuple[str, ...] = ()
    default: str | None = None
    anywhere: bool = False


@dataclass
class Checker:
    """One check: the merged that are checked, the problems found, and the keys that exist anywhere (for hints)."""

    merged: MergedConfig
    problems: Problems = field(default_factory=Problems)
    known: list[KeyPath] = field(default_factory=list)

    def add_error(self, key_path: KeyPath, message: str) -> Any:
        """Note a problem with the value at `key_path`, and return what stands for the value from here on."""
        self.problems.add(self.merged.nearest(key_path), f"{format_key(key_path)}: {message}")
        return INVALID


def check_config(merged: MergedConfig, schema: type, problems: Problems) -> Any:
    """Return the instance of the dataclass `schema` that the tree stands for, or INVALID; problems go to `problems`.

    A dataclass with a method `check() -> list[str]` is asked, last, for problems that need more than one key.
    """
    known = [key_path for tree in (default_tree(schema), merged.tree) for key_path, _ in leaves(tree)]
    return _to_dataclass(Checker(merged, problems, known), merged.tree, schema, ())


def default_tree(schema: type) -> dict[str, Any]:
    """Return the defaults of a dataclass as a plain tree, without the keys that have none."""
    hints = typing.get_type_hints(schema)
    defaults = {spec.name: _default(spec, hints[spec.name]) for spec in settable(schema)}
    return {name: value for name, value in defaults.items() if not _is_missing(value)}


def settable(schema: type) -> list[dataclasses.Field]:
    """Return the fields of a dataclass that a config may set."""
    return [spec for spec in dataclasses.fields(schema) if spec.init]


def to_tree(value: Any) -> Any:
    """Return a config, or a value in one, as the plain tree of dicts, lists and scalars that YAML can hold."""
    if isinstance(value, Component):
        return {PATH_KEY: value.path, **to_tree(value.args)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {spec.name: to_tree(getattr(value, spec.name)) for spec in settable(type(value))}
    if isinstance(value, dict):
        return {str(key): to_tree(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_tree(item) for item in value]
    if isinstance(value, Enum):
        return value.name
    return str(value) if isinstance(value, Path) else value


def _default(spec: dataclasses.Field, annotation: Any) -> Any:
    if spec.default_factory is not dataclasses.MISSING:
        return to_tree(spec.default_factory())
    if spec.default is dataclasses.MISSING:
        # A nested dataclass without a default of its own is made of its keys' defaults.
        return default_tree(annotation) if coerce.is_nested(annotation) else MISSING
    if spec.default is None and "injected" in spec.metadata and typing.get_origin(annotation) is list:
        return []
    if spec.default == MISSING and "injected" in spec.metadata:
        return {PATH_KEY: MISSING}
    return to_tree(spec.default)


def _is_missing(value: Any) -> bool:
    return isinstance(value, str) and value == MISSING


def _to_dataclass(checker: Checker, tree: dict[str, Any], schema: type, key_path: KeyPath) -> Any:
    specs = {spec.name: spec for spec in settable(schema)}
    hints = typing.get_type_hints(schema)
    for name in tree:
        if name not in specs:
            _add_unknown_key(checker, (*key_path, name), specs)
    read = {}
    for name, spec in specs.items():
        default = _default(spec, hints[name])
        component_spec = None
        if coerce.mentions(hints[name], Component):
            component_spec = ComponentSpec(
                spec.metadata.get("injected", ()), default.get(PATH_KEY) if isinstance(default, dict) else None
            )
        read[name] = _to_value(checker, tree.get(name, default), hints[name], (*key_path, name), component_spec)
    if any(value is INVALID for value in read.values()):
        return INVALID
    config = schema(**read)
    for message in config.check() if hasattr(config, "check") else []:
        # The line to show is that of the first key that the message speaks of.
        keys = [(*key_path, *word.split(".")) for word in re.findall(r"\w+(?:\.\w+)*", message)]
        keys += [key[: len(key_path) + 1] for key in keys]  # where a value is a default, its section
        key = next((key for key in keys if key in checker.merged.provenances), key_path)
        checker.problems.add(checker.merged.nearest(key), message)
    return config


def _add_unknown_key(checker: Checker, key_path: KeyPath, valid: typing.Iterable[str]) -> None:
    # A key at the wrong level is more likely than a misspelling of something else: `lr` for `optimizer.lr`.
    elsewhere = [other for other in checker.known if other[-1] == key_path[-1] and other != key_path]
    hint = (
        f"did you mean '{format_key(elsewhere[0])}'?"
        if elsewhere
        else did_you_mean(str(key_path[-1]), valid, "the keys are")
    )
    checker.problems.add(checker.merged.nearest(key_path), f"unknown key '{format_key(key_path)}': {hint}")


def _to_value(
    checker: Checker, value: Any, annotation: Any, key_path: KeyPath, component_spec: ComponentSpec | None
) -> Any:
    # Returns `value` as its annotation wants it, or INVALID with the reason among the problems.
    if value is INVALID:
        return INVALID
    if _is_missing(value):
        remedy = f"add it to the config, or {format_key(key_path)}=... to the command"
        return checker.add_error(key_path, f"missing key ({coerce.describe(annotation)}): {remedy}")
    kind, arguments = coerce.split(annotation)
    if component_spec and isinstance(value, dict) and PATH_KEY in value:
        members = arguments if kind is coerce.UNION else (kind,)
        if component_spec.anywhere or Component in members:
            return _to_component(checker, value, key_path, component_spec)
    if kind is coerce.UNION:
        return _to_union(checker, value, annotation, arguments, key_path, component_spec)
    if kind is Component:
        return _add_no_component(checker, value, key_path, component_spec or ComponentSpec())
    if coerce.is_nested(kind) and isinstance(value, dict):
        return _to_dataclass(checker, value, kind, key_path)
    anything = kind is Any or isinstance(kind, typing.TypeVar)
    if isinstance(value, list) and (anything or kind in coerce.LISTS):
        wanted = coerce.element_types(kind, arguments, len(value))
        if wanted is None:
            return checker.add_error(key_path, f"expected {coerce.describe(annotation)}, got {len(value)} values")
        items = [
            _to_value(checker, *pair, (*key_path, n), component_spec)
            for n, pair in enumerate(zip(value, wanted, strict=True))
        ]
        broken = any(item is INVALID for item in items)
        return INVALID if broken else tuple(items) if kind is tuple else items
    if isinstance(value, dict) and (anything or kind in coerce.MAPPINGS):
        wanted = arguments[1] if len(arguments) == 2 else Any
        pairs = {key: _to_value(checker, item, wanted, (*key_path, key), component_spec) for key, item in value.items()}
        return INVALID if any(item is INVALID for item in pairs.values()) else pairs
    try:
        return coerce.to_scalar(value, annotation)
    except coerce.WrongType as error:
        return checker.add_error(key_path, str(error))


def _to_union(
    checker: Checker, value: Any, union: Any, members: tuple, key_path: KeyPath, component_spec: ComponentSpec | None
) -> Any:
    if value is None and type(None) in members:
        return None
    members = [member for member in members if member is not type(None)]
    if len(members) == 1:
        return _to_value(checker, value, members[0], key_path, component_spec)
    # The value's own type first: in `int | str` a text stays a text.
    for member in sorted(members, key=lambda member: member is not type(value)):
        trial = Checker(checker.merged)
        result = _to_value(trial, value, member, key_path, component_spec)
        if not trial.problems.found:
            return result
    return checker.add_error(key_path, f"expected {coerce.describe(union)}, got {coerce.describe_value(value)}")


def _add_no_component(checker: Checker, value: Any, key_path: KeyPath, component_spec: ComponentSpec) -> Any:
    if isinstance(value, dict):
        wrong = next((key for key in value if closest(key, [PATH_KEY])), None)
        if wrong:
            return checker.add_error((*key_path, wrong), f"unknown key: did you mean '{PATH_KEY}'?")
        return checker.add_error(key_path, f"no component is named here: add `{PATH_KEY}: dotted.path`")
    if isinstance(value, str):
        path = suggest_path(value, component_spec.default) or value
        return checker.add_error(key_path, f"expected a component: write {format_key((*key_path, PATH_KEY))}={path}")
    off = ", and cannot be null (off)" if value is None else f", got {coerce.describe_value(value)}"
    return checker.add_error(key_path, f"expected a component (a mapping with `{PATH_KEY}`){off}")


def _to_component(checker: Checker, tree: dict[str, Any], key_path: KeyPath, component_spec: ComponentSpec) -> Any:
    path, path_place = tree[PATH_KEY], (*key_path, PATH_KEY)
    if path is INVALID:
        return INVALID
    if _is_missing(path):
        remedy = f"add `{PATH_KEY}: dotted.path` to the config, or {format_key(path_place)}=... to the command"
        return checker.add_error(key_path, f"missing key (a component): {remedy}")
    if not isinstance(path, str):
        return checker.add_error(path_place, f"expected a dotted path, got {coerce.describe_value(path)}")
    try:
        near = suggest_path(path, component_spec.default)
        target = resolve(path)
    except UserError as error:
        return checker.add_error(path_place, f"{error}: did you mean '{near}'?" if near else str(error))
    accepted = parameters(target)
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in accepted.values())
    named = {name: p for name, p in accepted.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
    offered = [name for name in named if name not in component_spec.injected]
    args: dict[str, Any] = {}
    for name, value in tree.items():
        here = (*key_path, name)
        if name == PATH_KEY:
            continue
        if name in named and name in component_spec.injected:
            args[name] = checker.add_error(here, f"the recipe passes '{name}' to {path} itself: remove this key")
        elif name in named or takes_any:
            annotation = named[name].annotation if name in named else Any
            args[name] = _to_value(
                checker, value, annotation, here, ComponentSpec(component_spec.injected, anywhere=True)
            )
        else:
            hint = did_you_mean(name, [*offered, PATH_KEY], "it takes")
            args[name] = checker.add_error(here, f"{path} takes no argument '{name}': {hint}")
    for name in offered:
        if named[name].default is inspect.Parameter.empty and name not in args:
            needed = f"{path} needs the argument '{name}' ({coerce.describe(named[name].annotation)})"
            passed = f" (the recipe passes {', '.join(component_spec.injected)})" if component_spec.injected else ""
            message = f"{format_key(key_path)}: {needed}: add `{name}: ...` here{passed}"
            checker.problems.add(checker.merged.nearest(path_place), message)
    return INVALID if any(value is INVALID for value in args.values()) else Component(path, args)
