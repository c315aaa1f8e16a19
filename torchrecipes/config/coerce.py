"""Converts a YAML value to the type of an annotation, and describes both in error messages."""

import dataclasses
import types
import typing
from collections import abc
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union

from torchrecipes.config.components import Component
from torchrecipes.config.scalars import PlainNone, none_hint, read_number
from torchrecipes.config.suggest import closest

UNION = Union
LISTS = (list, tuple, abc.Sequence, abc.Iterable, abc.Collection)
MAPPINGS = (dict, abc.Mapping, abc.MutableMapping)
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    type(None): "null (off)",
}


class WrongType(Exception):
    """A value is not what its annotation asks for: what was expected, and how to write it."""

    def __init__(self, problem: str, hint: str | None = None):
        super().__init__(problem)
        self.problem, self.hint = problem, hint


def split(annotation: Any) -> tuple[Any, tuple]:
    """Return the kind of an annotation and its arguments: (list, (int,)) of `list[int]`, (UNION, members)."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return split(arguments[0])
    if origin is Union or origin is types.UnionType:
        return UNION, arguments
    if annotation is None:
        return type(None), ()
    return origin or annotation, arguments


def mentions(annotation: Any, kind: type) -> bool:
    """Whether `kind` is part of an annotation: Component of `list[Component] | None`."""
    return annotation is kind or any(mentions(argument, kind) for argument in typing.get_args(annotation))


def is_nested(annotation: Any) -> bool:
    """Whether an annotation is a dataclass that stands for a group of keys."""
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation) and annotation is not Component


def element_types(kind: Any, arguments: tuple, count: int) -> list[Any] | None:
    """Return the annotation of each of `count` list elements, or None where `tuple[int, int]` wants another number."""
    if kind is tuple and arguments and arguments[-1] is not Ellipsis:
        return list(arguments) if len(arguments) == count else None
    return [arguments[0] if arguments else Any] * count


def to_scalar(value: Any, annotation: Any) -> Any:
    """Return `value`, neither a list nor a mapping that `annotation` allows, converted to `annotation`.

    A class that YAML has no values of, such as one of a library, is only satisfied by an instance.

    Raises:
        WrongType: it cannot be converted.
    """
    kind, arguments = split(annotation)
    if isinstance(value, PlainNone):
        if kind is not Literal or "none" not in arguments:
            raise WrongType("none is text to YAML", none_hint(value))
        return str(value)
    problem = f"expected {describe(annotation)}, got {describe_value(value)}"
    hint = "This key cannot be off" if value is None else None
    if kind is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        texts = [choice for choice in arguments if isinstance(choice, str)]
        near = closest(value, texts) if isinstance(value, str) else None
        hint = f"Did you mean '{near}'?" if near else hint
    elif kind is int or kind is float:
        number = read_number(value) if isinstance(value, str) else value
        if isinstance(number, int | float) and not isinstance(number, bool):
            if kind is float or isinstance(number, int) or number.is_integer():
                return kind(number)
        elif isinstance(value, str):
            hint = "A number may be written 10000, 10_000, 10k, 2.5M, 10B or 1e-3"
    elif kind is bool:
        if isinstance(value, bool):
            return value
    elif kind is str or kind is Path:
        if isinstance(value, str):
            return kind(value)
        if isinstance(value, bool | int | float):
            hint = "Put it in quotes if text is meant"
    elif isinstance(kind, type) and issubclass(kind, Enum):
        for member in kind:
            if value in (member.name, member.value):
                return member
    elif kind in LISTS or kind in MAPPINGS:
        if kind in LISTS and isinstance(value, bool | int | float | str):
            hint = "Write [...] around it"
    elif not isinstance(kind, type) or kind is Any or _is_instance(value, kind):
        return value
    raise WrongType(problem, hint)


def describe(annotation: Any) -> str:
    """Return what an annotation allows, in a user's words."""
    kind, arguments = split(annotation)
    if kind is UNION:
        return " or ".join(describe(member) for member in arguments)
    if kind is Literal:
        return "one of " + ", ".join(repr(choice) for choice in arguments)
    if kind in _WORDS:
        return _WORDS[kind]
    if kind is tuple and arguments and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)} values"
    if kind in LISTS:
        return f"a list, each element {describe(arguments[0])}" if arguments and arguments[0] is not Any else "a list"
    if kind in MAPPINGS or is_nested(kind):
        return "a mapping of keys to values"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(member.name for member in kind)
    if kind is Component:
        return "a component"
    if isinstance(kind, type) and kind is not Any:
        return f"a component that makes a {kind.__name__}"
    return "any value"


def describe_value(value: Any) -> str:
    """Return what a value is, in a user's words."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text '{value if len(value) <= 60 else value[:57] + '...'}'"
    return "a list" if isinstance(value, list) else "a mapping"


def _is_instance(value: Any, kind: type) -> bool:
    try:
        return isinstance(value, kind)
    except TypeError:  # a Protocol that is not runtime_checkable
        return False
