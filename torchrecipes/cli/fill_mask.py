"""`tune-style fill-mask`: predicts masked tokens with a trained encoder."""

import argparse

from torchrecipes.cli.trained_model import newest_valid_checkpoint
from torchrecipes.errors import UserError

EXAMPLE = 'tune-style fill-mask runs/quickstart "The [MASK] of a function is the value that it returns."'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `fill-mask`."""
    parser.epilog = f"example: {EXAMPLE}"
    parser.add_argument("run", help="a run's folder, one of its checkpoints, or a Hugging Face folder")
    parser.add_argument("text", nargs="+", help="a sentence with [MASK] in it")
    parser.add_argument("--top-k", type=int, default=5, help="predictions per mask (default 5)")


def main(args: argparse.Namespace) -> None:
    """Print the predictions for every text."""
    from torchrecipes.data.tokenizers.load import load_tokenizer
    from torchrecipes.evaluation.mask_filling import fill_mask
    from torchrecipes.models import load_hf, meta_model_from_hf

    folder = newest_valid_checkpoint(args.run)
    if getattr(meta_model_from_hf(folder, report=lambda _: None), "causal", False):
        hint = f"For a decoder use: tune-style generate {folder} --prompt ..."
        raise UserError(f"{folder} is a decoder, which fills no masks", hint=hint, code="not_an_encoder")
    model = load_hf(folder, require_head=True)
    tokenizer = load_tokenizer(folder)
    for text in args.text:
        print(f"\n{text}")
        predictions_per_mask = fill_mask(model, tokenizer, text, top_k=args.top_k)
        for number, predictions in enumerate(predictions_per_mask, start=1):
            if len(predictions_per_mask) > 1:
                print(f"  mask {number}")
            for prediction in predictions:
                print(f"  {prediction.probability:7.2%}  {prediction.token}")
