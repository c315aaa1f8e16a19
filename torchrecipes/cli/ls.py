"""`tune-style ls`: lists the built-in recipes and their configs, or the model families and their sizes."""

import argparse

from torchrecipes.config.catalog import BuiltinConfig, builtin_configs, builtin_recipes, find_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ls`."""
    parser.epilog = "example: tune-style ls\n         tune-style ls mlm_pretrain\n         tune-style ls --models"
    parser.add_argument("recipe", nargs="?", help="show only this recipe and its configs")
    parser.add_argument("--models", action="store_true", help="show the model families and their sizes instead")


def main(args: argparse.Namespace) -> None:
    """Print the list."""
    if args.models:
        print(models_table())
        print("\nmodel: {_component_: torchrecipes.models.FAMILY, size: SIZE}; any key of the family may follow.")
        return
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


def models_table() -> str:
    """Every size of every family as a Markdown table; parameters are counted on the meta device."""
    import torch

    from torchrecipes.models import FAMILY_BUILDERS, active_parameters

    rows = [("family", "size", "parameters", "active", "layers", "width", "heads", "positions", "vocabulary")]
    for builder in FAMILY_BUILDERS:
        for size in builder.sizes:
            with torch.device("meta"):
                model = builder(size)
            config, attention = model.config, model.blocks[0].self_attn
            total, active = sum(parameter.numel() for parameter in model.parameters()), active_parameters(model)
            heads = str(attention.num_heads)
            if attention.num_kv_heads != attention.num_heads:
                heads += f", {attention.num_kv_heads} key-value"
            numbers = [config.num_hidden_layers, config.hidden_size, heads, config.max_position_embeddings]
            cells = [total, active if active != total else "", *numbers, config.vocab_size]
            rows.append((builder.__name__, size, *(f"{cell:,}" if isinstance(cell, int) else cell for cell in cells)))
    rows.insert(1, tuple("-" * len(cell) for cell in rows[0]))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows[1] = tuple("-" * width for width in widths)
    lines = (" | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"| {line} |" for line in lines)
