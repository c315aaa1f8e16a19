"""Every shipped config: it is valid, and a misspelling of any key in it is refused with the right suggestion.

The configs are found by recursion, so that one that is added is tested; each recipe is imported once.
"""

import dataclasses
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from torchrecipes.cli.run import load_recipe
from torchrecipes.config import load, read_stages, to_yaml
from torchrecipes.config.catalog import BuiltinConfig, builtin_configs, builtin_recipes, find_recipe
from torchrecipes.config.check import annotations, to_tree
from torchrecipes.config.coerce import is_nested, split
from torchrecipes.config.components import parameters, resolve
from torchrecipes.config.merge import format_key, leaves
from torchrecipes.errors import UserError

CONFIGS = {config.name: config for config in builtin_configs()}


NAMED_BY_USERS = ("eval_sets", "sources", "evaluators", "final_evaluators")


VALUES_BY_NAME = ("weights", "at_most", "prompts", "dataset_prompts", "kinds")  # names of the user's own


@cache
def schema_of(recipe: str) -> type:
    return load_recipe(find_recipe(recipe)).Config


@cache
def path_of(config: BuiltinConfig) -> Path:
    """The config's file; of one with stages, which stand at its end, a copy without them."""
    text, stages, _ = config.path.read_text().partition("\nstages:\n")
    if not stages:
        return config.path
    path = Path(tempfile.mkdtemp()) / config.path.name
    start = "" if "\ninit_from:" in text else "\ninit_from: another"  # the stages start from each other
    path.write_text(f"{text}{start}\n")
    return path


def left_to_the_user(config: BuiltinConfig) -> list[str]:
    """Overrides for what a config says with ??? that its user has to give, such as the path of the text."""
    tree = yaml.safe_load(config.path.read_text())
    return [f"{format_key(place)}=given" for place, value in leaves(tree) if value == "???"]


def problems(config: BuiltinConfig, path: Path, *overrides: str) -> list[tuple[str, str]]:
    """The line and the hint of each problem."""
    try:
        load(schema_of(config.recipe), path, [*left_to_the_user(config), *overrides])
    except UserError as error:
        lines = str(error).split("\n")[1:]
        return [(line, problem.hint or "") for line, problem in zip(lines, error.problems, strict=True)]
    return []


def key_nodes(node: yaml.Node) -> Iterator[tuple[yaml.ScalarNode, bool]]:
    """Every key in a YAML file, and whether a scalar is its value."""
    for child in node.value if isinstance(node, yaml.CollectionNode) else ():
        if isinstance(node, yaml.MappingNode):
            yield child[0], isinstance(child[1], yaml.ScalarNode)
            if child[0].value in NAMED_BY_USERS:  # their keys are names of the user's own
                for _, value in child[1].value:
                    yield from key_nodes(value)
            elif child[0].value not in VALUES_BY_NAME:
                yield from key_nodes(child[1])
        else:
            yield from key_nodes(child)


def components(value: Any, place: tuple = ()) -> Iterator[tuple[tuple, str]]:
    """The place and the dotted path of every component in a config's tree."""
    if isinstance(value, dict):
        if "_component_" in value:
            yield place, value["_component_"]
        for key, item in value.items():
            yield from components(item, (*place, key))


def injected_names(schema: type, place: tuple = ()) -> Iterator[tuple[tuple, tuple[str, ...]]]:
    """The place of every key, and the arguments that the recipe passes to a component there."""
    for spec in dataclasses.fields(schema):
        yield (*place, spec.name), spec.metadata.get("injected", ())
        kind, _ = split(annotations(schema)[spec.name])
        if is_nested(kind):
            yield from injected_names(kind, (*place, spec.name))


def misspelled(key: str) -> str:
    # Two neighbours swapped, the most usual slip of the fingers; the last letter doubled where that changes nothing.
    middle = len(key) // 2
    swapped = key[: middle - 1] + key[middle] + key[middle - 1] + key[middle + 1 :]
    return swapped if len(key) > 3 and swapped != key else key + key[-1]


