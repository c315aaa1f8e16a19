"""`tune-style validate`: checks a config as `run` does, without running it."""

import argparse

from torchrecipes.cli import launch_flags, run
from torchrecipes.config.stages import read_stages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments: those of `run`."""
    run.add_arguments(parser)


def main(args: argparse.Namespace) -> None:
    """Print `ok`, or raise a UserError that lists every problem."""
    if launch_flags.asked_for(args):
        launch_flags.check(args, here=False)  # a laptop may validate a config for a machine with GPUs
    if args.stage is None and read_stages(args.config, args.overrides):
        from torchrecipes.cli.stages import load_stages

        print(f"ok: {len(load_stages(args))} stages")
    else:
        run.load_recipe_and_config(args)
        print("ok")
