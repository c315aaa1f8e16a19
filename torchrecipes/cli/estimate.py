"""`tune-style estimate`: what a run will take of memory, time and disk, before it is started."""

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments: a recipe, its config, and the machines to think of."""
    from torchrecipes.cli import run

    parser.epilog = (
        "example: tune-style estimate mlm_pretrain --config neobert/quickstart\n"
        "         tune-style estimate mlm_pretrain --config neobert/base data.source.path=texts --device h200 "
        "--world-size 8"
    )
    run.add_config_arguments(parser)
    parser.add_argument("--device", metavar="NAME", help="h200, a100-80, 4090, ... or cpu; default: this machine's")
    parser.add_argument("--world-size", type=int, default=1, metavar="N", help="processes in all, one per device (1)")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="processes per machine (8)")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the device's peak that is reached (0.4)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> None:
    """Print the estimate."""
    from torchrecipes.cli.run import load_recipe_and_config
    from torchrecipes.training.estimate_run import as_text, estimate_run

    _, config = load_recipe_and_config(args)
    found = estimate_run(
        config, device=args.device, world_size=args.world_size, per_node=args.gpus_per_node, mfu=args.mfu
    )
    print(json.dumps(found, indent=2) if args.json else as_text(found))
