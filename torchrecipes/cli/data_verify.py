"""`tune-style data verify`: reads all shards of a corpus and compares their checksums."""

import argparse
from pathlib import Path

from torchrecipes.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `data verify`."""
    parser.epilog = "example: tune-style data verify runs/first/corpus"
    parser.add_argument("corpus", nargs="+", help="a corpus folder, or its train or validation folder")


def main(args: argparse.Namespace) -> None:
    """Print a line for every corpus that is whole.

    Raises:
        UserError: a shard is corrupt (code `corrupt_corpus`); every other corpus has been checked before.
    """
    from torchrecipes.data.corpus import open_corpus
    from torchrecipes.data.examples import holds_examples, open_examples

    problems = []
    for path in (path for name in args.corpus for path in sorted(Path(name).glob("split-*.safetensors"))):
        from torchrecipes.data.domains.name_split import load_split

        try:
            load_split(path)
        except UserError as error:
            problems.append(error)
    for folder in (split for name in args.corpus for split in corpus_splits(name)):
        try:
            corpus = open_examples(folder) if holds_examples(folder) else open_corpus(folder)
            corpus.verify()
        except UserError as error:
            problems.append(error)
        else:
            size = sum(shard.path.stat().st_size for shard in corpus.shards)
            print(f"{folder}: {len(corpus.shards):,} shards, {size / 1e6:,.1f} MB, {corpus.num_tokens:,} tokens: valid")
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise UserError("\n".join(map(str, problems)), code=problems[0].code, problems=problems)


def corpus_splits(name: str) -> list[Path]:
    """Return the corpora in the folder `name`: itself, or the `train` and `validation` folders in it."""
    folder = Path(name)
    splits = [folder / split for split in ("train", "validation") if (folder / split).is_dir()]
    return splits or [folder]
