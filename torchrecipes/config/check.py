"""Checks a merged tree against a recipe's `Config` dataclass and turns it into an instance, gathering every problem.

A component's arguments are checked like keys, against the signature and the annotations of the callable it names.
"""

import dataclasses
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

from torchrecipes.config import coerce
from torchrecipes.config.components import MISSING, Component, parameters, resolve, suggest_path
from torchrecipes.config.merge import (
    DEFAULT,
    INVALID,
    PATH_KEY,
    KeyPath,
    MergedConfig,
    Problems,
    Provenance,
    format_key,
    leaves,
)
from torchrecipes.config.metadata import Formerly, Range
from torchrecipes.config.shared_keys import check_shared_keys
from torchrecipes.config.suggest import closest, did_you_mean
from torchrecipes.errors import UserError


@dataclass(frozen=True)
class ComponentSpec:
    """A place where a component may stand.

    `injected` names the arguments that the recipe passes, `default` is the path of the default component; `anywhere` is
    True among a component's arguments, where a component may stand for a value of any type.
    """

    injected: tuple[str, ...] = ()
    default: str | None = None
    anywhere: bool = False


@dataclass
class Checker:
    """One check: the merged config, the problems found, and the keys that exist anywhere (for hints)."""

    merged: MergedConfig
    problems: Problems = field(default_factory=Problems)
    known: list[KeyPath] = field(default_factory=list)

    def add_error(self, key_path: KeyPath, problem: str, hint: str | None = None, code: str = "wrong_type") -> Any:
        """Add a problem with the value at `key_path`, and return the mark of an invalid value."""
        self.problems.add(self.merged.nearest(key_path), problem, key=format_key(key_path), hint=hint, code=code)
        return INVALID


def check_config(
    merged: MergedConfig, schema: type, problems: Problems, check: Callable[[Any], list[UserError]] | None = None
) -> Any:
    """Return the instance of the dataclass `schema` that the tree describes, or INVALID; problems go to `problems`.

    Last come problems that need more than one key: those of `check_shared_keys`, those that a method
    `check() -> list[UserError]` of the dataclass or of a group in it returns, and those of `check`.
    """
    known = [key_path for tree in (default_tree(schema), merged.tree) for key_path, _ in leaves(tree)]
    checker = Checker(merged, problems, known)
    config = _to_dataclass(checker, merged.tree, schema, ())
    if config is not INVALID:
        _add_all(checker, (), check_shared_keys(config))
        _add_all(checker, (), check(config) if check else [])
    return config


def default_tree(schema: type) -> dict[str, Any]:
    """Return the defaults of a dataclass as a plain tree, without the keys that have none."""
    hints = annotations(schema)
    defaults = {spec.name: _default(spec, hints[spec.name]) for spec in settable(schema)}
    return {name: value for name, value in defaults.items() if not _is_missing(value)}


def annotations(schema: type) -> dict[str, Any]:
    """Return the annotation of every field of a dataclass, with its metadata."""
    return typing.get_type_hints(schema, include_extras=True)


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
    kind, _ = coerce.split(annotation)
    if spec.default_factory is not dataclasses.MISSING:
        return to_tree(spec.default_factory())
    if spec.default is dataclasses.MISSING:
        # A nested dataclass without a default of its own is made of its keys' defaults.
        return default_tree(kind) if coerce.is_nested(kind) else MISSING
    if spec.default is None and "injected" in spec.metadata and kind is list:
        return []
    if spec.default == MISSING and "injected" in spec.metadata:
        return {PATH_KEY: MISSING}
    return to_tree(spec.default)


def _is_missing(value: Any) -> bool:
    return isinstance(value, str) and value == MISSING


def _to_dataclass(checker: Checker, tree: dict[str, Any], schema: type, key_path: KeyPath) -> Any:
    specs = {spec.name: spec for spec in settable(schema)}
    hints = annotations(schema)
    for name in tree:
        if name not in specs:
            _add_unknown_key(checker, (*key_path, name), specs)
    read = {}
    for name, spec in specs.items():
        here = (*key_path, name)
        default = _default(spec, hints[name])
        component_spec = None
        if coerce.mentions(hints[name], Component):
            path = default.get(PATH_KEY) if isinstance(default, dict) else None
            component_spec = ComponentSpec(spec.metadata.get("injected", ()), path)
        value, replaced_by = tree.get(name, default), spec.metadata.get("replaced_by")
        if replaced_by:
            value = _replace(checker, value, spec, tree, key_path)
        is_replaced = replaced_by and value is None
        read[name] = None if is_replaced else _to_value(checker, value, hints[name], here, component_spec)
    if any(value is INVALID for value in read.values()):
        return INVALID
    config = schema(**read)
    _add_all(checker, key_path, config.check() if hasattr(config, "check") else [])
    return config


