"""`tune-style data mine-negatives`: adds hard negatives to pairs, found by a trained encoder."""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torchrecipes.cli.openmp import wait_without_spinning
from torchrecipes.errors import UserError

PAIRS_AT_ONCE = 4096  # of a query and a passage, for a cross-encoder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `data mine-negatives`."""
    parser.epilog = (
        "example: tune-style data mine-negatives --model runs/embeddings --data pairs.jsonl --output mined.jsonl\n"
        "         tune-style data mine-negatives --model runs/embeddings --data faq.csv \\\n"
        "             --set query=question positive=answer --positive-id doc \\\n"
        "             --corpus corpus.jsonl --corpus-id _id --range 0 100 --relative-margin 0.05 -o mined.jsonl\n\n"
        "Train on the result: data.source._component_=torchrecipes.data.examples.pairs data.source.path=mined.jsonl\n"
        "data.source.negatives=negatives (and data.source.scores=scores for a loss that learns from scores)."
    )
    parser.add_argument(
        "--model", required=True, dest="run", metavar="RUN", help="the encoder: a run, a checkpoint, or a model folder"
    )
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="JSON lines: the pairs with negatives")
    group = parser.add_argument_group("texts")
    group.add_argument("--data", nargs="+", required=True, metavar="PATH", help="pairs: .jsonl, .csv, .tsv, .parquet")
    group.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="arguments of torchrecipes.data.examples.pairs, such as query=question positive=answer",
    )
    group.add_argument(
        "--positive-id", metavar="COLUMN", help="column of the pairs that identifies the positive's document"
    )
    group.add_argument(
        "--corpus",
        metavar="PATH",
        help="more candidates: a file, or a folder in BEIR's layout (default: the positives)",
    )
    group.add_argument(
        "--corpus-text", default="text", metavar="COLUMN", help="text column of the corpus (default text)"
    )
    group.add_argument(
        "--corpus-id", metavar="COLUMN", help="column of the corpus that identifies a passage's document"
    )
    group = parser.add_argument_group("rules")
    group.add_argument(
        "--range",
        nargs=2,
        type=int,
        default=(10, 50),
        metavar=("FIRST", "LAST"),
        help="ranks of candidates, without the last; the best that is no positive has rank 0 (default 10 50)",
    )
    group.add_argument("--num-negatives", type=int, default=5, metavar="N", help="per pair (default 5)")
    group.add_argument(
        "--min-negatives", type=int, default=1, metavar="N", help="leave out pairs with fewer (default 1)"
    )
    group.add_argument("--absolute-margin", type=float, metavar="M", help="negatives score at most p - M")
    group.add_argument(
        "--relative-margin", type=float, metavar="M", help="at most p - M * |p|, p the positive's score; often 0.05"
    )
    group.add_argument("--max-score", type=float, metavar="S", help="negatives score at most S")
    group.add_argument("--min-score", type=float, metavar="S", help="negatives score at least S")
    group.add_argument(
        "--strategy", choices=("top", "random"), default="top", help="which candidates are taken (default top)"
    )
    group.add_argument("--seed", type=int, default=0, help="seed of the random choice (default 0)")
    group.add_argument("--cross-encoder", metavar="RUN", help="a reranker, whose scores the rules judge by")
    group = parser.add_argument_group("search")
    group.add_argument(
        "--index",
        choices=("auto", "exact", "faiss", "usearch"),
        default="auto",
        help="default auto: exact below a million passages, else faiss or usearch",
    )
    group.add_argument("--similarity", choices=("cosine", "dot"), help="default: the model's")
    group.add_argument("--max-length", type=int, metavar="N", help="tokens of a text (default: the model's)")
    group.add_argument(
        "--batch-tokens",
        type=int,
        metavar="N",
        help="tokens per forward pass (default 1,024 per thread, 32,768 on a GPU)",
    )
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps, ... (default: a GPU if there is one)")
    group.add_argument(
        "--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="default: bf16 on a GPU"
    )
    group.add_argument(
        "--work-dir",
        metavar="DIR",
        help="keep embeddings here, to try other rules (default: OUTPUT.work, then deleted)",
    )


def main(args: argparse.Namespace) -> None:
    """Mine, and print what each rule has removed."""
    try:
        _mine(args)
    except UserError as error:
        keys = {"path": "--data", "text": "--corpus-text", "label": "--positive-id"}
        key = error.key and (keys.get(error.key) or f"--{error.key.removeprefix('--').replace('_', '-')}")
        raise UserError(error.problem, key=key, hint=error.hint, code=error.code, problems=error.problems) from None


