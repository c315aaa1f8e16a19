"""`tune-style preflight`: checks before a long run, with a dry run."""

import argparse
import contextlib
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator

from torchrecipes.errors import UserError

_LABEL = {"passed": "passed ", "failed": "FAILED ", "skipped": "skipped"}
_CLEAR = "\r\033[K"  # clears a terminal's line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments: those of `run`, on one machine."""
    from torchrecipes.cli import run

    parser.epilog = (
        "example: tune-style preflight mlm_pretrain --config neobert/quickstart\n"
        "         tune-style preflight --nproc-per-node gpu mlm_pretrain --config my.yaml\n"
        "exit code: 0 ready, 1 a check failed, 2 a mistake on the command line"
    )
    run.add_config_arguments(parser)
    parser.add_argument("--nproc-per-node", metavar="N", help="processes of the dry run: a number, gpu or cpu (1)")


def main(args: argparse.Namespace) -> None:
    """Print a table of checks, each as it is done; exit with 1 if one failed."""
    with _exit_on_signals():
        _main(args)


def _main(args: argparse.Namespace) -> None:
    from torchrecipes.cli.run import load_recipe_and_config

    world_size = _processes(args.nproc_per_node)
    try:
        recipe, config = load_recipe_and_config(args)
    except UserError as error:
        from torchrecipes.planning.preflight_checks import ROWS

        _show("config", "failed", str(error))
        for name in ROWS:
            _show(name, "skipped", "because of the config")
        _end(1)
    _show("config", "passed", "every key and argument is known and of the right type")

    from torchrecipes.config import to_yaml
    from torchrecipes.planning.dry_run import GRACE_PERIOD
    from torchrecipes.planning.preflight_checks import preflight

    words = [args.recipe, *(["--config", args.config] if args.config else []), *args.overrides]
    stage = ["--stage", args.stage] if args.stage else []
    several = ["--nproc-per-node", str(world_size)] if args.nproc_per_node else []
    # -P: as with the installed command, a file of the working folder does not pass for a module of Python's.
    command = [sys.executable, "-P", "-m", "torchrecipes.cli.main", "run", *several]
    command += ["--grace-period", str(GRACE_PERIOD)] if several else []
    failed = 0
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as resolved:
        if stage:  # its folder follows from output_dir, which the dry run changes
            resolved.write(to_yaml(config))
            resolved.flush()
        dry_run = [str(recipe.__file__), "--config", resolved.name] if stage else words
        for check in preflight(recipe, config, [*command, *dry_run], world_size=world_size, report=_report):
            _show(check.name, check.status, check.reason)
            failed += check.status == "failed"
    if failed:
        _end(failed)
    print("\nready: tune-style run " + shlex.join([*several, *words, *stage]))


def _end(failed: int) -> None:
    print(f"\n{failed} {'check' if failed == 1 else 'checks'} failed: the run is not ready.")
    raise SystemExit(1)


def _processes(asked: str | None) -> int:
    if "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            "a launcher started this process as one of several (WORLD_SIZE is set)",
            hint="Start preflight once, without a launcher: it starts the processes that --nproc-per-node asks for",
            code="started_by_launcher",
        )
    if asked is None:
        return 1
    from torchrecipes.cli.launch_flags import processes

    return processes(asked, here=True)


@contextlib.contextmanager
def _exit_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end this process as Ctrl+C does: the dry run is stopped, and its folder removed."""

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = {}
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # ignored under nohup
            before[number] = signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _report(what: str) -> None:
    if sys.stdout.isatty():
        print(f"{_CLEAR}...      {what}", end="", flush=True)


def _show(name: str, status: str, reason: str) -> None:
    if sys.stdout.isatty():
        print(_CLEAR, end="")
    first, *more = reason.splitlines() or [""]
    print(f"{_LABEL[status]}  {name:<14}  {first}", flush=True)
    for line in more:
        print(f"{'':<25}{line}", flush=True)
