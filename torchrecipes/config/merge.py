"""Merges defaults, a YAML file and overrides into one tree that knows the provenance of each value.

A tree is made of dicts, lists and scalars; a key path is a tuple of keys, such as ("optimizer", "lr"). OmegaConf keeps
no line numbers, so the merge is done here; OmegaConf resolves `${...}`.
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchrecipes.errors import UserError

KeyPath = tuple[str | int, ...]
PATH_KEY = "_component_"
# Stands in the tree for a value that could not be read; it has been reported, and is not reported again.
INVALID: Any = object()
_MAX_EXPANSION = 100_000  # characters of all interpolated values; more is a mistake or an attack


@dataclass(frozen=True)
class Provenance:
    """Where a value is from: `default`, `file:line` or `override '...'`, and its rank when problems are sorted."""

    where: str
    rank: tuple[int, int]

    @property
    def short(self) -> str:
        """The provenance as `to_yaml` writes it: default, file:line or override."""
        return "override" if self.rank[0] == 1 else self.where


DEFAULT = Provenance("default", (2, 0))


@dataclass
class Problems:
    """The mistakes in a config, gathered in one pass."""

    found: list[tuple[Provenance, UserError]] = field(default_factory=list)

    def add(self, provenance: Provenance, problem: str, **fields: Any) -> None:
        """Add a mistake; the same one twice counts once. `fields` are those of `UserError`: key, hint, code."""
        self.add_error(provenance, UserError(problem, **fields))

    def add_error(self, provenance: Provenance, error: UserError) -> None:
        """Add a mistake that is an error already."""
        if not any(where == provenance and str(other) == str(error) for where, other in self.found):
            self.found.append((provenance, error))

    def raise_all(self, title: str) -> None:
        """Raise one UserError that lists every mistake, sorted by line, then the overrides in their order; if any.

        Its code is `invalid_config`, its `problems` have the fields of each.
        """
        if not self.found:
            return
        ordered = sorted(self.found, key=lambda problem: problem[0].rank)
        lines = [f"  {provenance.where}: {error}" for provenance, error in ordered]
        count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
        raise UserError(
            "\n".join([f"{title}: {count}", *lines]), code="invalid_config", problems=[error for _, error in ordered]
        )


@dataclass
class MergedConfig:
    """The merged tree, the provenance of each value that is not a default, and the text of interpolations
    that read the environment."""

    tree: dict[str, Any]
    provenances: dict[KeyPath, Provenance] = field(default_factory=dict)
    interpolations: dict[KeyPath, str] = field(default_factory=dict)

    def nearest(self, key_path: KeyPath) -> Provenance:
        """Return the provenance of the value at `key_path`, or else of the nearest key above it that has one."""
        for end in range(len(key_path), -1, -1):
            if key_path[:end] in self.provenances:
                return self.provenances[key_path[:end]]
        return DEFAULT

    def get(self, key_path: KeyPath) -> Any:
        """Return what is at `key_path`, or None."""
        found: Any = self.tree
        for key in key_path:
            if isinstance(found, dict):
                found = found.get(key)
            elif isinstance(found, list) and isinstance(key, int) and key < len(found):
                found = found[key]
            else:
                return None
        return found

    def merge(self, value: Any, provenances: dict[KeyPath, Provenance], key_path: KeyPath = ()) -> None:
        """Merge `value`, whose provenances are `provenances`, into `key_path`: mappings merge, anything else replaces.

        A `_component_` that differs from the one below drops its arguments, which belonged to the other one.
        """
        below = self.get(key_path)
        if isinstance(value, dict) and isinstance(below, dict):
            self.provenances[key_path] = provenances[key_path]
            for key in sorted(value, key=lambda key: key != PATH_KEY):
                self.merge(value[key], provenances, (*key_path, key))
            return
        holder = self.get(key_path[:-1])
        if key_path[-1] == PATH_KEY and value != below:
            holder.clear()
            self._forget_below(key_path[:-1])
        self._forget_below(key_path)
        holder[key_path[-1]] = value
        self.provenances.update(
            {key: provenance for key, provenance in provenances.items() if key[: len(key_path)] == key_path}
        )

    def _forget_below(self, key_path: KeyPath) -> None:
        depth = len(key_path)
        for key in [key for key in self.provenances if len(key) > depth and key[:depth] == key_path]:
            del self.provenances[key]


def interpolate(merged: MergedConfig, problems: Problems) -> None:
    """Replace every `${other.key}` and `${oc.env:NAME}` in the tree by its value.

    `merged.interpolations` keeps the text of those whose value is from the environment, directly or by way of another
    key: it may be a secret.
    """
    places = [key_path for key_path, value in leaves(merged.tree) if isinstance(value, str) and "${" in value]
    if not places:
        return
    # Here, because most configs have no interpolation and this import is most of the time of a check.
    from omegaconf import OmegaConf
    from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

    def add_error(key_path: KeyPath, error: Exception) -> None:
        reason = str(error).split("\n", 1)[0]
        where, hint = merged.nearest(key_path), "For a plain '${' write '\\${'"
        problems.add(where, reason, key=format_key(key_path), hint=hint, code="bad_interpolation")
        merged.get(key_path[:-1])[key_path[-1]] = INVALID

    texts = {key_path: merged.get(key_path) for key_path in places}
    sizes: dict[str, int] = {}
    total = 0
    for key_path in list(places):
        try:
            size = _expanded_size(merged, merged.get(key_path), sizes)
            if total + size > _MAX_EXPANSION:
                raise OmegaConfBaseException(f"interpolations expand to more than {_MAX_EXPANSION:,} characters")
            total += size
            OmegaConf.create({"value": merged.get(key_path)})
        except OmegaConfBaseException as error:  # a `${` without its `}` is refused on sight
            add_error(key_path, error)
            places.remove(key_path)
    resolved = OmegaConf.create(merged.tree, flags={"allow_objects": True})
    for key_path in places:
        try:
            value: Any = resolved
            for key in key_path:
                value = value[key]
            value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            merged.get(key_path[:-1])[key_path[-1]] = value
        except InterpolationToMissingValueError:  # the missing key is reported itself
            merged.get(key_path[:-1])[key_path[-1]] = INVALID
        except OmegaConfBaseException as error:
            add_error(key_path, error)
    names = {name for text in texts.values() for name in re.findall(r"oc\.env:\s*(\w+)", text)}
    secrets = [os.environ[name] for name in names if os.environ.get(name)]
    for key_path, text in texts.items():
        value = str(merged.get(key_path))
        if "oc.env" in text or any(secret in value for secret in secrets):
            merged.interpolations[key_path] = text


def _expanded_size(merged: MergedConfig, value: Any, sizes: dict[str, int]) -> int:
    # An upper bound of the characters of `value` when all it refers to is written out. `sizes` has those of other keys.
    if isinstance(value, dict | list):
        items = value.values() if isinstance(value, dict) else value
        return sum(_expanded_size(merged, item, sizes) for item in items)
    if not isinstance(value, str):
        return 1
    total = len(value)
    for name in re.findall(r"[\w.]+", " ".join(re.findall(r"\$\{([^}]*)", value))):
        if name not in sizes:
            sizes[name] = 0  # a cycle, which OmegaConf reports
            place = tuple(int(key) if key.isdecimal() else key for key in name.split("."))
            sizes[name] = _expanded_size(merged, merged.get(place), sizes)
        total += sizes[name]
    return total


def leaves(tree: Any, key_path: KeyPath = ()) -> list[tuple[KeyPath, Any]]:
    """Return every (key_path, value) in `tree` whose value is neither a mapping nor a list."""
    if isinstance(tree, dict):
        return [leaf for key, item in tree.items() for leaf in leaves(item, (*key_path, key))]
    if isinstance(tree, list):
        return [leaf for index, item in enumerate(tree) for leaf in leaves(item, (*key_path, index))]
    return [(key_path, tree)]


def format_key(key_path: KeyPath) -> str:
    """Return a key_path as a user writes it: `optimizer.lr`."""
    return ".".join(str(key) for key in key_path)


def format_key_path(path: Path) -> str:
    """Return a file's path, relative to the working folder where it lies in it, else absolute."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path.resolve())
