"""`tune-style cp`: copies a shipped recipe or config and prints the command that runs the copy."""

import argparse
import re
import shlex
import shutil
from pathlib import Path

from torchrecipes.config.catalog import BuiltinConfig, BuiltinRecipe, builtin_configs, find_builtin, quickstart_first
from torchrecipes.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `cp`."""
    parser.epilog = (
        "example: tune-style cp mlm_pretrain my_recipe.py\n         tune-style cp neobert/quickstart configs/my.yaml"
    )
    parser.add_argument("name", help="a recipe or a config, as `tune-style ls` names it")
    parser.add_argument(
        "destination", help="the file to write, or a folder to write into; folders are created as needed"
    )
    parser.add_argument("--force", action="store_true", help="overwrite a file that exists")


def main(args: argparse.Namespace) -> None:
    """Copy the file."""
    source = find_builtin(args.name)
    target = Path(args.destination)
    if target.is_dir() or args.destination.endswith("/"):
        target = target / source.path.name
    elif target.suffix != source.path.suffix:
        # The suffix .py is what marks a recipe given as a path.
        target = target.with_name(target.name + source.path.suffix)
    if target.exists() and not args.force:
        hint = "Choose another name, or overwrite it with --force."
        raise UserError(f"{target} exists", hint=hint, code="file_exists")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.path, target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}", code="not_writable") from error
    print(f"Wrote {target}. To run it:\n\n    {_command(source, target)}")


def _command(source: BuiltinRecipe | BuiltinConfig, target: Path) -> str:
    if isinstance(source, BuiltinRecipe):
        configs = [config for config in builtin_configs() if config.recipe == source.name]
        config = min(configs, key=lambda config: quickstart_first(config.name), default=None)
        words = ["tune-style", "run", str(target), "--config", config.name if config else "my.yaml"]
        config_file = None  # its output_dir may hold a run of the shipped recipe, which this command would resume
    else:
        words = ["tune-style", "run", source.recipe or "RECIPE", "--config", str(target)]
        config_file = source.path
    if config_file is None or not re.search(r"^output_dir:", config_file.read_text(encoding="utf-8"), re.MULTILINE):
        words.append(f"output_dir=runs/{target.stem}")
    return shlex.join(words)
