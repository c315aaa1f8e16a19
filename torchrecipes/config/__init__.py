"""Configs: a dataclass in the recipe, a YAML file over it, `key=value` last; checked in one pass before anything runs.

`load` reads a config and `parse` reads one from a command line; `component` declares a field that holds a component and
`build` builds it; `to_yaml` writes a config with the provenance of each value; `changed_keys` compares two of them.
`read_stages` reads the stages that a config lists, each a run of its own.
`Steps`, `Range`, `MayChange` and the like annotate fields with range, unit, and whether a resumed run may change them.

    merge · read_yaml · scalars     from files and overrides to one tree
    check · coerce · shared_keys    from the tree to an instance of the dataclass
    components · metadata           what a field may hold
    stages                          several runs in one config
    loading · dump · compare        load, to_yaml, changed_keys
    catalog · suggest               the shipped recipes and configs; the closest valid name
    schema_page                     the page of a config's keys in the documentation
"""

from torchrecipes.config.compare import changed_keys
from torchrecipes.config.components import MISSING, Component, build, component
from torchrecipes.config.dump import to_yaml
from torchrecipes.config.loading import load, parse
from torchrecipes.config.metadata import (
    Count,
    Fraction,
    MayChange,
    NonNegative,
    Positive,
    Range,
    Rows,
    Steps,
    Tokens,
    Unit,
)
from torchrecipes.config.stages import Stage, read_stages

__all__ = [
    "MISSING",
    "Component",
    "Count",
    "Fraction",
    "MayChange",
    "NonNegative",
    "Positive",
    "Range",
    "Rows",
    "Stage",
    "Steps",
    "Tokens",
    "Unit",
    "build",
    "changed_keys",
    "component",
    "load",
    "parse",
    "read_stages",
    "to_yaml",
]
