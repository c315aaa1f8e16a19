"""Configs: a dataclass in the recipe, a YAML file over it, `key=value` last; checked in one pass before anything runs.

`load` reads a config, `parse` does so from a command line, `component` declares a field that names something to build,
`build` builds it, and `to_yaml` writes the resolved config back with the provenance of every value.
"""

from torchrecipes.config.components import MISSING, Component, build, component
from torchrecipes.config.dump import to_yaml
from torchrecipes.config.loading import load, parse

__all__ = ["MISSING", "Component", "build", "component", "load", "parse", "to_yaml"]