def _replace(checker: Checker, value: Any, spec: dataclasses.Field, tree: dict[str, Any], key_path: KeyPath) -> Any:
    # Where the other key, such as `init_from`, is set, it stands for this component, whose value is None then.
    here, other = (*key_path, spec.name), spec.metadata["replaced_by"]
    other_path = (*key_path, other)
    folder = tree.get(other)
    if folder is INVALID:
        return value
    if folder is None:
        if value is not None:
            return value
        return checker.add_error(here, f"it can only be null where {other} is set", code="missing_key")
    is_explicit = any(place[: len(here)] == here for place in checker.merged.provenances)
    if not is_explicit:
        checker.merged.provenances[here] = Provenance(f"replaced by {other}", DEFAULT.rank)
    if value is None or not is_explicit:
        return None
    file = spec.metadata["replaced_if"]
    if file and not (isinstance(folder, str) and _holds(Path(folder), file)):
        return value
    return checker.add_error(
        here,
        f"{other}={folder} ({checker.merged.nearest(other_path).where}) has its own {spec.name}",
        hint=f"Keep one of them: {format_key(here)}=null or {format_key(other_path)}=null",
        code="contradiction",
    )


def _holds(folder: Path, file: str) -> bool:
    # A run's folder has it in its checkpoints.
    return (folder / file).is_file() or any(folder.glob(f"checkpoints/step-*/{file}"))


def _add_all(checker: Checker, key_path: KeyPath, errors: list[UserError]) -> None:
    for error in errors:
        keys = tuple(error.key.split(".")) if error.key else ()
        located = error.under(format_key(key_path)) if key_path else error
        checker.problems.add_error(checker.merged.nearest((*key_path, *keys)), located)


def _add_unknown_key(checker: Checker, key_path: KeyPath, valid: typing.Iterable[str]) -> None:
    # A key at the wrong level is more likely than a misspelling of something else: `lr` for `optimizer.lr`.
    elsewhere = [other for other in checker.known if other[-1] == key_path[-1] and other != key_path]
    hint = (
        f"Did you mean '{format_key(elsewhere[0])}'?"
        if elsewhere
        else did_you_mean(str(key_path[-1]), valid, "The keys are")
    )
    checker.add_error(key_path, "unknown key", hint, "unknown_key")


def _to_value(
    checker: Checker, value: Any, annotation: Any, key_path: KeyPath, component_spec: ComponentSpec | None
) -> Any:
    # Returns `value` converted to its annotation, or INVALID after adding a problem.
    if value is INVALID:
        return INVALID
    if typing.get_origin(annotation) is Annotated:
        plain, *metadata = typing.get_args(annotation)
        for former in metadata:
            for old, new in former.values if isinstance(former, Formerly) else ():
                if type(value) is type(old) and value == old:
                    problem = f"{coerce.describe_value(value)} is a value of earlier versions"
                    return checker.add_error(key_path, problem, f"Write {new}")
        result = _to_value(checker, value, plain, key_path, component_spec)
        for bounds in metadata:
            is_number = isinstance(result, int | float) and not isinstance(result, bool)
            if isinstance(bounds, Range) and is_number and result not in bounds:
                return checker.add_error(key_path, f"{result} is out of range", f"It must be {bounds}", "out_of_range")
        return result
    if _is_missing(value):
        remedy = f"Add it to the config, or {format_key(key_path)}=... to the command"
        return checker.add_error(key_path, f"missing key ({coerce.describe(annotation)})", remedy, "missing_key")
    kind, arguments = coerce.split(annotation)
    if kind is coerce.UNION:
        return _to_union(checker, value, annotation, arguments, key_path, component_spec)
    if (
        component_spec
        and isinstance(value, dict)
        and PATH_KEY in value
        and (component_spec.anywhere or kind is Component)
    ):
        return _to_component(checker, value, key_path, component_spec)
    if kind is Component:
        component_spec = component_spec or ComponentSpec()
        if isinstance(value, str):  # a bare dotted path
            checker.merged.provenances.setdefault((*key_path, PATH_KEY), checker.merged.nearest(key_path))
            return _to_component(checker, {PATH_KEY: value}, key_path, component_spec)
        return _add_no_component(checker, value, key_path)
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
    is_class = isinstance(kind, type) and kind not in (*coerce.LISTS, *coerce.MAPPINGS)
    if component_spec and isinstance(value, dict) and is_class and any(closest(key, [PATH_KEY]) for key in value):
        return _add_no_component(checker, value, key_path)  # an object of a class, whose `_component_` is misspelt
    try:
        return coerce.to_scalar(value, annotation)
    except coerce.WrongType as error:
        return checker.add_error(key_path, error.problem, error.hint)


