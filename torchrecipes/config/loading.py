"""Loads a YAML file and overrides into a checked instance of a recipe's `Config`."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from torchrecipes.config.catalog import find_config, read_header
from torchrecipes.config.check import check_config, default_tree, to_tree
from torchrecipes.config.merge import DEFAULT, INVALID, MergedConfig, Problems, Provenance, format_key_path, interpolate
from torchrecipes.config.read_yaml import add_file, add_overrides
from torchrecipes.config.stages import KEY as STAGES
from torchrecipes.config.stages import Stage, is_stage_override
from torchrecipes.errors import UserError, format_user_error

C = TypeVar("C")


def load(
    schema: type[C],
    config: str | Path | None,
    overrides: Sequence[str] = (),
    recipe: str | Path | None = None,
    check: Callable[[C], list[UserError]] | None = None,
    stage: Stage | None = None,
    init_from: str | None = None,
) -> C:
    """Return an instance of the dataclass `schema`: its defaults, overridden by a YAML file, then by `key=value`.

    Args:
        schema: a recipe's `Config`.
        config: path of a YAML file, or the name of a shipped one (`neobert/quickstart`), or None for defaults
            and overrides only.
        overrides: `key=value`, `nested.key=value`, `list.0=value`; the last one wins.
        recipe: the recipe's file or name, for the messages.
        check: returns further problems of a config whose keys are valid each by itself.
        stage: one of those that the config lists (`read_stages`): its keys come between the file and the overrides, and
            the run has its folder.
        init_from: with a stage that starts from another one, that one's result.

    Returns:
        The config. It keeps the provenance of each value for `to_yaml`.

    Raises:
        UserError: lists all problems, one line each, sorted by line: unknown, missing and duplicate keys, wrong types,
            values out of range, components that do not exist, arguments that they do not take, ambiguous YAML. Its
            code is `invalid_config`; its `problems` have the key, hint and code of each.
    """
    problems = Problems()
    merged = MergedConfig(default_tree(schema))
    title = "the settings"
    if config is None:
        merged.provenances[()] = Provenance("no config", (0, 0))
    else:
        path = find_config(str(config))
        title = format_key_path(path) + _wrong_recipe(path, recipe)
        add_file(merged, path, problems)
        stages = merged.tree.pop(STAGES, None)
        if stages is not None and stage is None:
            hint = "Name one of them with --stage" + (f": {', '.join(stages)}" if isinstance(stages, dict) else "")
            problems.add(merged.nearest((STAGES,)), "this config lists stages", key=STAGES, hint=hint, code="stages")
    if stage:
        stage.add_to(merged, problems)
    add_overrides(merged, [text for text in overrides if not is_stage_override(text)], problems)
    if () not in merged.provenances:  # no valid file: every required key would be reported as missing
        problems.raise_all(title)
    interpolate(merged, problems)
    if stage:  # after `${output_dir}`, which is the folder of all stages
        merged.tree |= {"output_dir": stage.output_dir} | ({"init_from": init_from} if init_from else {})
        where = Provenance(f"the stage {stage.name}", DEFAULT.rank)
        merged.provenances |= {("output_dir",): where} | ({("init_from",): where} if init_from else {})
    instance = check_config(merged, schema, problems, check)
    problems.raise_all(title)
    assert instance is not INVALID, "a value is broken and no problem says why"
    # For `to_yaml`: the values as they were loaded (a recipe may change one later), and where each is from.
    object.__setattr__(instance, "_loaded", (to_tree(instance), merged.provenances, merged.interpolations))
    return instance


def parse(schema: type[C], argv: Sequence[str] | None = None) -> C:
    """Return the config of a command line: `python my_recipe.py --config my.yaml lr=1e-3`.

    It is for the last line of a recipe, `main(parse(Config))`. It sets `sys.excepthook`, so that a user's mistake, here
    or in `main`, is one message and exit code 2, as with `tune-style run`; `--debug` shows the traceback.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, epilog="example: %(prog)s --config my.yaml optimizer.lr=1e-3")
    parser.add_argument("--config", metavar="FILE", help="a YAML file, or the name of a shipped config")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings that override the config's")
    args = parser.parse_intermixed_args(argv)

    def report(kind: type[BaseException], error: BaseException, trace: object) -> None:
        message = format_user_error(error)
        if issubclass(kind, KeyboardInterrupt):
            raise SystemExit(130)
        if args.debug or message is None:
            sys.__excepthook__(kind, error, trace)
        else:
            print(message, file=sys.stderr)
        if message is not None:
            raise SystemExit(2)

    sys.excepthook = report
    with report_once():
        return load(schema, args.config, args.overrides, recipe=sys.argv[0])


@contextmanager
def report_once() -> Iterator[None]:
    """Let only rank 0 report a UserError that all ranks raise; the others exit with code 2."""
    try:
        yield
    except UserError:
        if os.environ.get("RANK", "0") != "0":
            raise SystemExit(2) from None
        raise


def _wrong_recipe(path: Path, recipe: str | Path | None) -> str:
    meant, _ = read_header(path)
    if not meant or recipe is None or Path(recipe).stem == meant:
        return ""
    return f" (written for the recipe '{meant}', used with '{Path(recipe).stem}')"
