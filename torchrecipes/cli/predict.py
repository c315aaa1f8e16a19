"""`tune-style predict`: labels and probabilities of texts, from a trained classifier."""

import argparse
import csv
import io
import json
import math
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torchrecipes.cli.openmp import wait_without_spinning
from torchrecipes.cli.text_arguments import add_text_arguments, check_text_arguments
from torchrecipes.cli.trained_model import add_model_arguments, load_text_classifier, print_counts
from torchrecipes.errors import UserError

FORMATS = (".jsonl", ".csv")
OPTIONS = {"path": "--input", "text_column": "--text-column", "pair_column": "--text-pair-column"}
OPTIONS |= {"max_length": "--max-length"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `predict`."""
    parser.epilog = (
        'example: tune-style predict runs/reviews "A film that I will not forget."\n'
        "         tune-style predict runs/reviews --input reviews.csv --text-column review --output labels.csv\n"
        "         cat lines.txt | tune-style predict runs/reviews --input - > labels.jsonl\n"
        '         tune-style predict runs/reranker "how to sort a list" --pair "sorted() returns a new list."'
    )
    add_model_arguments(parser)
    add_text_arguments(parser, texts="texts to classify", output=".jsonl or .csv (default: JSON lines on stdout)")
    parser.add_argument("--pair", metavar="TEXT", help="the second text of every TEXT, for a classifier of pairs")
    parser.add_argument("--text-pair-column", metavar="KEY", help="that of the second text, for a classifier of pairs")
    parser.add_argument("--top-k", type=int, metavar="K", help="the K most probable labels only (default: all)")
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens of a text (default: as in training)")


def main(args: argparse.Namespace) -> None:
    """Classify the texts of the arguments or of a file."""
    output = _check(args)
    wait_without_spinning()

    from torchrecipes.atomic_write import check_writable, write_atomically
    from torchrecipes.data.progress import Progress
    from torchrecipes.data.sources import TextRows

    if output is not None:
        check_writable(output.parent, key="--output")
        output.parent.mkdir(parents=True, exist_ok=True)
    try:
        texts: Any = args.texts
        if args.input is not None:
            texts = TextRows(args.input, args.text_column, args.text_pair_column, on_bad_row="empty")
        elif args.pair is not None:
            texts = [(text, args.pair) for text in texts]
        _, classify = load_text_classifier(args, max_length=args.max_length, tokens_per_batch=args.batch_tokens)
    except UserError as error:
        found = {"hint": error.hint, "code": error.code, "problems": error.problems}
        raise UserError(error.problem, key=OPTIONS.get(error.key, error.key), **found) from None
    labels = classify.model.labels
    if args.input is None and output is None:
        for text, prediction in zip(args.texts, classify.predict(texts), strict=True):
            print("\n".join(_shown(text, prediction, labels, args.top_k)))
        _report(classify, texts)
        return
    progress = Progress("predicting", getattr(texts, "num_bytes", None))
    write = _csv_rows if output is not None and output.suffix == ".csv" else _json_lines
    begin = time.perf_counter()
    rows = write(_predictions(texts, classify, progress), labels, args)
    try:
        if output is None:
            for chunk in rows:
                sys.stdout.write(chunk)
                sys.stdout.flush()
        else:
            write_atomically(output, (chunk.encode() for chunk in rows))
    finally:
        progress.close()
    count = progress.documents
    seconds = max(time.perf_counter() - begin, 1e-9)
    where = f" in {output}" if output else ""
    what = "prediction" if count == 1 else "predictions"
    print(f"{count:,} {what}{where}; {count / seconds:,.0f} texts/s", file=sys.stderr)
    _report(classify, texts)


def _check(args: argparse.Namespace) -> Path | None:
    """Check the arguments by themselves; return the file to write, or None."""
    output = check_text_arguments(args, FORMATS, ["--top-k", "--max-length"])
    if args.pair is not None and args.input is not None:
        raise UserError("it belongs to texts on the command line", key="--pair", code="unused_option")
    if args.text_pair_column is not None and args.input is None:
        raise UserError("it belongs to --input", key="--text-pair-column", code="unused_option")
    return output


class Window(NamedTuple):
    """Some texts, what was found for each, and why some are no valid domain names, by their places."""

    texts: list
    labels: list[tuple[str, ...]]
    scores: Any
    reasons: dict[int, str]
    has_reasons: bool


def _predictions(texts: Iterable, classify: Any, progress: Any) -> Iterator[Window]:
    kept: deque = deque()

    def reading() -> Iterator:
        for text in texts:
            kept.append(text)
            yield text

    for found in classify.predict_windows(reading(), progress):
        yield Window([kept.popleft() for _ in found.labels], *found, classify.tokenizer.domain is not None)


def _json_lines(windows: Iterable[Window], labels: Any, args: argparse.Namespace) -> Iterator[str]:
    # Put together by hand: `json.dumps` of a short text's record takes longer than a small model.
    quote = json.encoder.encode_basestring
    names = [quote(name) for name in labels.names]
    quoted = dict(zip(labels.names, names, strict=True))
    is_number = labels.task == "regression" and len(names) == 1
    keys = {"regression": ("", "score" if is_number else "scores"), "single_label": ("label", "probabilities")}
    choice, key = keys.get(labels.task, ("labels", "probabilities"))
    for window in windows:
        lines = []
        rows = zip(window.texts, _rows(window.scores), _rows(_order(window.scores, labels, args.top_k)), strict=True)
        for place, (text, scores, order) in enumerate(rows):
            fields = (
                [f'"text": {quote(text)}']
                if type(text) is str
                else [f'"text": {quote(text[0])}, "text_pair": {quote(text[1])}']
            )
            is_empty, chosen = scores[0] != scores[0], [quoted[name] for name in window.labels[place]]
            if choice:
                shown = chosen[0] if choice == "label" and chosen else f"[{', '.join(chosen)}]"
                fields.append(f'"{choice}": {"null" if is_empty else shown}')
            if is_empty:
                fields.append(f'"{key}": null')
            elif is_number:
                fields.append(f'"{key}": {_rounded(scores[0])}')
            else:
                pairs = ", ".join([f"{names[i]}: {_rounded(scores[i])}" for i in order])
                fields.append(f'"{key}": {{{pairs}}}')
            if place in window.reasons:
                fields.append(f'"reason": "{window.reasons[place]}"')
            lines.append(f"{{{', '.join(fields)}}}\n")
        yield "".join(lines)


def _rows(array: Any) -> Iterator[tuple]:
    """The rows of a matrix. Lists of them would be as many objects for the garbage collector to look through."""
    return zip(*array.T.tolist(), strict=True)


def _order(scores: Any, labels: Any, top_k: int | None) -> Any:
    """`[n, K]`, the labels of each text, the most probable first; numbers of a regression stay in their order."""
    import numpy as np

    if labels.task == "regression":
        return np.broadcast_to(np.arange(scores.shape[1]), scores.shape)[:, :top_k]
    return np.argsort(-scores, axis=1, kind="stable")[:, :top_k]


def _csv_rows(windows: Iterable[Window], labels: Any, args: argparse.Namespace) -> Iterator[str]:
    """A column for every label; labels that --top-k leaves out are empty."""
    texts = ("text", "text_pair") if args.pair is not None or args.text_pair_column else ("text",)
    found = () if labels.task == "regression" else ("label",)
    names = ("score",) if labels.task == "regression" and len(labels.names) == 1 else labels.names
    header = (*texts, *found, *names)
    for window in windows:
        if header:
            yield _csv([(*header, "reason") if window.has_reasons else header])
            header = ()
        rows, order = [], list(_rows(_order(window.scores, labels, args.top_k)))
        for place, (text, scores) in enumerate(zip(window.texts, _rows(window.scores), strict=True)):
            row = [text] if type(text) is str else [*text]
            if found:
                row.append(";".join(window.labels[place]))
            values: list[float | str] = [""] * len(scores)
            if scores[0] == scores[0]:
                for i in order[place]:
                    values[i] = _rounded(scores[i])
            row += values
            if window.has_reasons:
                row.append(window.reasons.get(place, ""))
            rows.append(row)
        yield _csv(rows)
    if header:
        yield _csv([header])


def _csv(rows: Iterable[Iterable]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()


def _shown(text: str, prediction: Any, labels: Any, top_k: int | None) -> Iterator[str]:
    yield f"\n{text}"
    if prediction.reason:
        yield f"  no label: {prediction.reason}"
        return
    if math.isnan(prediction.scores[0]):
        yield "  empty: no label"
        return
    for i in _order(prediction.scores[None], labels, top_k)[0].tolist():
        name, score = labels.names[i], prediction.scores[i]
        if labels.task == "regression":
            yield f"  {score:8.4f}" + (f"  {name}" if len(labels.names) > 1 else "")
        else:
            yield f"{'* ' if name in prediction.labels else '  '}{score:7.2%}  {name}"


def _rounded(score: float) -> float:
    return float(f"{score:.7g}")  # a float32 has no more digits


def _report(classify: Any, texts: Any) -> None:
    """Say what was cut, empty or not a text."""
    bad = getattr(texts, "num_bad", 0)
    counts = {
        f"longer than {classify.max_length} tokens and cut off": classify.num_truncated,
        "empty and left without a label": classify.num_empty - bad,
        f"not readable and left without a label; the first is {getattr(texts, 'first_bad', '')}": bad,
    }
    for reason, count in classify.invalid_names.most_common():
        if reason != "blank":
            counts[f"invalid as a domain name and left without a label ({reason})"] = count
    print_counts(counts)
