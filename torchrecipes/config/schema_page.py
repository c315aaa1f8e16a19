"""Generates the reference page of a config: a table of its keys from the annotations and comments of its dataclass."""

import ast
import inspect
import io
import textwrap
import tokenize
from typing import Annotated, Any, Literal, get_args, get_origin

from torchrecipes.config import coerce
from torchrecipes.config.check import annotations, default_tree
from torchrecipes.config.components import Component
from torchrecipes.config.dump import inline
from torchrecipes.config.merge import PATH_KEY
from torchrecipes.config.metadata import MAY_CHANGE, Range, Unit

_NAMES = {int: "integer", float: "number", bool: "boolean", str: "text", type(None): "`null`", Component: "component"}


def markdown(schema: type) -> str:
    """Return a Markdown table per group of keys: key, type with range and unit, default, resume, description.

    Args:
        schema: a recipe's `Config`. The comment beside a field, in its source file, is its description.
    """
    sections = [("", schema, False)]
    tables = []
    while sections:
        prefix, group, may_change = sections.pop(0)
        text = f"## `{prefix.rstrip('.')}`\n\n{inspect.cleandoc(group.__doc__)}\n\n" if prefix else ""
        lines = ["| key | type | default | may change on resume | description |", "|---|---|---|---|---|"]
        comments, defaults = field_comments(group), default_tree(group)
        for name, annotation in annotations(group).items():
            changes = may_change or MAY_CHANGE in _metadata(annotation)
            kind, _ = coerce.split(annotation)
            if coerce.is_nested(kind):
                sections.append((f"{prefix}{name}.", kind, changes))
                continue
            default = f"`{_default(defaults[name])}`" if name in defaults else "required"
            cells = (f"`{prefix}{name}`", _type(annotation), default, "yes" if changes else "", comments.get(name, ""))
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        tables.append(text + "\n".join(lines) + "\n")
    return "\n".join(tables)


def field_comments(schema: type) -> dict[str, str]:
    """Return the trailing comments of a dataclass' fields, from its source."""
    source = textwrap.dedent(inspect.getsource(schema))
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    fields = [node for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)]
    return {
        node.target.id: " ".join(comments[n] for n in range(node.lineno, node.end_lineno + 1) if n in comments)
        for node in fields
    }


def _metadata(annotation: Any) -> tuple:
    return get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        words = [_type(get_args(annotation)[0])]
        words += [str(item) for item in _metadata(annotation) if isinstance(item, Range)]
        return " ".join([*words, *(f"({item.name})" for item in _metadata(annotation) if isinstance(item, Unit))])
    kind, arguments = coerce.split(annotation)
    if kind is coerce.UNION:
        return " or ".join(_type(member) for member in arguments)
    if kind is Literal:
        return " or ".join(f"`{choice}`" for choice in arguments)
    if kind in coerce.LISTS and arguments:
        return "list of " + ", ".join(_type(argument) for argument in arguments if argument is not ...)
    if kind in coerce.MAPPINGS:
        return "mapping"
    return _NAMES.get(kind, getattr(kind, "__name__", str(kind)))


def _default(value: Any) -> str:
    if isinstance(value, dict) and PATH_KEY in value:
        arguments = ", ".join(f"{name}={inline(item)}" for name, item in value.items() if name != PATH_KEY)
        return f"{value[PATH_KEY]}({arguments})" if arguments else value[PATH_KEY]
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return ", ".join(_default(item) for item in value)
    return inline(value)
