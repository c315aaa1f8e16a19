"""`tune-style ls`: lists the shipped recipes and their configs."""

import argparse

from torchrecipes.config.catalog import BuiltinConfig, builtin_configs, builtin_recipes, find_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ls`."""
    parser.epilog = "example: tune-style ls\n         tune-style ls mlm_pretrain"
    parser.add_argument("recipe", nargs="?", help="show this recipe and its configs only")


def main(args: argparse.Namespace) -> None:
    """Print the list."""
    wanted = find_recipe(args.recipe).stem if args.recipe else None
    recipes, configs = builtin_recipes(), builtin_configs()
    width = max((len(config.name) for config in configs), default=0)

    def show_configs(of: list[BuiltinConfig]) -> None:
        for config in of:
            print(f"    --config {config.name:<{width}}  {config.summary}".rstrip())
        print()

    for recipe in recipes:
        if wanted in (None, recipe.name):
            print(f"{recipe.name}: {recipe.summary}")
            show_configs([config for config in configs if config.recipe == recipe.name])
    strays = [config for config in configs if config.recipe not in {recipe.name for recipe in recipes}]
    if strays and not wanted:
        print("Configs whose first line names no recipe here:")
        show_configs(strays)
    print("tune-style cat NAME prints one of them, tune-style cp NAME FILE copies it for you to change.")
