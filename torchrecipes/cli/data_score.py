"""`tune-style data score`: the loss of every document under a trained model, to find bad data."""

import argparse
import json
import math
import os
import statistics
import sys
import time
from array import array
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from torchrecipes.cli.data_source import add_source_arguments, source_from
from torchrecipes.cli.openmp import wait_without_spinning
from torchrecipes.cli.trained_model import add_model_arguments, load_trained
from torchrecipes.errors import UserError

EXCERPT = 160  # characters of a document
NORMAL = 0.6745  # the median absolute deviation of a standard normal distribution


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `data score`."""
    parser.epilog = (
        "example: tune-style data score runs/gpt2 --data texts --output scores.jsonl\n"
        "         tune-style data score runs/neobert --data texts --output scores.jsonl --show 20"
    )
    add_model_arguments(parser)
    parser.add_argument("-o", "--output", default="scores.jsonl", metavar="FILE", help="the scores, the highest first")
    parser.add_argument("--show", type=int, default=10, metavar="N", help="outliers to print at each end (default 10)")
    parser.add_argument(
        "--min-tokens", type=int, default=16, metavar="N", help="shorter documents are no outliers (default 16)"
    )
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens per piece (default: the model's positions)")
    parser.add_argument("--batch-tokens", type=int, default=16_384, metavar="N", help="per forward pass")
    parser.add_argument(
        "--mlm-probability",
        dest="masked",
        type=float,
        default=0.15,
        metavar="P",
        help="masked models: share hidden (default 0.15)",
    )
    parser.add_argument("--seed", type=int, default=0, help="masked models: chooses what is hidden (default 0)")
    add_source_arguments(parser)


def main(args: argparse.Namespace) -> None:
    """Score the documents that are not scored yet, sort all, and print the outliers."""
    for option in ("--max-length", "--batch-tokens", "--show", "--min-tokens"):
        value = getattr(args, option[2:].replace("-", "_"))
        if value is not None and value < (0 if option == "--show" else 1):
            raise UserError(f"{value} is out of range", key=option, hint="Give 1 or more.", code="out_of_range")
    output = Path(args.output)
    if output.exists():
        hint = f"Delete it or give another file; {partial_file(output).name} would be continued."
        raise UserError(f"{output} exists", key="--output", hint=hint, code="exists")
    wait_without_spinning()
    source = source_from(args)

    from torchrecipes.atomic_write import check_writable
    from torchrecipes.data.sources import require_documents

    check_writable(output.parent, key="--output")
    folder, model, tokenizer, autocast = load_trained(args)
    settings = {
        "model": str(folder.resolve()),
        "source": source.fingerprint,
        "objective": "causal" if model.causal else "mlm",
        "max_length": args.max_length,
    }
    if not model.causal:
        settings |= {"masked": args.masked, "seed": args.seed}
    partial = partial_file(output)
    done = open_partial(partial, settings)
    if done:
        print(f"{done:,} documents are scored already: continuing after them", file=sys.stderr, flush=True)
    begin, before = time.perf_counter(), done
    try:
        done += _score(args, source, done, model, tokenizer, autocast, partial)
    except UserError as error:
        key = "--max-length" if error.key == "window" else error.key and f"--{error.key.replace('_', '-')}"
        raise UserError(error.problem, key=key, hint=error.hint, code=error.code) from None
    except KeyboardInterrupt:
        print(f"\nInterrupted. {partial} holds the scores; run the same command to continue.", file=sys.stderr)
        raise
    if not done:
        partial.unlink()
        require_documents(source, source.report)
    for line in source.report.lines()[1:]:
        print(line, file=sys.stderr)
    seconds = time.perf_counter() - begin
    summary = sort_scores(partial, output)
    hidden = "" if model.causal else f", {args.masked:.0%} of the tokens hidden once with seed {args.seed}"
    print(f"{folder} on {source.name}: {settings['objective']}{hidden}")
    print(
        f"{done:,} documents: median loss {summary['median']:.3f} nats per token, median absolute deviation "
        f"{summary['deviation']:.3f}; {(done - before) / seconds:,.0f} documents per second"
    )
    _print_outliers(output, args.show, args.min_tokens)
    print(f"\nsaved {output}, the highest loss first")


def partial_file(output: Path) -> Path:
    """The file that scores are written to until all are there."""
    return output.with_name(f"{output.name}.partial")


def open_partial(partial: Path, settings: dict[str, Any]) -> int:
    """Return how many documents `partial` holds scores of, without a last line that was cut off; make it if missing.

    Raises:
        UserError: it belongs to another model, text or way of scoring (code `other_scores`).
    """
    if not partial.exists():
        partial.write_text(json.dumps(settings) + "\n", encoding="utf-8")
        return 0
    count, end = -1, 0
    with partial.open("r+b") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            if count < 0 and json.loads(line) != settings:
                saved = json.loads(line)
                differ = [key for key in {**saved, **settings} if saved.get(key) != settings.get(key)]
                raise UserError(
                    f"{partial} has scores of something else: {', '.join(differ)} differ",
                    key="--output",
                    hint="Delete it or give another file.",
                    code="other_scores",
                )
            count, end = count + 1, end + len(line)
        file.truncate(end)
    if count < 0:  # not even the first line
        partial.unlink()
        return open_partial(partial, settings)
    return count


def _score(args: Any, source: Any, skip: int, model: Any, tokenizer: Any, autocast: Any, partial: Path) -> int:
    """Append the scores of the documents after the first `skip`; return how many."""
    from torchrecipes.data.batching import MLMCollator
    from torchrecipes.data.progress import Progress
    from torchrecipes.evaluation import document_losses
    from torchrecipes.evaluation.text_perplexity import encode_documents

    progress = Progress("scoring", source.num_bytes)
    waiting: deque[tuple[str, str, int]] = deque()  # of the documents whose losses come next

    def documents() -> Iterator[str]:
        for number, document in enumerate(source):
            if number < skip:
                progress.add(0, 0, skipped_bytes=len(document.text.encode()))
            else:
                waiting.append((document.source, document.text[:EXCERPT], len(document.text.encode())))
                yield document.text

    if model.causal:
        encoded = (tokens.ids for tokens in encode_documents(tokenizer, documents()))
        collator = None
    else:
        encoded = _encode_in_groups(tokenizer, documents())
        collator = MLMCollator(tokenizer, args.masked)
    losses = document_losses(
        model,
        encoded,
        collator=collator,
        tokenizer=tokenizer,
        seed=args.seed,
        window=args.max_length,
        batch_tokens=args.batch_tokens,
        autocast=autocast,
    )
    count = 0
    try:
        with partial.open("a", encoding="utf-8") as file:
            for total, tokens in losses:
                place, excerpt, num_bytes = waiting.popleft()
                line = {
                    "document": skip + count,
                    "loss": total / tokens if tokens else None,
                    "tokens": tokens,
                    "source": place,
                    "excerpt": excerpt,
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                count += 1
                progress.add(1, num_bytes, tokens)
    finally:
        progress.close()
    return count


def _encode_in_groups(tokenizer: Any, texts: Iterator[str], at_once: int = 64) -> Iterator[list[int]]:
    while group := list(islice(texts, at_once)):
        yield from tokenizer.encode_batch(group)


def sort_scores(partial: Path, output: Path) -> dict[str, float]:
    """Write the lines of `partial` by falling loss, with a robust z-score each; return the median and the deviation.

    In memory are a loss and a place in the file for every document. The z-score of a loss is its distance from the
    median over the median absolute deviation, scaled so that it is the usual one for a normal distribution (Iglewicz
    and Hoaglin 1993, "How to Detect and Handle Outliers"). Documents without a scored token come last.
    """
    losses, places = array("d"), array("q")
    with partial.open("rb") as file:
        file.readline()
        place = file.tell()
        for line in file:
            loss = json.loads(line)["loss"]
            losses.append(math.nan if loss is None else loss)
            places.append(place)
            place += len(line)
        known = [loss for loss in losses if not math.isnan(loss)]
        median = statistics.median(known) if known else math.nan
        deviation = statistics.median(abs(loss - median) for loss in known) if known else math.nan
        order = sorted(range(len(losses)), key=lambda i: (math.isnan(losses[i]), -losses[i] if known else 0, i))
        temporary = output.with_name(f".{output.name}.tmp")
        with temporary.open("w", encoding="utf-8") as sorted_file:
            for i in order:
                file.seek(places[i])
                line = json.loads(file.readline())
                loss = line["loss"]
                z = NORMAL * (loss - median) / deviation if loss is not None and deviation else None
                sorted_file.write(json.dumps({**line, "robust_z": z}, ensure_ascii=False) + "\n")
            sorted_file.flush()
            os.fsync(sorted_file.fileno())
    temporary.replace(output)
    partial.unlink()
    return {"median": median, "deviation": deviation}


def _print_outliers(output: Path, show: int, min_tokens: int) -> None:
    with output.open(encoding="utf-8") as file:
        scored = (line for line in map(json.loads, file) if line["loss"] is not None and line["tokens"] >= min_tokens)
        highest = list(islice(scored, show))
        lowest = deque(scored, maxlen=show)
    for name, lines in (("highest", highest), ("lowest", list(lowest)[::-1])):
        if lines:
            print(f"\n{name} losses (documents of {min_tokens} tokens or more)")
            print(f"{'loss':>9} {'robust z':>9} {'tokens':>8}  document")
        for line in lines:
            z = "" if line["robust_z"] is None else f"{line['robust_z']:+.1f}"
            print(f"{line['loss']:>9.3f} {z:>9} {line['tokens']:>8,}  {line['source']}: {line['excerpt']!r}")
