"""Compares a stored config with the one that is to resume its run."""

from typing import Annotated, Any, get_args, get_origin

from torchrecipes.config import coerce
from torchrecipes.config.check import annotations, default_tree
from torchrecipes.config.merge import format_key
from torchrecipes.config.metadata import MAY_CHANGE

ABSENT = "absent"


def changed_keys(saved: dict[str, Any], current: dict[str, Any], schema: type) -> dict[str, tuple[Any, Any]]:
    """Return the keys on which two configs differ and that a resumed run may not change.

    Args:
        saved: a config as a plain tree, such as `yaml.safe_load` of a run's config.yaml. It states every key that its
            recipe had: a key of `schema` that it lacks is newer than the run, and has its default there.
        current: the other one.
        schema: a recipe's `Config`. A difference under a field that is annotated `MayChange` is allowed, in nested
            groups too.

    Returns:
        Dotted keys, sorted, with the saved and the current value; `ABSENT` where one config lacks the key.
    """
    may_change = _may_change(schema, ())
    old, new = _flatten(_with_newer(saved, schema), ()), _flatten(current, ())
    return {
        format_key(key): (old.get(key, ABSENT), new.get(key, ABSENT))
        for key in sorted(old.keys() | new.keys(), key=format_key)
        if old.get(key, ABSENT) != new.get(key, ABSENT) and not any(key[: len(start)] == start for start in may_change)
    }


def _with_newer(saved: dict[str, Any], schema: type) -> dict[str, Any]:
    result = default_tree(schema) | saved
    for name, annotation in annotations(schema).items():
        kind, _ = coerce.split(annotation)
        if coerce.is_nested(kind) and isinstance(saved.get(name), dict):
            result[name] = _with_newer(saved[name], kind)
    return result


def _may_change(schema: type, key_path: tuple[str, ...]) -> list[tuple[str, ...]]:
    found = []
    for name, annotation in annotations(schema).items():
        kind, _ = coerce.split(annotation)
        if get_origin(annotation) is Annotated and MAY_CHANGE in get_args(annotation)[1:]:
            found.append((*key_path, name))
        elif coerce.is_nested(kind):
            found += _may_change(kind, (*key_path, name))
    return found


def _flatten(node: Any, key_path: tuple[str, ...]) -> dict[tuple[str, ...], Any]:
    if isinstance(node, dict) and node:
        return {k: v for key, item in node.items() for k, v in _flatten(item, (*key_path, str(key))).items()}
    return {key_path: node}
