"""`tune-style preflight`: the readiness check before a long run."""

import argparse
import sys

from torchrecipes.errors import UserError

_MARK = {"passed": "passed ", "failed": "FAILED ", "skipped": "skipped"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments: those of `run`, on one machine."""
    from torchrecipes.cli import run

    parser.epilog = (
        "example: tune-style preflight mlm_pretrain --config neobert/quickstart\n"
        "         tune-style preflight --nproc-per-node gpu mlm_pretrain --config my.yaml\n"
        "exit code: 0 all is well, 1 a check failed, 2 a mistake on the command line"
    )
    run.add_config_arguments(parser)
    parser.add_argument("--nproc-per-node", metavar="N", help="processes to try it with: a number, gpu or cpu (1)")


def main(args: argparse.Namespace) -> None:
    """Print a table of checks, each as it is done; exit with 1 if one failed."""
    from torchrecipes.cli.run import load_recipe_and_config

    world_size = _processes(args.nproc_per_node)
    try:
        _, config = load_recipe_and_config(args)
    except UserError as error:
        _show("config", "failed", str(error))
        _show("all else", "skipped", "because of the config")
        raise SystemExit(1) from None
    _show("config", "passed", "every key and argument is known and of the right type")

    from torchrecipes.training.preflight import preflight

    command = [sys.executable, "-P", "-m", "torchrecipes.cli.main", "run"]
    command += ["--nproc-per-node", str(world_size)] if args.nproc_per_node else []
    command += [args.recipe, *(["--config", args.config] if args.config else []), *args.overrides]
    failed = 0
    for check in preflight(config, command, world_size=world_size):
        _show(check.name, check.status, check.reason)
        failed += check.status == "failed"
    if failed:
        print(f"\n{failed} of the checks failed: the run is not ready.")
        raise SystemExit(1)
    print("\nready: tune-style run " + " ".join(command[5:]))


def _processes(asked: str | None) -> int:
    if asked is None:
        return 1
    from torchrecipes.cli.launch_flags import processes

    return processes(asked, here=True)


def _show(name: str, status: str, reason: str) -> None:
    first, *more = reason.splitlines() or [""]
    print(f"{_MARK[status]}  {name:<16}  {first}", flush=True)
    for line in more:
        print(f"{'':<27}{line}", flush=True)
