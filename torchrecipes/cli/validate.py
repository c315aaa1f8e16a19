"""`tune-style validate`: checks a config as `run` does, without running it."""

import argparse

from torchrecipes.cli import launch_flags, run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments: those of `run`."""
    run.add_arguments(parser)


def main(args: argparse.Namespace) -> None:
    """Print `ok`, or raise a UserError that lists every problem."""
    if launch_flags.asked_for(args):
        launch_flags.check(args, here=False)  # a laptop may validate a config for a machine with GPUs
    run.load_recipe_and_config(args)
    print("ok")
