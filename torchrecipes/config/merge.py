"""The merged of a config (defaults, a YAML file, overrides), merged into one tree that knows where each value is from.

A tree is made of dicts, lists and scalars; a key_path in it is a path of keys, such as ("optimizer", "lr"). OmegaConf
keeps no line numbers, so the merge is done here, with an provenance for every value, and OmegaConf resolves `${...}`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchrecipes.errors import UserError

KeyPath = tuple[str | int, ...]
PATH_KEY = "_component_"
# Stands in the tree for a value that could not be read; it has been reported, and is not reported again.
INVALID: Any = object()


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
    """All that is wrong with a config, gathered in one pass."""

    found: list[tuple[Provenance, str]] = field(default_factory=list)

    def add(self, provenance: Provenance, message: str) -> None:
        """Note a problem; the same one twice counts once."""
        if (provenance, message) not in self.found:
            self.found.append((provenance, message))

    def raise_all(self, title: str) -> None:
        """Raise one UserError with every problem, sorted by line, then the overrides in their order; none: return."""
        if not self.found:
            return
        ordered = sorted(self.found, key=lambda problem: problem[0].rank)
        lines = [f"  {provenance.where}: {message}" for provenance, message in ordered]
        count = "one problem" if len(lines) == 1 else f"{len(lines)} problems"
        raise UserError("\n".join([f"{title}: {count}", *lines]))


@dataclass
class MergedConfig:
    """The merged tree, and the provenance of every value in it that is not a default."""

    tree: dict[str, Any]
    provenances: dict[KeyPath, Provenance] = field(default_factory=dict)

    def provenance(self, key_path: KeyPath) -> Provenance:
        """Return where the value at `key_path` is from."""
        return self.provenances.get(key_path, DEFAULT)

    def nearest(self, key_path: KeyPath) -> Provenance:
        """Return where an error about `key_path` is to be looked for: its own provenance, or that of what should hold
        it.
        """
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
        """Lay `value` over what is at `key_path`: mappings merge, anything else replaces. `provenances` has those "
        "of `value`.

        A `_component_` that differs from the one below drops the arguments from below: they belonged to the other one.
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
    """Replace every `${other.key}` and `${oc.env:NAME}` in the tree by what it refers to, as OmegaConf does."""
    places = [key_path for key_path, value in leaves(merged.tree) if isinstance(value, str) and "${" in value]
    if not places:
        return
    # Here, because most configs have no interpolation and this import is most of the time of a check.
    from omegaconf import OmegaConf
    from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

    for key_path in list(places):
        try:
            OmegaConf.create({"value": merged.get(key_path)})
        except OmegaConfBaseException as error:  # a `${` without its `}` is refused on sight
            problems.add(
                merged.nearest(key_path),
                f"{format_key(key_path)}: {_first_line(error)}. For a plain '${{' write '\\${{'",
            )
            merged.get(key_path[:-1])[key_path[-1]] = INVALID
            places.remove(key_path)
    whole = OmegaConf.create(merged.tree, flags={"allow_objects": True})
    for key_path in places:
        try:
            value: Any = whole
            for key in key_path:
                value = value[key]
            value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except InterpolationToMissingValueError:  # the missing key is reported itself
            value = INVALID
        except OmegaConfBaseException as error:
            problems.add(
                merged.nearest(key_path),
                f"{format_key(key_path)}: {_first_line(error)}. For a plain '${{' write '\\${{'",
            )
            value = INVALID
        merged.get(key_path[:-1])[key_path[-1]] = value


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
    """Return a file's path relative to the working folder where it lies in it, whole otherwise."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path.resolve())


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]
