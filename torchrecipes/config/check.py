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

from torchrecipes.config import values
from torchrecipes.config.component import MISSING, Component, parameters, resolve, suggest_path
from torchrecipes.config.layers import BROKEN, PATH_KEY, Layers, Place, Problems, leaves, show
from torchrecipes.config.suggest import closest, did_you_mean
from torchrecipes.errors import UserError


@dataclass(frozen=True)
class Slot:
    """A place where a component may stand.

    `runtime` names the arguments that the recipe passes, `default` is the path of the default component; `anywhere` is
    True among a component's arguments, where a component may stand for a value of any type.
    """

    runtime: tuple[str, ...] = ()
    default: str | None = None
    anywhere: bool = False


@dataclass
class Checker:
    """One check: the layers that are checked, the problems found, and the keys that exist anywhere (for hints)."""

    layers: Layers
    problems: Problems = field(default_factory=Problems)
    known: list[Place] = field(default_factory=list)

    def complain(self, place: Place, message: str) -> Any:
        """Note a problem with the value at `place`, and return what stands for the value from here on."""
        self.problems.add(self.layers.nearest(place), f"{show(place)}: {message}")
        return BROKEN


def check_config(layers: Layers, schema: type, problems: Problems) -> Any:
    """Return the instance of the dataclass `schema` that the tree stands for, or BROKEN; problems go to `problems`.

    A dataclass with a method `check() -> list[str]` is asked, last, for problems that need more than one key.
    """
    known = [place for tree in (default_tree(schema), layers.tree) for place, _ in leaves(tree)]
    return _to_dataclass(Checker(layers, problems, known), layers.tree, schema, ())


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
        return default_tree(annotation) if values.is_nested(annotation) else MISSING
    if spec.default is None and "runtime" in spec.metadata and typing.get_origin(annotation) is list:
        return []
    if spec.default == MISSING and "runtime" in spec.metadata:
        return {PATH_KEY: MISSING}
    return to_tree(spec.default)


def _is_missing(value: Any) -> bool:
    return isinstance(value, str) and value == MISSING


def _to_dataclass(checker: Checker, tree: dict[str, Any], schema: type, place: Place) -> Any:
    specs = {spec.name: spec for spec in settable(schema)}
    hints = typing.get_type_hints(schema)
    for name in tree:
        if name not in specs:
            _complain_unknown_key(checker, (*place, name), specs)
    read = {}
    for name, spec in specs.items():
        default = _default(spec, hints[name])
        slot = None
        if values.mentions(hints[name], Component):
            slot = Slot(spec.metadata.get("runtime", ()), default.get(PATH_KEY) if isinstance(default, dict) else None)
        read[name] = _to_value(checker, tree.get(name, default), hints[name], (*place, name), slot)
    if any(value is BROKEN for value in read.values()):
        return BROKEN
    config = schema(**read)
    for message in config.check() if hasattr(config, "check") else []:
        # The line to show is that of the first key that the message speaks of.
        keys = [(*place, *word.split(".")) for word in re.findall(r"\w+(?:\.\w+)*", message)]
        keys += [key[: len(place) + 1] for key in keys]  # where a value is a default, its section
        key = next((key for key in keys if key in checker.layers.origins), place)
        checker.problems.add(checker.layers.nearest(key), message)
    return config


def _complain_unknown_key(checker: Checker, place: Place, valid: typing.Iterable[str]) -> None:
    # A key at the wrong level is more likely than a misspelling of something else: `lr` for `optimizer.lr`.
    elsewhere = [other for other in checker.known if other[-1] == place[-1] and other != place]
    hint = f"did you mean '{show(elsewhere[0])}'?" if elsewhere else did_you_mean(str(place[-1]), valid, "the keys are")
    checker.problems.add(checker.layers.nearest(place), f"unknown key '{show(place)}': {hint}")


