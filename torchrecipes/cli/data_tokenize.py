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
    source = source_from(args)
    if source is None:
        hint = "Give --data PATH... or --config CONFIG."
        raise UserError("there is no text to tokenize", key="--data", hint=hint, code="missing_option")
    component = _tokenizer(args)

    from torchrecipes.data.corpus import check_corpus_dir, prepare_corpus

    output = Path(args.output)
    try:
        corpora = _corpora(args, source)
        if args.num_shards is not None:
            _refuse_training(component)
        for corpus in corpora:
            check_corpus_dir(*corpus)
        tokenizer = make_tokenizer(component, args.objective == "causal", source, output / "tokenizer")
        for folder, part, fraction, samples in corpora:
            prepared = prepare_corpus(
                folder, part, tokenizer, fraction, eval_samples=samples, tokenizer_threads=args.threads
            )
            made = [corpus for corpus in prepared if corpus is not None]
            tokens, shards = sum(corpus.num_tokens for corpus in made), sum(len(corpus.shards) for corpus in made)
            print(f"{folder}: complete, {tokens:,} tokens in {shards:,} shards")
    except UserError as error:
        raise _with_option(error) from None
    save_copy(tokenizer, output / "tokenizer")
    if args.num_shards is not None:
        print(f"When all {args.num_shards} parts are complete: tune-style data tokenize --merge -o {output}")


def _tokenizer(args: argparse.Namespace) -> Any:
    """The component of the tokenizer, the option's or the config's."""
    component = None
    if args.tokenizer is not None:
        component = tokenizer_component(args.tokenizer)
    elif args.config is not None:
        (component,) = config_parts(args.config, args.overrides, ["tokenizer"])
    if component is None:
        hint = "Give a tokenizer's folder, or one to train: --tokenizer train_bpe."
        raise UserError("missing", key="--tokenizer", hint=hint, code="missing_option")
    return component


def _corpora(args: argparse.Namespace, source: Any) -> list[tuple[Path, Any, float, int | None]]:
    """Folder, source, held-out share and number of documents of every corpus that a run would make (`load_text`).

    Of a job they are its part of the text; evaluation sets are small, and the first job makes them.
    """
    from torchrecipes.data.corpus import part_folder
    from torchrecipes.data.sources import Mixture, SourcePart
    from torchrecipes.data.sources.eval_split import split_for_evaluation
    from torchrecipes.data.text_data import EVAL_SETS, VALIDATION
    from torchrecipes.data.token_files.source import TokenSource

    output, fraction, samples, eval_sources = Path(args.output), FRACTION, None, {}
    parts = source.sources if isinstance(source, Mixture) else {VALIDATION: source}
    parts = {name: part for name, part in parts.items() if not isinstance(part, TokenSource)}
    if not parts:
        hint = "Train on it as it is."
        raise UserError(f"{source.name} is tokenized already", key="data.source", hint=hint, code="no_text")
    if args.config is not None:
        keys = ("validation_fraction", "eval_sets", "eval_split", "eval_samples")
        stated, eval_sets, split, samples = config_parts(args.config, args.overrides, [f"data.{key}" for key in keys])
        fraction = FRACTION if stated is None else stated
        eval_sources = {name: build_source(f"data.eval_sets.{name}", node) for name, node in eval_sets.items()}
        if split:
            others = {name: part for name, part in parts.items() if name not in eval_sources}
            eval_sources |= {name: split_for_evaluation(part, split, samples) for name, part in others.items()}
    if args.validation_fraction is not None:
        fraction, samples = args.validation_fraction, None
    held_out = (0.0, samples) if samples else (fraction, None)
    corpora = []
    for name, part in parts.items():
        folder = output / name if isinstance(source, Mixture) else output
        share = (0.0, None) if name in eval_sources else held_out
        if args.num_shards is not None:
            if share[1]:
                hint = "Hold out a fraction (--validation-fraction), or name evaluation sets."
                problem = "the first documents are in the first part only"
                raise UserError(problem, key="data.eval_samples", hint=hint, code="eval_samples")
            folder = part_folder(folder, args.shard_index, args.num_shards)
            part = SourcePart(part, args.shard_index, args.num_shards)
        corpora.append((folder, part, *share))
    if args.shard_index in (None, 0):
        corpora += [(output / EVAL_SETS / name, part, 0.0, None) for name, part in eval_sources.items()]
    return corpora


def _refuse_training(component: Any) -> None:
    if any(maker in component.path for maker in ("train_", "domain_tokenizer")):
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
