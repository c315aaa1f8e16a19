"""`tune-style data tokenize`: turns text into a corpus, ahead of a run."""

import argparse
from pathlib import Path
from typing import Any

from torchrecipes.cli.data_source import add_source_arguments, config_parts, source_from, source_from_config
from torchrecipes.cli.tokenizer_choice import add_objective, make_tokenizer, tokenizer_component
from torchrecipes.errors import UserError

FRACTION = 0.005  # as in a config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `data tokenize`."""
    parser.epilog = (
        "example: tune-style data tokenize --data texts --tokenizer train_bpe --objective causal -o corpus\n"
        "         tune-style data tokenize --config my.yaml --objective mlm -o corpus\n"
        "         tune-style data tokenize --data texts --tokenizer gpt2 --objective causal -o corpus \\\\\n"
        "             --shard-index $SLURM_ARRAY_TASK_ID --num-shards 64\n"
        "         tune-style data tokenize --merge -o corpus\n\n"
        "A run trains on it with data.corpus_dir=CORPUS and the same data.source, tokenizer and validation settings."
    )
    parser.add_argument("-o", "--output", required=True, metavar="CORPUS", help="the folder of the corpus")
    parser.add_argument(
        "--tokenizer",
        metavar="TOKENIZER",
        help="a tokenizer's folder or file, a model or a run, or train_bpe:vocab_size=16384 (also train_wordpiece, "
        "train_unigram, train_char) to train one on the text (default: that of --config)",
    )
    add_objective(parser, required=False)
    parser.add_argument(
        "--validation-fraction",
        type=float,
        metavar="F",
        help=f"share of the documents held out, chosen by a hash of their text (default: --config's, or {FRACTION})",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads that tokenize (default: one per core)")
    jobs = parser.add_argument_group("several jobs")
    jobs.add_argument("--shard-index", type=int, metavar="I", help="tokenize part I of the text, from 0")
    jobs.add_argument("--num-shards", type=int, metavar="N", help="number of parts")
    jobs.add_argument("--merge", action="store_true", help="join the parts in CORPUS when all are complete")
    add_source_arguments(parser, required=False)


def main(args: argparse.Namespace) -> None:
    """Make the corpus, one part of it, or one of its parts."""
    if args.merge:
        _merge(args)
        return
    if (args.shard_index is None) != (args.num_shards is None):
        given = "--num-shards" if args.shard_index is None else "--shard-index"
        raise UserError("it needs --shard-index and --num-shards", key=given, code="missing_option")
    if args.objective is None:
        hint = "Give --objective causal for a model that predicts the next token, or --objective mlm."
        raise UserError("missing", key="--objective", hint=hint, code="missing_option")
    component, fraction, validation = _settings(args)
    source = source_from(args)
    if source is None:
        hint = "Give --data PATH... or --config CONFIG."
        raise UserError("there is no text to tokenize", key="--data", hint=hint, code="missing_option")

    from torchrecipes.data.corpus import check_corpus_dir, part_folder, prepare_corpus
    from torchrecipes.data.sources import SourcePart

    folder = output = Path(args.output)
    try:
        if args.num_shards is not None:
            _refuse_training(component)
            source = SourcePart(source, args.shard_index, args.num_shards)
            folder = part_folder(output, args.shard_index, args.num_shards)
        check_corpus_dir(folder, source, 0 if validation else fraction)
        tokenizer = make_tokenizer(component, args.objective == "causal", source, output / "tokenizer")
        corpora = prepare_corpus(folder, source, tokenizer, fraction, validation, args.threads)
    except UserError as error:
        raise _with_option(error) from None
    made = [corpus for corpus in corpora if corpus is not None]
    tokens, shards = sum(corpus.num_tokens for corpus in made), sum(len(corpus.shards) for corpus in made)
    print(f"{folder}: complete, {tokens:,} tokens in {shards:,} shards")
    save_copy(tokenizer, output / "tokenizer")
    if args.num_shards is not None:
        print(f"When all {args.num_shards} parts are complete: tune-style data tokenize --merge -o {output}")


def _settings(args: argparse.Namespace) -> tuple[Any, float, Any]:
    """The tokenizer's component, the validation fraction and the validation source."""
    component, fraction, validation = None, FRACTION, None
    if args.config is not None:
        keys = ["data.validation_fraction", "data.validation_source"]
        stated, validation = config_parts(args.config, args.overrides, keys)
        fraction = FRACTION if stated is None else stated
        if validation is not None:
            validation = source_from_config(args.config, args.overrides, "validation_source")
        if args.tokenizer is None:
            (component,) = config_parts(args.config, args.overrides, ["tokenizer"])
    if args.tokenizer is not None:
        component = tokenizer_component(args.tokenizer)
    if component is None:
        hint = "Give a tokenizer's folder, or one to train: --tokenizer train_bpe."
        raise UserError("missing", key="--tokenizer", hint=hint, code="missing_option")
    if args.validation_fraction is not None:
        fraction, validation = args.validation_fraction, None
    return component, fraction, validation


def _refuse_training(component: Any) -> None:
    if "train_" in component.path:
        raise UserError(
            "every job would train it on the whole text",
            key="--tokenizer",
            hint="Train it once with tune-style tokenizer train, and give its folder.",
            code="trained_tokenizer",
        )


def _merge(args: argparse.Namespace) -> None:
    from torchrecipes.data.corpus import merge_parts

    for corpus in merge_parts(args.output):
        corpus.verify()
        print(corpus.summary())


def save_copy(tokenizer: Any, folder: Path) -> None:
    """Save the tokenizer, unless one is there: `data append` and `data stats` read it."""
    if not (folder / "tokenizer.json").exists():
        tokenizer.save(folder)


def _with_option(error: UserError) -> UserError:
    """The same mistake with the option of this verb in place of a config's key."""
    options = {
        "data.corpus_dir": "--output",
        "data.validation_fraction": "--validation-fraction",
        "data.tokenizer_threads": "--threads",
    }
    if error.key not in options:
        return error
    return UserError(error.problem, key=options[error.key], hint=error.hint, code=error.code, problems=error.problems)