def _to_value(checker: Checker, value: Any, annotation: Any, place: Place, slot: Slot | None) -> Any:
    # Returns `value` as its annotation wants it, or BROKEN with the reason among the problems.
    if value is BROKEN:
        return BROKEN
    if _is_missing(value):
        remedy = f"add it to the config, or {show(place)}=... to the command"
        return checker.complain(place, f"missing key ({values.describe(annotation)}): {remedy}")
    kind, arguments = values.split(annotation)
    if slot and isinstance(value, dict) and PATH_KEY in value:
        members = arguments if kind is values.UNION else (kind,)
        if slot.anywhere or Component in members:
            return _to_component(checker, value, place, slot)
    if kind is values.UNION:
        return _to_union(checker, value, annotation, arguments, place, slot)
    if kind is Component:
        return _complain_no_component(checker, value, place, slot or Slot())
    if values.is_nested(kind) and isinstance(value, dict):
        return _to_dataclass(checker, value, kind, place)
    anything = kind is Any or isinstance(kind, typing.TypeVar)
    if isinstance(value, list) and (anything or kind in values.LISTS):
        wanted = values.element_types(kind, arguments, len(value))
        if wanted is None:
            return checker.complain(place, f"expected {values.describe(annotation)}, got {len(value)} values")
        items = [_to_value(checker, *pair, (*place, n), slot) for n, pair in enumerate(zip(value, wanted, strict=True))]
        broken = any(item is BROKEN for item in items)
        return BROKEN if broken else tuple(items) if kind is tuple else items
    if isinstance(value, dict) and (anything or kind in values.MAPPINGS):
        wanted = arguments[1] if len(arguments) == 2 else Any
        pairs = {key: _to_value(checker, item, wanted, (*place, key), slot) for key, item in value.items()}
        return BROKEN if any(item is BROKEN for item in pairs.values()) else pairs
    try:
        return values.to_scalar(value, annotation)
    except values.WrongType as error:
        return checker.complain(place, str(error))


def _to_union(checker: Checker, value: Any, union: Any, members: tuple, place: Place, slot: Slot | None) -> Any:
    if value is None and type(None) in members:
        return None
    members = [member for member in members if member is not type(None)]
    if len(members) == 1:
        return _to_value(checker, value, members[0], place, slot)
    # The value's own type first: in `int | str` a text stays a text.
    for member in sorted(members, key=lambda member: member is not type(value)):
        trial = Checker(checker.layers)
        result = _to_value(trial, value, member, place, slot)
        if not trial.problems.found:
            return result
    return checker.complain(place, f"expected {values.describe(union)}, got {values.got(value)}")


def _complain_no_component(checker: Checker, value: Any, place: Place, slot: Slot) -> Any:
    if isinstance(value, dict):
        wrong = next((key for key in value if closest(key, [PATH_KEY])), None)
        if wrong:
            return checker.complain((*place, wrong), f"unknown key: did you mean '{PATH_KEY}'?")
        return checker.complain(place, f"no component is named here: add `{PATH_KEY}: dotted.path`")
    if isinstance(value, str):
        path = suggest_path(value, slot.default) or value
        return checker.complain(place, f"expected a component: write {show((*place, PATH_KEY))}={path}")
    off = ", and cannot be null (off)" if value is None else f", got {values.got(value)}"
    return checker.complain(place, f"expected a component (a mapping with `{PATH_KEY}`){off}")


def _to_component(checker: Checker, tree: dict[str, Any], place: Place, slot: Slot) -> Any:
    path, path_place = tree[PATH_KEY], (*place, PATH_KEY)
    if path is BROKEN:
        return BROKEN
    if _is_missing(path):
        remedy = f"add `{PATH_KEY}: dotted.path` to the config, or {show(path_place)}=... to the command"
        return checker.complain(place, f"missing key (a component): {remedy}")
    if not isinstance(path, str):
        return checker.complain(path_place, f"expected a dotted path, got {values.got(path)}")
    try:
        near = suggest_path(path, slot.default)
        target = resolve(path)
    except UserError as error:
        return checker.complain(path_place, f"{error}: did you mean '{near}'?" if near else str(error))
    accepted = parameters(target)
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in accepted.values())
    named = {name: p for name, p in accepted.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
    offered = [name for name in named if name not in slot.runtime]
    args: dict[str, Any] = {}
    for name, value in tree.items():
        here = (*place, name)
        if name == PATH_KEY:
            continue
        if name in named and name in slot.runtime:
            args[name] = checker.complain(here, f"the recipe passes '{name}' to {path} itself: remove this key")
        elif name in named or takes_any:
            annotation = named[name].annotation if name in named else Any
            args[name] = _to_value(checker, value, annotation, here, Slot(slot.runtime, anywhere=True))
        else:
            hint = did_you_mean(name, [*offered, PATH_KEY], "it takes")
            args[name] = checker.complain(here, f"{path} takes no argument '{name}': {hint}")
    for name in offered:
        if named[name].default is inspect.Parameter.empty and name not in args:
            needed = f"{path} needs the argument '{name}' ({values.describe(named[name].annotation)})"
            passed = f" (the recipe passes {', '.join(slot.runtime)})" if slot.runtime else ""
            message = f"{show(place)}: {needed}: add `{name}: ...` here{passed}"
            checker.problems.add(checker.layers.nearest(path_place), message)
    return BROKEN if any(value is BROKEN for value in args.values()) else Component(path, args)
