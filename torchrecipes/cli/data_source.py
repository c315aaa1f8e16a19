"""The arguments with which every verb of `data` and `tokenizer` takes its text.

`--data PATH...` reads files, `--config CONFIG` what the `data.source` of a recipe's config names.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torchrecipes.config.components import Component, build
from torchrecipes.errors import UserError


def add_source_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Declare the arguments that `source_from` reads; one of `--data` and `--config` must be given if `required`.

    A verb with words of its own (a folder) declares them before: settings for the config may follow them.
    """
    group = parser.add_argument_group("text")
    one = group.add_mutually_exclusive_group(required=required)
    one.add_argument("--data", nargs="+", metavar="PATH", help="files, folders, patterns: text, .jsonl, .csv, .parquet")
    one.add_argument("--config", metavar="CONFIG", help="a config, shipped or a file, whose data.source is read")
    group.add_argument("--text-column", metavar="KEY", help="of JSON lines and tables (default text)")
    group.add_argument(
        "--sample-by", metavar="WHAT", help="a document of plain text: document (a file, the default), paragraph, line"
    )
    group.add_argument("--on-bad-record", metavar="WHAT", help="stop (the default), or skip: skip and count")
    group.add_argument(
        "overrides", nargs="*", default=[], metavar="KEY=VALUE", help="settings that override the config's"
    )


def source_from(args: argparse.Namespace) -> Any:
    """Return the source that the arguments name, or None where none was required and none is given.

    Raises:
        UserError: no such files or an invalid value, with the option as its key; an invalid config.
    """
    names = ("text_column", "sample_by", "on_bad_record")
    options = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.data is None:
        if options:
            option = f"--{next(iter(options)).replace('_', '-')}"
            where = "with --config, its data.source says how it is read" if args.config else "it belongs to --data"
            raise UserError(f"there is no --data to apply it to: {where}", key=option, code="unused_option")
        if args.config is not None:
            return source_from_config(args.config, args.overrides)
    if args.overrides:
        problem = f"{args.overrides[0]}: there is no --config that it could override"
        raise UserError(problem, hint="Paths follow --data.", code="unused_option")
    if args.data is None:
        return None
    from torchrecipes.data.sources import files

    try:
        return files(args.data, **options)
    except UserError as error:
        option = "--data" if error.key == "path" else f"--{str(error.key).replace('_', '-')}"
        raise UserError(error.problem, key=option, hint=error.hint, code=error.code) from None


def source_from_config(name: str, overrides: Sequence[str] = ()) -> Any:
    """Return what the `data.source` of a config builds.

    The other keys of the config are not checked: they belong to a recipe.

    Args:
        name: a shipped config, or a file.
        overrides: `data.source.path=...`, as for a recipe.

    Raises:
        UserError: there is no such config, this part of it is invalid, or there is none (code `no_source`).
    """
    node = config_parts(name, overrides, ["data.source"])[0]
    if node is None:
        hint = "Name one there, or give --data PATH."
        raise UserError(f"{name} names no source of text", key="data.source", hint=hint, code="no_source")
    return build_source("data.source", node)


def build_source(key: str, node: Component) -> Any:
    """Return the source that a component at `key` of a config builds.

    Raises:
        UserError: its arguments are not valid; the key is part of the error's.
    """
    try:
        return build(node)
    except UserError as error:
        raise error.under(key) from None


def config_parts(name: str, overrides: Sequence[str], keys: Sequence[str]) -> list[Any]:
    """Return the values of some keys of a config: of `tokenizer`, and of `data.` those of `_Data`; None where unset.

    Defaults are those of the recipe that the config's first line names, where there is one.

    Raises:
        UserError: there is no such config, or one of these keys is invalid.
    """
    from torchrecipes.config.catalog import find_config, find_recipe, read_header
    from torchrecipes.config.check import check_config, default_tree
    from torchrecipes.config.merge import MergedConfig, Problems, format_key_path, interpolate
    from torchrecipes.config.read_yaml import add_file, add_overrides

    path = find_config(name)
    recipe, _ = read_header(path)
    schema = _Config
    if recipe is not None:
        from torchrecipes.cli.run import load_recipe

        schema = load_recipe(find_recipe(recipe)).Config
    problems, elsewhere = Problems(), Problems()
    merged = MergedConfig(default_tree(schema))
    add_file(merged, path, problems)
    add_overrides(merged, list(overrides), problems)
    problems.raise_all(format_key_path(path))
    interpolate(merged, elsewhere)
    # Only now is the rest dropped: an interpolation may refer to any key.
    whole, merged.tree = merged.tree, {"data": {}}
    for key in keys:
        group, _, name = key.rpartition(".")
        if isinstance(holder := whole.get(group) if group else whole, dict) and name in holder:
            (merged.tree[group] if group else merged.tree)[name] = holder[name]
    for provenance, error in elsewhere.found:
        if str(error.key).startswith(tuple(keys)):
            problems.add_error(provenance, error)
    config = check_config(merged, _Config, problems)
    problems.raise_all(format_key_path(path))
    values = vars(config.data) | {"tokenizer": config.tokenizer}
    return [values[key.rpartition(".")[2]] for key in keys]


def checked_component(key: str, path: str, settings: Sequence[str]) -> Any:
    """Return the component at `path` with arguments `name=value`, of the types in its signature.

    Args:
        key: `tokenizer`, or one of `_Data` after `data.`.
        path: the dotted path.
        settings: the arguments.

    Raises:
        UserError: an unknown argument or an invalid value (code `invalid_config`).
    """
    from torchrecipes.config.check import check_config, default_tree
    from torchrecipes.config.merge import MergedConfig, Problems, Provenance
    from torchrecipes.config.read_yaml import add_overrides

    problems = Problems()
    merged = MergedConfig(default_tree(_Config), {(): Provenance("the command line", (0, 0))})
    add_overrides(merged, [f"{key}={path}", *(f"{key}.{setting}" for setting in settings)], problems)
    config = check_config(merged, _Config, problems)
    problems.raise_all(f"--{key.rpartition('.')[2]}")
    return (vars(config.data) | vars(config))[key.rpartition(".")[2]]


@dataclass
class _Data:
    source: Component | None = None
    eval_sets: dict[str, Component] = field(default_factory=dict)
    eval_split: str | None = None
    eval_samples: int | None = None
    validation_fraction: float | None = None


@dataclass
class _Config:
    data: _Data = field(default_factory=_Data)
    tokenizer: Component | None = field(default=None, metadata={"injected": ("source", "folder", "causal")})