def test_every_config_names_its_recipe_and_its_purpose():
    recipes = {recipe.name for recipe in builtin_recipes()}
    assert recipes and CONFIGS
    assert all(recipe.summary for recipe in builtin_recipes())
    for config in CONFIGS.values():
        assert config.recipe in recipes, f"{config.name}: the first line must be `# recipe: NAME`"
        assert len(config.summary) > 20, f"{config.name}: the second line must be a comment that says what it is for"
    assert recipes == {config.recipe for config in CONFIGS.values()}, "a recipe without a config"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shipped_config_is_valid(name):
    assert problems(CONFIGS[name], path_of(CONFIGS[name])) == []


@pytest.mark.parametrize("name", [name for name in CONFIGS if path_of(CONFIGS[name]) != CONFIGS[name].path])
def test_the_stages_of_a_shipped_config_are_valid(name):
    given = left_to_the_user(CONFIGS[name])
    for stage in read_stages(CONFIGS[name].path, given).values():
        recipe, config = stage.recipe or CONFIGS[name].recipe, stage.config or CONFIGS[name].path
        load(schema_of(recipe), config, [] if stage.config else given, stage=stage, init_from=stage.start and "another")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_config_that_a_run_stores_loads_as_the_same_config(name, tmp_path):
    config = CONFIGS[name]
    instance = load(schema_of(config.recipe), path_of(config), left_to_the_user(config))
    (tmp_path / "config.yaml").write_text(to_yaml(instance))
    assert load(schema_of(config.recipe), tmp_path / "config.yaml") == instance


@pytest.mark.parametrize("name", CONFIGS)
def test_every_misspelt_key_is_refused_at_its_line_with_the_right_suggestion(name, tmp_path):
    config = CONFIGS[name]
    text = path_of(config).read_text()
    path = tmp_path / "misspelt.yaml"
    nodes = list(key_nodes(yaml.compose(text)))
    # Keys of scalars all at once; one that opens a section or names a component would hide others.
    together = [node for node, is_leaf in nodes if is_leaf and node.value != "_component_"]
    assert together
    for group in (together, *([node] for node, _ in nodes if node not in together)):
        changed = text
        for node in reversed(group):
            start, end = node.start_mark.index, node.end_mark.index
            changed = changed[:start] + misspelled(node.value) + changed[end:]
        path.write_text(changed)
        found = problems(config, path)
        for node in group:
            here = f"misspelt.yaml:{node.start_mark.line + 1}: "
            assert any(here in line and f"'{node.value}'" in hint for line, hint in found), (node.value, found)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_misspelt_argument_of_a_component_is_refused_with_the_right_suggestion(name):
    config = CONFIGS[name]
    schema = schema_of(config.recipe)
    instance = load(schema, path_of(config), left_to_the_user(config))
    injected = dict(injected_names(schema))
    shared = {place for place, value in leaves(yaml.safe_load(path_of(config).read_text())) if "${" in str(value)}
    meant = {}
    for place, path in components(to_tree(instance)):
        if shared & {place[:size] for size in range(len(place) + 1)}:
            continue  # tested where it stands
        for argument in parameters(resolve(path)):
            if argument not in injected.get(place, ()):
                meant[f"{format_key(place)}.{misspelled(argument)}=1"] = argument
    check_suggestions(config, meant)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_of_the_recipe_misspelt_on_the_command_line_is_refused(name):
    config = CONFIGS[name]
    places = [place for place, _ in injected_names(schema_of(config.recipe))]
    check_suggestions(config, {f"{format_key((*p[:-1], misspelled(p[-1])))}=1": p[-1] for p in places})


def check_suggestions(config: BuiltinConfig, meant: dict[str, str]) -> None:
    """Each of the overrides is refused, with the name that was meant in its hint."""
    found = problems(config, path_of(config), *meant)
    assert meant
    for override, name in meant.items():
        assert any(f"'{override}'" in line and f"'{name}'" in hint for line, hint in found), (override, found)
