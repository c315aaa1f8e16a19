"""`tune-style data tokenize`: turns text into a corpus, ahead of a run."""

import argparse
from pathlib import Path
from typing import Any

from torchrecipes.cli.data_source import add_source_arguments, build_source, config_parts, source_from
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
    component, fraction, eval_sources = _settings(args)
    source = source_from(args)
    if source is None:
        hint = "Give --data PATH... or --config CONFIG."
        raise UserError("there is no text to tokenize", key="--data", hint=hint, code="missing_option")

    from torchrecipes.data.corpus import check_corpus_dir, prepare_corpus

    output = Path(args.output)
    try:
        corpora = _corpora(args, source, fraction, eval_sources)
        if args.num_shards is not None:
            _refuse_training(component)
        for corpus in corpora:
            check_corpus_dir(*corpus)
        tokenizer = make_tokenizer(component, args.objective == "causal", source, output / "tokenizer")
        for folder, part, held_out in corpora:
            made = [
                corpus for corpus in prepare_corpus(folder, part, tokenizer, held_out, None, args.threads) if corpus
            ]
            tokens, shards = sum(corpus.num_tokens for corpus in made), sum(len(corpus.shards) for corpus in made)
            print(f"{folder}: complete, {tokens:,} tokens in {shards:,} shards")
    except UserError as error:
        raise _with_option(error) from None
    save_copy(tokenizer, output / "tokenizer")
    if args.num_shards is not None:
        print(f"When all {args.num_shards} parts are complete: tune-style data tokenize --merge -o {output}")


def _settings(args: argparse.Namespace) -> tuple[Any, float, dict[str, Any]]:
    """The tokenizer's component, the validation fraction and the sources of evaluation sets."""
    component, fraction, eval_sources = None, FRACTION, {}
    if args.config is not None:
        keys = ["data.validation_fraction", "data.eval_sets"]
        stated, eval_sets = config_parts(args.config, args.overrides, keys)
        fraction = FRACTION if stated is None else stated
        eval_sources = {name: build_source(f"data.eval_sets.{name}", node) for name, node in eval_sets.items()}
        if args.tokenizer is None:
            (component,) = config_parts(args.config, args.overrides, ["tokenizer"])
    if args.tokenizer is not None:
        component = tokenizer_component(args.tokenizer)
    if component is None:
        hint = "Give a tokenizer's folder, or one to train: --tokenizer train_bpe."
        raise UserError("missing", key="--tokenizer", hint=hint, code="missing_option")
    if args.validation_fraction is not None:
        fraction = args.validation_fraction
    return component, fraction, eval_sources


def _corpora(
    args: argparse.Namespace, source: Any, fraction: float, eval_sources: dict[str, Any]
) -> list[tuple[Path, Any, float]]:
    """Folder, source and held-out share of every corpus that a run would make; of a job, its part of them."""
    from torchrecipes.data.corpus import part_folder
    from torchrecipes.data.sources import Mixture, SourcePart
    from torchrecipes.data.text_data import EVAL_SETS, VALIDATION

    output = Path(args.output)
    parts = source.sources if isinstance(source, Mixture) else {VALIDATION: source}
    folders = {name: output / name if isinstance(source, Mixture) else output for name in parts}
    corpora = [(folders[name], part, 0 if name in eval_sources else fraction) for name, part in parts.items()]
    if args.num_shards is not None:
        job = (args.shard_index, args.num_shards)
        corpora = [(part_folder(folder, *job), SourcePart(part, *job), share) for folder, part, share in corpora]
    if args.shard_index in (None, 0):  # evaluation sets are small: the first job makes them
        corpora += [(output / EVAL_SETS / name, part, 0) for name, part in eval_sources.items()]
    return corpora


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

    output = Path(args.output)
    # Those of a mixture are one level down.
    folders = [path.parent for pattern in ("parts", "*/parts") for path in sorted(output.glob(pattern))]
    for folder in folders or [output]:
        for corpus in merge_parts(folder):
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
