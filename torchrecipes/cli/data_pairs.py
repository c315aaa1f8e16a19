"""`tune-style data pairs`: tokenizes examples to fine-tune on, ahead of a run."""

import argparse
from pathlib import Path
from typing import Any

from torchrecipes.errors import UserError

KINDS = {"pairs": "pairs", "scored_pairs": "scored_pairs", "labeled": "labeled_texts", "texts": "raw_texts"}
SEQ_LEN = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `data pairs`."""
    parser.epilog = (
        "example: tune-style data pairs --data faq.jsonl --set query=question positive=answer --tokenizer minilm \\\n"
        "             -o corpus\n"
        "         tune-style data pairs --data sts.csv --kind scored_pairs --set low=0 high=5 \\\n"
        "             --tokenizer minilm -o sts\n"
        "         tune-style data pairs --config my.yaml -o corpus\n\n"
        "A run trains on it with data.corpus_dir=CORPUS and the same data.source, tokenizer, seq_len and prompts."
    )
    parser.add_argument("-o", "--output", required=True, metavar="CORPUS", help="the folder of the corpus")
    group = parser.add_argument_group("examples")
    one = group.add_mutually_exclusive_group(required=True)
    one.add_argument("--data", nargs="+", metavar="PATH", help="files, folders, patterns: .jsonl, .csv, .tsv, .parquet")
    one.add_argument("--dataset", metavar="NAME", help="a Hugging Face dataset, on the hub or a folder")
    one.add_argument("--config", metavar="CONFIG", help="a config of a fine-tuning recipe; all its data are tokenized")
    group.add_argument("--kind", choices=KINDS, help="kind of examples (default pairs)")
    group.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="arguments of the source, such as query=question columns=[text,label] low=0 on_bad_record=skip: those of "
        "torchrecipes.data.examples.pairs, scored_pairs, labeled_texts or raw_texts",
    )
    group.add_argument(
        "overrides", nargs="*", default=[], metavar="KEY=VALUE", help="settings that override the config's"
    )
    group = parser.add_argument_group("tokenization (with --config, the config has these)")
    group.add_argument("--tokenizer", metavar="TOKENIZER", help="a tokenizer's folder or file, a model or a run")
    group.add_argument("--seq-len", type=int, metavar="N", help=f"tokens of a text at most (default {SEQ_LEN})")
    group.add_argument(
        "--prompt", action="append", metavar="KIND=TEXT", help="written before texts: query='query: ', passage=..."
    )
    group.add_argument(
        "--task", metavar="TASK", help="what a label is: single_label (the default), multi_label, regression"
    )
    group.add_argument("--label-names", metavar="A,B", help="the classes in their order (default: sorted)")
    group.add_argument("--validation-fraction", type=float, metavar="F", help="share of the examples held out")
    group.add_argument(
        "--split-by", metavar="COLUMN", help="query or positive: the text by whose hash they are held out"
    )
    group.add_argument("--threads", type=int, metavar="N", help="threads that tokenize (default: one per core)")


def main(args: argparse.Namespace) -> None:
    """Make the corpus and print its summary."""
    if args.config is not None:
        _from_config(args)
        return
    if args.overrides:
        problem = f"{args.overrides[0]}: there is no --config that it could override"
        raise UserError(problem, hint="Arguments of the source follow --set.", code="unused_option")
    if args.tokenizer is None:
        hint = "Give the folder of the model that will be trained."
        raise UserError("missing", key="--tokenizer", hint=hint, code="missing_option")
    source = _source(args)

    from torchrecipes.cli.data_tokenize import save_copy
    from torchrecipes.cli.tokenizer_choice import make_tokenizer, tokenizer_component
    from torchrecipes.data.examples import prepare_examples

    output = Path(args.output)
    component = tokenizer_component(args.tokenizer)
    tokenizer = make_tokenizer(component, False, source.as_documents(), output / "tokenizer")
    try:
        train, validation = prepare_examples(
            output,
            source,
            tokenizer,
            max_length=args.seq_len or SEQ_LEN,
            prompts=_prompts(args.prompt),
            validation_fraction=args.validation_fraction or 0.0,
            split_by=args.split_by,
            task=args.task or "single_label",
            label_names=args.label_names and args.label_names.split(","),
            tokenizer_threads=args.threads,
        )
    except UserError as error:
        raise _with_option(error) from None
    save_copy(tokenizer, output / "tokenizer")
    for corpus in (train, validation):
        if corpus is not None:
            print(corpus.summary())
    print(f"{output}: complete")


def _source(args: argparse.Namespace) -> Any:
    from torchrecipes.cli.data_source import checked_component
    from torchrecipes.config.components import build

    kind = args.kind or "pairs"
    for setting in args.set:
        if setting.partition("=")[0] in ("path", "dataset"):
            raise UserError(f"{setting}: --data or --dataset says it", key="--set", code="unused_option")
    component = checked_component("data.source", f"torchrecipes.data.examples.{KINDS[kind]}", args.set)
    component.args |= {"path": args.data} if args.data else {"dataset": args.dataset}
    try:
        return build(component)
    except UserError as error:
        options = {"path": "--data", "dataset": "--dataset"}
        key = options.get(error.key, f"--set {error.key}" if error.key else None)
        raise UserError(error.problem, key=key, hint=error.hint, code=error.code) from None


def _from_config(args: argparse.Namespace) -> None:
    names = ("kind", "set", "tokenizer", "seq_len", "prompt", "task", "label_names", "validation_fraction", "split_by")
    given = [name for name in (*names, "threads") if getattr(args, name)]
    if given:
        option = f"--{given[0].replace('_', '-')}"
        raise UserError("the config says it", key=option, hint="Override its key: KEY=VALUE.", code="unused_option")

    from torchrecipes.cli.run import load_recipe_and_config
    from torchrecipes.config.catalog import find_config, read_header

    recipe, _ = read_header(find_config(args.config))
    if recipe is None:
        problem, hint = f"{args.config} names no recipe", "Its first line does: # recipe: contrastive_finetune"
        raise UserError(problem, key="--config", hint=hint, code="no_recipe")
    settings = [f"output_dir={args.output}", *args.overrides, f"data.corpus_dir={args.output}"]
    _, config = load_recipe_and_config(
        argparse.Namespace(recipe=recipe, config=args.config, stage=None, overrides=settings)
    )

    from torchrecipes.data.example_data import ExampleData, load_examples

    if not isinstance(config.data, ExampleData):
        hint = "Use tune-style data tokenize."
        raise UserError(f"{recipe} trains on text, not on examples", key="--config", hint=hint, code="no_examples")
    load_examples(config, **_labels_and_prompts(config))
    print(f"{args.output}: complete")


def _labels_and_prompts(config: Any) -> dict[str, Any]:
    """Return the arguments that the recipe gives `load_examples`: from the groups and keys of fine-tuning recipes."""
    from torchrecipes.models import EmbeddingConfig

    found = {name: vars(config)[name] for name in ("task", "label_names") if name in vars(config)}
    for group in vars(config).values():
        if isinstance(group, EmbeddingConfig):
            found["prompts"], _ = group.prompting(config.init_from)
    return found


def _prompts(stated: list[str] | None) -> dict[str, str]:
    prompts = {}
    for prompt in stated or []:
        kind, equals, text = prompt.partition("=")
        if not equals:
            hint = "Give the kind of text and the prompt: --prompt query='query: '"
            raise UserError(f"{prompt} has no =", key="--prompt", hint=hint, code="invalid_value")
        prompts[kind] = text
    return prompts


def _with_option(error: UserError) -> UserError:
    """The same mistake with the option of this verb in place of an argument or a config's key."""
    options = {
        "data.corpus_dir": "--output",
        "data.validation_fraction": "--validation-fraction",
        "data.tokenizer_threads": "--threads",
        "seq_len": "--seq-len",
        "task": "--task",
        "label_names": "--label-names",
        "split_by": "--split-by",
        "label": "--set label",
        "negatives": "--set negatives",
    }
    key = "--prompt" if str(error.key).startswith("prompts.") else options.get(error.key, error.key)
    return UserError(error.problem, key=key, hint=error.hint, code=error.code, problems=error.problems)