def _to_union(
    checker: Checker, value: Any, union: Any, members: tuple, key_path: KeyPath, component_spec: ComponentSpec | None
) -> Any:
    if value is None and type(None) in members:
        return None
    if (
        component_spec
        and isinstance(value, dict)
        and PATH_KEY in value
        and (component_spec.anywhere or _takes_component(members))
    ):
        return _to_component(checker, value, key_path, component_spec)
    off = "; null switches it off" if type(None) in members else ""
    members = [member for member in members if member is not type(None)]
    failed = None
    # The value's own type first: in `int | str` a text stays a text.
    for member in sorted(members, key=lambda member: coerce.split(member)[0] is not type(value)):
        trial = Checker(checker.merged, known=checker.known)
        result = _to_value(trial, value, member, key_path, component_spec)
        if not trial.problems.found:
            return result
        if len(members) == 1 or any(error.code == "out_of_range" for _, error in trial.problems.found):
            failed = trial
    if failed is None:
        return checker.add_error(key_path, f"expected {coerce.describe(union)}, got {coerce.describe_value(value)}")
    for provenance, error in failed.problems.found:
        if error.code == "out_of_range" and error.key == format_key(key_path):
            error.hint += off
        checker.problems.add_error(provenance, error)
    return INVALID


def _takes_component(members: tuple) -> bool:
    return any(coerce.split(member)[0] is Component for member in members)


def _add_no_component(checker: Checker, value: Any, key_path: KeyPath) -> Any:
    if isinstance(value, dict):
        wrong = next((key for key in value if closest(key, [PATH_KEY])), None)
        if wrong:
            return checker.add_error((*key_path, wrong), "unknown key", f"Did you mean '{PATH_KEY}'?", "unknown_key")
        return checker.add_error(
            key_path, "no component is named here", f"Add `{PATH_KEY}: dotted.path`", "missing_key"
        )
    off = ", and cannot be null (off)" if value is None else f", got {coerce.describe_value(value)}"
    return checker.add_error(key_path, f"expected a component (a mapping with `{PATH_KEY}`){off}")


def _to_component(checker: Checker, tree: dict[str, Any], key_path: KeyPath, component_spec: ComponentSpec) -> Any:
    path, path_place = tree[PATH_KEY], (*key_path, PATH_KEY)
    if path is INVALID:
        return INVALID
    if _is_missing(path):
        remedy = f"Add `{PATH_KEY}: dotted.path` to the config, or {format_key(path_place)}=... to the command"
        return checker.add_error(key_path, "missing key (a component)", remedy, "missing_key")
    if not isinstance(path, str):
        return checker.add_error(path_place, f"expected a dotted path, got {coerce.describe_value(path)}")
    try:
        near = suggest_path(path, component_spec.default)
        target = resolve(path)
    except UserError as error:
        hint = f"Did you mean '{near}'?" if near else error.hint
        return checker.add_error(path_place, error.problem, hint, "unknown_component")
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
            args[name] = checker.add_error(
                here, f"the recipe passes '{name}' to {path} itself", "Remove this key", "injected_argument"
            )
        elif name in named or takes_any:
            annotation = named[name].annotation if name in named else Any
            nested = ComponentSpec(component_spec.injected, anywhere=True)
            args[name] = _to_value(checker, value, annotation, here, nested)
        else:
            hint = did_you_mean(name, [*offered, PATH_KEY], "It takes")
            args[name] = checker.add_error(here, f"{path} takes no argument '{name}'", hint, "unknown_argument")
    for name in offered:
        if named[name].default is inspect.Parameter.empty and name not in args:
            passed = f" (the recipe passes {', '.join(component_spec.injected)})" if component_spec.injected else ""
            checker.problems.add(
                checker.merged.nearest(path_place),
                f"{path} needs the argument '{name}' ({coerce.describe(named[name].annotation)})",
                key=format_key(key_path),
                hint=f"Add `{name}: ...` here{passed}",
                code="missing_argument",
            )
    return INVALID if any(value is INVALID for value in args.values()) else Component(path, args)
