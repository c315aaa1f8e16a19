"""`tune-style perplexity`: measures the perplexity of a trained causal model on text."""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from itertools import islice

from torchrecipes.cli.openmp import wait_without_spinning
from torchrecipes.cli.trained_model import add_model_arguments, load_causal
from torchrecipes.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `perplexity`."""
    parser.epilog = (
        "example: tune-style perplexity runs/gpt2 --data held_out.jsonl\n"
        "         tune-style perplexity runs/gpt2 --data 'books/*.txt' --stride 256"
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, folders, patterns: text, .jsonl, .csv, .parquet",
    )
    parser.add_argument("--text-column", default="text", metavar="KEY", help="of JSON lines and tables (default text)")
    parser.add_argument(
        "--sample-by",
        default="document",
        metavar="WHAT",
        help="a document of plain text: document (a file), paragraph, line",
    )
    parser.add_argument(
        "--on-bad-record", default="stop", metavar="WHAT", help="stop, or skip: skip and count (default stop)"
    )
    parser.add_argument(
        "--max-length", type=int, metavar="N", help="tokens per window (default: the model's positions)"
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="tokens between the starts of two windows (default: half of --max-length)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="windows per forward pass (default: as many as hold about 16,384 tokens)",
    )
    parser.add_argument(
        "--by-position", action="store_true", help="also the loss for ranges of positions in the window"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="documents to read (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> None:
    """Print the figures."""
    try:
        _main(args)
    except UserError as error:
        if error.key is None or error.key.startswith("-"):
            raise
        option = "--data" if error.key == "path" else f"--{error.key.replace('_', '-')}"  # from the source's argument
        raise UserError(error.problem, key=option, hint=error.hint, code=error.code) from None


def _main(args: argparse.Namespace) -> None:
    for option in ("--max-length", "--stride", "--batch-size", "--limit"):
        value = getattr(args, option[2:].replace("-", "_"))
        if value is not None and value < 1:
            raise UserError(f"{value} is out of range", key=option, hint="Give 1 or more.", code="out_of_range")
    wait_without_spinning()

    from torchrecipes.data.progress import Progress
    from torchrecipes.data.sources import files, require_documents

    source = files(args.data, text_column=args.text_column, sample_by=args.sample_by, on_bad_record=args.on_bad_record)
    folder, model, tokenizer, autocast = load_causal(args, "perplexity")

    from torchrecipes.evaluation.position_loss import position_edges
    from torchrecipes.evaluation.text_perplexity import Tokens, encode_documents, perplexity

    window = _window(args, model.config.max_position_embeddings)
    texts = (document.text for document in islice(source, args.limit))
    unknown = 0

    def documents() -> Iterator[Tokens]:
        nonlocal unknown
        for document in encode_documents(tokenizer, texts):
            unknown += document.ids.count(tokenizer.unknown_id)
            yield document

    progress = Progress("perplexity", None if args.limit else source.num_bytes)
    begin = time.perf_counter()
    try:
        result = perplexity(
            model,
            documents(),
            window=window,
            stride=args.stride,
            rows=args.batch_size,
            autocast=autocast,
            on_progress=progress.add,
            position_edges=position_edges(window) if args.by_position else (),
        )
    finally:
        progress.close()
    seconds = time.perf_counter() - begin
    if not result.documents:
        require_documents(source, source.report)
    for line in source.report.lines()[1:]:
        print(line, file=sys.stderr)
    settings = {"model": str(folder), "window": window, "stride": args.stride or max(1, window // 2)}
    if args.json:
        print(
            json.dumps(
                settings | result.as_dict() | {"unknown_tokens": unknown, "seconds": round(seconds, 3)}, indent=2
            )
        )
        return
    print(f"{folder} on {source.name}: windows of {window:,} tokens, stride {settings['stride']:,}\n")
    for name, value, said in (
        ("documents", f"{result.documents:,}", f"{result.bytes:,} bytes of text"),
        ("tokens", f"{result.tokens:,}", f"scored; {result.bytes_per_token:.2f} bytes per token"),
        ("loss", f"{result.nll_per_token:.4f}", "nats per token"),
        ("perplexity", f"{result.perplexity:,.3f}", "per token"),
        ("bits per byte", f"{result.bits_per_byte:.4f}", "comparable between tokenizers"),
        ("speed", f"{result.tokens / seconds:,.0f}", f"tokens per second, {seconds:.1f} s total"),
    ):
        print(f"{name:<14} {value:>14}  {said}")
    for name, loss in result.by_position.items():
        print(f"{name:<14} {loss:>14.4f}  nats per token at these positions")
    if unknown:
        print(f"{'unknown':<14} {unknown:>14,}  tokens for text that the tokenizer cannot encode: the figures flatter")


def _window(args: argparse.Namespace, positions: int) -> int:
    window = args.max_length or positions
    if window > positions:
        raise UserError(
            f"{window:,} tokens are more than the model's {positions:,} positions",
            key="--max-length",
            hint=f"Give --max-length {positions} or less.",
            code="out_of_range",
        )
    if args.stride and args.stride > window:
        raise UserError(
            f"{args.stride:,} tokens are more than a window of {window:,}: text between windows would be skipped",
            key="--stride",
            hint=f"Give --stride {window} or less.",
            code="out_of_range",
        )
    return window
