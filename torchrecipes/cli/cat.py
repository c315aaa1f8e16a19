"""`tune-style cat`: prints a shipped recipe or config."""

import argparse
import sys

from torchrecipes.config.catalog import find_builtin


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `cat`."""
    parser.epilog = "example: tune-style cat mlm_pretrain\n         tune-style cat neobert/quickstart"
    parser.add_argument("name", help="a recipe or a config, as `tune-style ls` names it")


def main(args: argparse.Namespace) -> None:
    """Print the file."""
    sys.stdout.write(find_builtin(args.name).path.read_text(encoding="utf-8"))
