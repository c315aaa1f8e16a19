"""`tune-style run`: checks the whole config, then calls the recipe's `main(config)`, here or in many processes."""

import argparse
import contextlib
import ctypes
import dataclasses
import importlib.util
import os
import signal
import sys
from pathlib import Path
from types import ModuleType

from torchrecipes.cli import launch_flags
from torchrecipes.cli.openmp import spin_briefly
from torchrecipes.config.catalog import find_recipe, recipes_folder
from torchrecipes.config.stages import read_stages
from torchrecipes.errors import UserError

_LAUNCHER = "TORCHRECIPES_LAUNCHER"  # environment variable of the processes that `run` starts: its process id


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `run` and `validate`."""
    verb = parser.prog.rsplit(" ", 1)[-1]
    parser.epilog = (
        f"example: tune-style {verb} mlm_pretrain --config neobert/quickstart optimizer.lr=1e-3\n"
        f"         tune-style {verb} mlm_pretrain --config neobert/small --nproc-per-node gpu\n"
        f"         tune-style {verb} my_recipe.py --config my.yaml 'data.source.path=texts/*.txt'"
    )
    add_config_arguments(parser)
    launch_flags.add_arguments(parser)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that `load_recipe_and_config` reads."""
    parser.add_argument("recipe", help="a recipe, as `tune-style ls` names it, or a file: my_recipe.py")
    parser.add_argument("--config", metavar="CONFIG", help="a config, as `tune-style ls` names it, or a file: my.yaml")
    parser.add_argument("--stage", metavar="NAME", help="one of the stages that the config lists, instead of all")
    settings = "settings that override the config's: seed=1 optimizer.lr=1e-3"
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help=settings)


def main(args: argparse.Namespace) -> None:
    """Run the recipe, in this process or in as many as the flags say; of a config with stages, all of them."""
    spin_briefly()
    if read_stages(args.config, args.overrides) or args.stage is not None:
        from torchrecipes.cli.stages import run_stages

        run_stages(args)
    else:
        run_once(args)


def run_once(args: argparse.Namespace) -> None:
    """Run one recipe with one config.

    Raises:
        SystemExit: with the run's exit code, where it is not 0.
    """
    if launch_flags.asked_for(args):
        _launch(args)
    else:
        if _LAUNCHER in os.environ:
            _end_with_launcher(int(os.environ.pop(_LAUNCHER)))
        recipe, config = load_recipe_and_config(args)
        recipe.main(config)


def _end_with_launcher(launcher: int) -> None:
    # A launcher that was killed (kill -9, out of memory) cannot end its processes: the kernel sends them SIGTERM.
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != launcher:  # it has gone already
        raise SystemExit(128 + signal.SIGTERM)


def _launch(args: argparse.Namespace) -> None:
    # torch's network code logs each attempt to reach a node that is not up yet. Set before torch is imported.
    quiet = "TORCH_CPP_LOG_LEVEL"
    verbose = args.debug or quiet in os.environ
    if not verbose:
        os.environ[quiet] = "ERROR"
    wanted = launch_flags.check(args)
    load_recipe_and_config(args)  # here, so that eight processes do not print the same errors

    from torchrecipes.distributed.launch import launch

    if not verbose:
        del os.environ[quiet]
    config = [f"--config={args.config}"] if args.config is not None else []
    stage = [f"--stage={args.stage}"] if args.stage is not None else []
    debug = ["--debug"] if args.debug else []
    # -P: as with the installed command, a file in the working folder does not shadow a module.
    command = [
        sys.executable,
        "-P",
        "-m",
        "torchrecipes.cli.main",
        "run",
        args.recipe,
        *config,
        *stage,
        *debug,
        *args.overrides,
    ]
    threads = max(1, launch_flags.cores() // wanted.nproc_per_node)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, _LAUNCHER: str(os.getpid())}
    if code := launch(command, **dataclasses.asdict(wanted), environment=environment):
        raise SystemExit(code)


def load_recipe_and_config(args: argparse.Namespace) -> tuple[ModuleType, object]:
    """Return the imported recipe and its checked config.

    Raises:
        UserError: no such recipe or config, the file is no recipe, or the config is invalid; the config lists stages,
            and none is named, or it starts from one that is not there yet.
    """
    if args.stage is not None:
        from torchrecipes.cli.stages import load_stage

        return load_stage(args)
    from torchrecipes.config.catalog import find_config
    from torchrecipes.config.loading import load, report_once
    from torchrecipes.error_file import has_error_file

    # A launcher chooses among its processes' messages, so it needs them all.
    with contextlib.nullcontext() if has_error_file() else report_once():
        path = find_recipe(args.recipe)
        if args.config is not None:
            find_config(args.config)  # reports a wrong name before the seconds that torch's import takes
        recipe = load_recipe(path)
        return recipe, load(
            recipe.Config, args.config, args.overrides, recipe=path, check=lambda config: check(recipe, config)
        )


def check(recipe: ModuleType, config: object) -> list[UserError]:
    """Return the problems of a config's components, which are built and discarded."""
    if not hasattr(recipe, "build_model"):
        return []
    from torchrecipes.planning import check_components

    return check_components(recipe, config)


def load_recipe(path: Path) -> ModuleType:
    """Import the recipe file at `path` and return its module.

    Modules beside the recipe and in the working folder can be imported from then on, as with `python my_recipe.py`.

    Raises:
        UserError: the file has no `Config` or no `main` (code `not_a_recipe`).
    """
    name = path.stem
    if name in sys.modules or not name.isidentifier() or importlib.util.find_spec(name):
        name = f"recipe_{name}"  # a recipe called torch.py must not shadow torch
    folder = str(path.parent)
    if path.parent != recipes_folder() and folder not in sys.path:
        sys.path.insert(0, folder)
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    if not dataclasses.is_dataclass(getattr(module, "Config", None)) or not callable(getattr(module, "main", None)):
        raise UserError(
            f"{path} is not a recipe: it needs a dataclass Config and a function main(config)",
            hint="For an example see: tune-style cat mlm_pretrain",
            code="not_a_recipe",
        )
    return module
