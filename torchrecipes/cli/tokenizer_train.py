"""`tune-style tokenizer train`: trains a tokenizer on text."""

import argparse
from pathlib import Path

from torchrecipes.cli.data_source import add_source_arguments, checked_component, source_from
from torchrecipes.cli.tokenizer_choice import add_objective
from torchrecipes.errors import UserError

# Options that are arguments of the trainer, where they are given.
SETTINGS = ("vocab_size", "lowercase", "limit_alphabet", "sample_fraction", "pad_vocab_to_multiple_of")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `tokenizer train`."""
    parser.epilog = (
        "example: tune-style tokenizer train --data texts --kind bpe --objective causal -o tokenizer\n"
        "         tune-style tokenizer train --data texts --kind wordpiece --objective mlm -o tokenizer"
    )
    parser.add_argument("--kind", required=True, choices=("bpe", "char", "unigram", "wordpiece"), help="the algorithm")
    add_objective(parser)
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="where the tokenizer is saved")
    parser.add_argument("--vocab-size", metavar="N", help="number of ids, special tokens included")
    parser.add_argument("--lowercase", metavar="BOOL", help="wordpiece: true (the default) or false")
    parser.add_argument("--limit-alphabet", metavar="N", help="wordpiece, unigram, char: characters at most")
    parser.add_argument("--sample-fraction", metavar="F", help="share of the documents that it is trained on")
    parser.add_argument("--pad-vocab-to-multiple-of", metavar="N", help="the vocabulary is padded to a multiple of N")
    add_source_arguments(parser)


def main(args: argparse.Namespace) -> None:
    """Train it, or load what the same call has trained before."""
    settings = [f"{name}={value}" for name in SETTINGS if (value := getattr(args, name)) is not None]
    component = checked_component("tokenizer", f"torchrecipes.data.tokenizers.train_{args.kind}", settings)
    causal = args.objective == "causal"
    if causal and args.kind == "wordpiece":
        hint = "Use --kind bpe, which keeps blanks and letter case."
        problem = "wordpiece does not restore the text, which a model that writes needs"
        raise UserError(problem, key="--kind", hint=hint, code="wrong_objective")
    source = source_from(args)

    from torchrecipes.config.components import build

    tokenizer = build(component, source=source, folder=Path(args.output), causal=causal)
    padding = tokenizer.vocab_size - tokenizer.unpadded_vocab_size
    print(f"{args.output}: {tokenizer.vocab_size:,} ids, {padding:,} of them padding; {tokenizer.fingerprint}")
    print(f"Look at it: tune-style tokenizer inspect {args.output} --data ...")
