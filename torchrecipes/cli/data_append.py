"""`tune-style data append`: adds text to a corpus."""

import argparse
from pathlib import Path
from typing import Any

from torchrecipes.cli.data_source import add_source_arguments, source_from
from torchrecipes.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `data append`."""
    parser.epilog = "example: tune-style data append corpus --data new/*.txt"
    parser.add_argument("corpus", help="the corpus: a run's data.corpus_dir, or what data tokenize wrote")
    parser.add_argument(
        "--tokenizer", metavar="FOLDER", help="the corpus' tokenizer (default: the copy in CORPUS/tokenizer)"
    )
    parser.add_argument("--again", action="store_true", help="add text that the corpus holds already")
    parser.add_argument("--threads", type=int, metavar="N", help="threads that tokenize (default: one per core)")
    add_source_arguments(parser)


def main(args: argparse.Namespace) -> None:
    """Add the text and print what was added."""
    from torchrecipes.data.corpus import append_to_corpus, open_corpus

    source = source_from(args)
    folder = Path(args.corpus)
    tokenizer = corpus_tokenizer(folder, args.tokenizer)
    for split, record in append_to_corpus(folder, source, tokenizer, args.threads, args.again).items():
        before, corpus = record["before"], open_corpus(folder / split)
        print(
            f"{split}: {record['documents']:,} documents and {record['tokens']:,} tokens added to "
            f"{before['documents']:,} documents and {before['tokens']:,} tokens; now "
            f"{corpus.num_documents:,} documents and {corpus.num_tokens:,} tokens"
        )
    print("Held-out documents were chosen by the same hash as before; those of the corpus stay held out.")


def corpus_tokenizer(folder: Path, path: str | None) -> Any:
    """Return the tokenizer that a corpus was made with, as it was loaded for it (causal or not).

    Args:
        folder: the corpus' folder, with `train` in it.
        path: where the tokenizer is. None: in the corpus' folder.

    Raises:
        UserError: there is none (code `no_tokenizer`), or it is another one (`other_tokenizer`).
    """
    from torchrecipes.data.corpus import open_corpus
    from torchrecipes.data.tokenizers import load_tokenizer

    expected = open_corpus(folder / "train").tokenizer_fingerprint
    place = Path(path) if path else folder / "tokenizer"
    if path is None and not place.is_dir():
        hint = "Give the folder of the tokenizer that the corpus was made with."
        raise UserError(f"{folder} holds no copy of its tokenizer", key="--tokenizer", hint=hint, code="no_tokenizer")
    found = []
    for causal in (True, False):
        try:
            tokenizer = load_tokenizer(place, causal=causal)
        except UserError as error:
            if error.code != "no_special_token":
                raise
            continue
        if tokenizer.fingerprint == expected:
            return tokenizer
        found.append(tokenizer.fingerprint)
    raise UserError(
        f"{place} is not the tokenizer of {folder} (fingerprint {' or '.join(found)}, the corpus' is {expected})",
        key="--tokenizer",
        hint="Give the tokenizer that the corpus was made with, or tokenize the text into another corpus.",
        code="other_tokenizer",
    )
