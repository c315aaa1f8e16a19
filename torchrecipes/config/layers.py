"""The layers of a config (defaults, a YAML file, overrides), merged into one tree that knows where each value is from.

A tree is made of dicts, lists and scalars; a place in it is a path of keys, such as ("optimizer", "lr"). OmegaConf
keeps no line numbers, so the merge is done here, with an origin for every value, and OmegaConf resolves `${...}`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchrecipes.errors import UserError

Place = tuple[str | int, ...]
PATH_KEY = "_component_"
# Stands in the tree for a value that could not be read; it has been reported, and is not reported again.
BROKEN: Any = object()


@dataclass(frozen=True)
class Origin:
    """Where a value is from: `default`, `file:line` or `override '...'`, and its rank when problems are sorted."""

    where: str
    rank: tuple[int, int]

    @property
    def short(self) -> str:
        """The origin as `to_yaml` writes it: default, file:line or override."""
        return "override" if self.rank[0] == 1 else self.where


DEFAULT = Origin("default", (2, 0))


@dataclass
class Problems:
    """All that is wrong with a config, gathered in one pass."""

    found: list[tuple[Origin, str]] = field(default_factory=list)

    def add(self, origin: Origin, message: str) -> None:
        """Note a problem; the same one twice counts once."""
        if (origin, message) not in self.found:
            self.found.append((origin, message))

    def raise_all(self, title: str) -> None:
        """Raise one UserError with every problem, sorted by line, then the overrides in their order; none: return."""
        if not self.found:
            return
        ordered = sorted(self.found, key=lambda problem: problem[0].rank)
        lines = [f"  {origin.where}: {message}" for origin, message in ordered]
        count = "one problem" if len(lines) == 1 else f"{len(lines)} problems"
        raise UserError("\n".join([f"{title}: {count}", *lines]))


@dataclass
class Layers:
    """The merged tree, and the origin of every value in it that is not a default."""

    tree: dict[str, Any]
    origins: dict[Place, Origin] = field(default_factory=dict)

    def origin(self, place: Place) -> Origin:
        """Return where the value at `place` is from."""
        return self.origins.get(place, DEFAULT)

    def nearest(self, place: Place) -> Origin:
        """Return where an error about `place` is to be looked for: its own origin, or that of what should hold it."""
        for end in range(len(place), -1, -1):
            if place[:end] in self.origins:
                return self.origins[place[:end]]
        return DEFAULT

    def get(self, place: Place) -> Any:
        """Return what is at `place`, or None."""
        found: Any = self.tree
        for key in place:
            if isinstance(found, dict):
                found = found.get(key)
            elif isinstance(found, list) and isinstance(key, int) and key < len(found):
                found = found[key]
            else:
                return None
        return found

    def put(self, value: Any, origins: dict[Place, Origin], place: Place = ()) -> None:
        """Lay `value` over what is at `place`: mappings merge, anything else replaces. `origins` has those of `value`.

        A `_component_` that differs from the one below drops the arguments from below: they belonged to the other one.
        """
        below = self.get(place)
        if isinstance(value, dict) and isinstance(below, dict):
            self.origins[place] = origins[place]
            for key in sorted(value, key=lambda key: key != PATH_KEY):
                self.put(value[key], origins, (*place, key))
            return
        holder = self.get(place[:-1])
        if place[-1] == PATH_KEY and value != below:
            holder.clear()
            self._forget_below(place[:-1])
        self._forget_below(place)
        holder[place[-1]] = value
        self.origins.update({key: origin for key, origin in origins.items() if key[: len(place)] == place})

    def _forget_below(self, place: Place) -> None:
        depth = len(place)
        for key in [key for key in self.origins if len(key) > depth and key[:depth] == place]:
            del self.origins[key]


def interpolate(layers: Layers, problems: Problems) -> None:
    """Replace every `${other.key}` and `${oc.env:NAME}` in the tree by what it refers to, as OmegaConf does."""
    places = [place for place, value in leaves(layers.tree) if isinstance(value, str) and "${" in value]
    if not places:
        return
    # Here, because most configs have no interpolation and this import is most of the time of a check.
    from omegaconf import OmegaConf
    from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

    for place in list(places):
        try:
            OmegaConf.create({"value": layers.get(place)})
        except OmegaConfBaseException as error:  # a `${` without its `}` is refused on sight
            problems.add(layers.nearest(place), f"{show(place)}: {_first_line(error)}. For a plain '${{' write '\\${{'")
            layers.get(place[:-1])[place[-1]] = BROKEN
            places.remove(place)
    whole = OmegaConf.create(layers.tree, flags={"allow_objects": True})
    for place in places:
        try:
            value: Any = whole
            for key in place:
                value = value[key]
            value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except InterpolationToMissingValueError:  # the missing key is reported itself
            value = BROKEN
        except OmegaConfBaseException as error:
            problems.add(layers.nearest(place), f"{show(place)}: {_first_line(error)}. For a plain '${{' write '\\${{'")
            value = BROKEN
        layers.get(place[:-1])[place[-1]] = value


def leaves(tree: Any, place: Place = ()) -> list[tuple[Place, Any]]:
    """Return every (place, value) in `tree` whose value is neither a mapping nor a list."""
    if isinstance(tree, dict):
        return [leaf for key, item in tree.items() for leaf in leaves(item, (*place, key))]
    if isinstance(tree, list):
        return [leaf for index, item in enumerate(tree) for leaf in leaves(item, (*place, index))]
    return [(place, tree)]


def show(place: Place) -> str:
    """Return a place as a user writes it: `optimizer.lr`."""
    return ".".join(str(key) for key in place)


def show_path(path: Path) -> str:
    """Return a file's path relative to the working folder where it lies in it, whole otherwise."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path.resolve())


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]
