"""Arguments of the verbs that take texts: on the command line, from a file, or from standard input."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from torchrecipes.errors import UserError


def add_text_arguments(parser: argparse.ArgumentParser, *, texts: str, output: str) -> None:
    """Declare the texts, the file that they are in, and the file for the results.

    Args:
        parser: of the verb.
        texts, output: help of these two.
    """
    parser.add_argument("texts", nargs="*", metavar="TEXT", help=texts)
    parser.add_argument(
        "-i",
        "--input",
        metavar="FILE",
        help="lines of text, .jsonl, .csv, .tsv or .parquet; -: lines of standard input",
    )
    parser.add_argument("--text-column", default="text", metavar="KEY", help="the text's key or column (default text)")
    parser.add_argument("-o", "--output", metavar="FILE", help=output)
    parser.add_argument(
        "--batch-tokens",
        type=int,
        metavar="N",
        help="tokens per forward pass (default 1,024 per thread, 32,768 on a GPU)",
    )


def check_text_arguments(args: argparse.Namespace, formats: Sequence[str], counts: Sequence[str]) -> Path | None:
    """Check the arguments by themselves; return the file to write, or None.

    Args:
        args: of `add_text_arguments`, and others.
        formats: suffixes of `--output`.
        counts: options that are numbers from 1 up.

    Raises:
        UserError: there are no texts, or two kinds of them (code `no_texts`); a number is below 1 (`out_of_range`); the
            output has another suffix (`unknown_format`).
    """
    if bool(args.texts) == (args.input is not None):
        problem = "texts and --input are both given" if args.texts else "there are no texts"
        raise UserError(problem, hint="Give texts, or --input FILE (- is standard input).", code="no_texts")
    for option in (*counts, "--batch-tokens"):
        value = getattr(args, option[2:].replace("-", "_"))
        if value is not None and value < 1:
            raise UserError(f"{value} is out of range", key=option, hint="Give 1 or more.", code="out_of_range")
    output = Path(args.output) if args.output else None
    if output is not None and output.suffix not in formats:
        hint = f"Give a name that ends in {', '.join(formats)}."
        raise UserError(f"{output.name} has no known format", key="--output", hint=hint, code="unknown_format")
    return output