def _mine(args: argparse.Namespace) -> None:
    if args.min_negatives < 1 or args.min_negatives > args.num_negatives:
        problem = f"{args.min_negatives} is not between 1 and --num-negatives, {args.num_negatives}"
        raise UserError(problem, key="min_negatives", code="out_of_range")
    wait_without_spinning()
    from torchrecipes.mining import NegativeRules

    names = ("num_negatives", "absolute_margin", "relative_margin", "max_score", "min_score", "strategy", "seed")
    rules = NegativeRules(range=tuple(args.range), **{name: getattr(args, name) for name in names})
    pairs, corpus = _pairs(args), _corpus(args)
    if Path(args.output).exists():
        raise UserError(f"{args.output} exists", key="output", hint="Delete it or give another file.", code="exists")

    from torchrecipes.atomic_write import check_writable
    from torchrecipes.cli.trained_model import load_text_encoder
    from torchrecipes.mining import mine_hard_negatives

    check_writable(Path(args.output).parent, key="output")
    options = {"max_length": args.max_length, "tokens_per_batch": args.batch_tokens}
    folder, encoder = load_text_encoder(args, **options)
    rescore = _cross_encoder(args) if args.cross_encoder else None
    reranker = _checksum(Path(args.cross_encoder)) if args.cross_encoder else ""
    begin = time.perf_counter()
    stats = mine_hard_negatives(
        encoder,
        pairs,
        args.output,
        corpus=corpus,
        rules=rules,
        labels_are_ids=args.positive_id is not None,
        min_negatives=args.min_negatives,
        similarity=args.similarity or encoder.model.similarity,
        index=args.index,
        rescore=rescore,
        work_folder=args.work_dir,
        identity=f"{_checksum(folder)} {encoder.max_length} {args.precision} {reranker}",
        report=partial(print, file=sys.stderr, flush=True),
    )
    for line in stats.lines():
        print(line)
    print(f"{args.output}: read it with negatives=negatives scores=scores; {time.perf_counter() - begin:,.0f} s")


def _pairs(args: argparse.Namespace) -> Any:
    from torchrecipes.cli.data_source import checked_component
    from torchrecipes.config.components import build

    component = checked_component("data.source", "torchrecipes.data.examples.pairs", args.set)
    component.args |= {"path": args.data} | ({"label": args.positive_id} if args.positive_id else {})
    return build(component)


def _corpus(args: argparse.Namespace) -> Any:
    if args.corpus is None:
        return ()
    from torchrecipes.data.examples import labeled_texts, raw_texts
    from torchrecipes.evaluation.beir import is_beir_folder, read_beir_texts

    if is_beir_folder(args.corpus):
        return read_beir_texts(args.corpus, "corpus")
    try:
        if args.corpus_id is None:
            return ((None, example.texts[0]) for example in raw_texts(args.corpus, args.corpus_text))
        source = labeled_texts(args.corpus, args.corpus_text, label=args.corpus_id)
    except UserError as error:
        keys = {"path": "corpus", "text": "corpus_text", "label": "corpus_id"}
        key = keys.get(error.key, error.key)
        raise UserError(error.problem, key=key, hint=error.hint, code=error.code) from None
    return ((str(example.label), example.texts[0]) for example in source)


def _cross_encoder(args: argparse.Namespace) -> Callable[[list[tuple[str, str]]], Any]:
    """Return a function that gives the scores of pairs: the number of a regression, else the last label's probability.

    Raises:
        UserError: the model has more than two labels (code `not_a_reranker`).
    """
    import numpy as np

    from torchrecipes.cli.trained_model import load_text_classifier

    folder, classifier = load_text_classifier(argparse.Namespace(**{**vars(args), "run": args.cross_encoder}))
    if classifier.model.num_labels > 2:
        problem = f"{folder} has {classifier.model.num_labels} labels; a reranker has one, or two"
        raise UserError(problem, key="cross_encoder", code="not_a_reranker")

    def rescore(pairs: list[tuple[str, str]]) -> Any:
        scores = np.empty(len(pairs), np.float32)
        for first in range(0, len(pairs), PAIRS_AT_ONCE):
            part = classifier.predict(pairs[first : first + PAIRS_AT_ONCE])
            scores[first : first + len(part)] = [prediction.scores[-1] for prediction in part]
        return scores

    return rescore


def _checksum(folder: Path) -> str:
    """Of the files that make a model."""
    import xxhash

    from torchrecipes.data.sources.records import content_checksum
    from torchrecipes.models import resolve_model_folder

    found = resolve_model_folder(folder)
    names = sorted(path for end in ("safetensors", "json") for path in found.rglob(f"*.{end}"))
    described = [
        f"{path.relative_to(found)} {content_checksum(path)}" for path in names if path.name != "manifest.json"
    ]
    return xxhash.xxh3_128_hexdigest("\n".join(described).encode())
