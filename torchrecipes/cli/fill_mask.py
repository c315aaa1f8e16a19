"""`tune-style fill-mask`: predicts masked tokens with a trained encoder."""

import argparse
import csv
import io
import json
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain
from typing import Any, NamedTuple

from torchrecipes.cli.openmp import wait_without_spinning
from torchrecipes.cli.text_arguments import add_text_arguments, check_text_arguments
from torchrecipes.cli.trained_model import add_model_arguments, load_mask_filler, print_counts
from torchrecipes.errors import UserError

FORMATS = (".jsonl", ".csv")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `fill-mask`."""
    parser.epilog = (
        'example: tune-style fill-mask runs/quickstart "The [MASK] of a function is the value that it returns."\n'
        "         tune-style fill-mask runs/quickstart --input sentences.txt --output filled.jsonl\n"
        "         cat sentences.txt | tune-style fill-mask runs/quickstart --input - --top-k 1 > filled.jsonl"
    )
    add_model_arguments(parser)
    add_text_arguments(
        parser, texts="a sentence with [MASK] in it", output=".jsonl or .csv (default: JSON lines on stdout)"
    )
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="predictions per mask (default 5)")


def main(args: argparse.Namespace) -> None:
    """Print or write the predictions for every text."""
    output = check_text_arguments(args, FORMATS, ["--top-k"])
    wait_without_spinning()

    from torchrecipes.atomic_write import check_writable, write_atomically
    from torchrecipes.data.progress import Progress
    from torchrecipes.data.sources import TextRows

    if output is not None:
        check_writable(output.parent, key="--output")
        output.parent.mkdir(parents=True, exist_ok=True)
    try:
        texts = args.texts or TextRows(args.input, args.text_column, on_bad_row="empty")
        fill = load_mask_filler(args, top_k=args.top_k, tokens_per_batch=args.batch_tokens)
    except UserError as error:
        key = {"path": "--input", "text_column": "--text-column"}.get(error.key, error.key)
        raise UserError(error.problem, key=key, hint=error.hint, code=error.code, problems=error.problems) from None
    if args.input is None and output is None:
        _print(fill, texts, args.top_k)
        return
    progress = Progress("filling masks", getattr(texts, "num_bytes", None), unit="texts")
    begin, counts = time.perf_counter(), Counter()
    write = _csv_rows if output is not None and output.suffix == ".csv" else _json_lines
    rows = write(_filled(fill, texts, progress, counts), args.top_k)
    try:
        if output is None:
            for chunk in rows:
                sys.stdout.write(chunk)
                sys.stdout.flush()
        else:
            write_atomically(output, (chunk.encode() for chunk in rows))
    finally:
        progress.close()
    seconds = max(time.perf_counter() - begin, 1e-9)
    where = f" in {output}" if output else ""
    number = progress.documents
    print(f"{number:,} {'text' if number == 1 else 'texts'}{where}; {number / seconds:,.0f} texts/s", file=sys.stderr)
    _report(counts, texts, fill)


class Filled(NamedTuple):
    """A text with the predictions for its masks, `(token, probability)`; or the reason why there are none."""

    text: str
    masks: list[list[tuple[str, float]]]
    reason: str | None


def _filled(fill: Any, texts: Iterable[str], progress: Any, counts: Counter) -> Iterator[list[Filled]]:
    """Yield the texts of each window, and count reasons."""
    kept: deque[str] = deque()

    def reading() -> Iterator[str]:
        for text in texts:
            kept.append(text)
            yield text

    name_of = cache(fill.tokenizer.decode_token)
    for found in fill.fill_iter(reading(), progress):
        names = [[name_of(token) for token in row] for row in found.tokens.tolist()]
        # A float32 has no more than seven digits.
        masks = [
            [(name, float(f"{p:.7g}")) for name, p in zip(row, probabilities, strict=True)]
            for row, probabilities in zip(names, found.probabilities.tolist(), strict=True)
        ]
        window, end = [], 0
        for place, number in enumerate(found.num_masks.tolist()):
            text, reason = kept.popleft(), found.reasons.get(place)
            if reason and not text.strip():
                reason = "no_text"
            window.append(Filled(text, masks[end : end + number], reason))
            end += number
        counts.update(filled.reason for filled in window if filled.reason)
        yield window


def _json_lines(windows: Iterable[list[Filled]], top_k: int) -> Iterator[str]:  # noqa: ARG001
    for window in windows:
        yield "".join(json.dumps(_record(filled), ensure_ascii=False) + "\n" for filled in window)


def _record(filled: Filled) -> dict[str, Any]:
    if filled.reason:
        return {"text": filled.text, "masks": None, "reason": filled.reason}
    names = ("token", "probability")
    masks = [[dict(zip(names, prediction, strict=True)) for prediction in mask] for mask in filled.masks]
    return {"text": filled.text, "masks": masks}


def _csv_rows(windows: Iterable[list[Filled]], top_k: int) -> Iterator[str]:
    """A row for every mask, and one for every text without a prediction; `row` is the text's, from 1."""
    columns = [f"{name}_{k}" for k in range(1, top_k + 1) for name in ("token", "probability")]
    yield _csv([("row", "text", "mask", *columns, "reason")])
    row = 0
    for window in windows:
        lines = []
        for filled in window:
            row += 1
            if filled.reason:
                lines.append((row, filled.text, "", *[""] * len(columns), filled.reason))
            for number, mask in enumerate(filled.masks, start=1):
                found = list(chain.from_iterable(mask))
                lines.append((row, filled.text, number, *found, *[""] * (len(columns) - len(found)), ""))
        yield _csv(lines)


def _csv(rows: Iterable[Iterable]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()


def _print(fill: Any, texts: list[str], top_k: int) -> None:
    from torchrecipes.evaluation import fill_mask

    for text in texts:
        print(f"\n{text}")
        predictions_per_mask = fill_mask(fill.model, fill.tokenizer, text, top_k=top_k, autocast=fill.autocast)
        for number, predictions in enumerate(predictions_per_mask, start=1):
            if len(predictions_per_mask) > 1:
                print(f"  mask {number}")
            for prediction in predictions:
                print(f"  {prediction.probability:7.2%}  {prediction.token}")


def _report(counts: Counter, texts: Any, fill: Any) -> None:
    """Say which texts have no predictions."""
    bad = getattr(texts, "num_bad", 0)
    found = {
        "empty (no_text)": counts["no_text"] - bad,
        f"not readable (no_text); the first is {getattr(texts, 'first_bad', '')}": bad,
        f"without {fill.tokenizer.decode_token(fill.tokenizer.mask_id)} (no_mask)": counts["no_mask"],
        f"longer than the model's {fill.max_length} positions (too_long)": counts["too_long"],
    }
    print_counts(found)
