"""`tune-style fill-mask`: what a trained encoder puts in the place of [MASK]."""

import argparse
from pathlib import Path

from torchrecipes.cli.trained_model import newest_whole_checkpoint
from torchrecipes.errors import UserError

EXAMPLE = 'tune-style fill-mask runs/quickstart "The [MASK] of a function is the value that it returns."'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `fill-mask`."""
    parser.epilog = f"example: {EXAMPLE}"
    parser.add_argument("run", help="a run's folder, one of its checkpoints, or any folder that load_hf reads")
    parser.add_argument("text", nargs="+", help="a sentence with [MASK] in it")
    parser.add_argument("--top-k", type=int, default=5, help="guesses per mask (default 5)")


def main(args: argparse.Namespace) -> None:
    """Print the guesses for every text."""
    from torchrecipes.data.tokenizers.load import load_tokenizer
    from torchrecipes.evaluation.mask_filling import fill_mask
    from torchrecipes.models import load_hf

    folder = newest_whole_checkpoint(Path(args.run))
    model = load_hf(folder)
    if hasattr(model, "router_loss"):  # decoders have it, mixtures of experts or not
        raise UserError(f"{folder} is a decoder, which fills no masks. Let it go on: tune-style generate {folder} ...")
    tokenizer = load_tokenizer(folder)
    for text in args.text:
        print(f"\n{text}")
        guesses_per_mask = fill_mask(model, tokenizer, text, top_k=args.top_k)
        for number, guesses in enumerate(guesses_per_mask, start=1):
            if len(guesses_per_mask) > 1:
                print(f"  mask {number}")
            for guess in guesses:
                print(f"  {guess.probability:7.2%}  {guess.token}")
