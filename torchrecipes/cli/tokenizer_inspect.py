"""`tune-style tokenizer inspect`: describes a tokenizer, and measures it on text."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from torchrecipes.cli.data_source import add_source_arguments, source_from
from torchrecipes.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `tokenizer inspect`."""
    parser.epilog = (
        "example: tune-style tokenizer inspect runs/first\n"
        "         tune-style tokenizer inspect gpt2 --data texts --limit 1000"
    )
    parser.add_argument("tokenizer", help="a tokenizer's folder or file, a model's folder, or a run's")
    parser.add_argument("--limit", type=int, metavar="N", help="documents of the text to read (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_source_arguments(parser, required=False)


def main(args: argparse.Namespace) -> None:
    """Print the description."""
    if args.limit is not None and args.limit < 1:
        raise UserError(f"{args.limit} is out of range", key="--limit", hint="Give 1 or more.", code="out_of_range")
    source = source_from(args)

    from torchrecipes.data.sources import require_documents
    from torchrecipes.data.tokenizers.inspect import describe_tokenizer, measure_tokenizer

    tokenizer = open_tokenizer(args.tokenizer)
    found = describe_tokenizer(tokenizer)
    measured = None
    if source is not None:
        measured = measure_tokenizer(tokenizer, _with_progress(source, args.limit), args.limit)
        if not measured["documents"]:
            require_documents(source, source.report)
    if args.json:
        print(json.dumps({**found, "text": measured}, indent=2, ensure_ascii=False))
        return
    _print_description(args.tokenizer, found)
    if measured is not None:
        _print_measures(source.name, measured)


def open_tokenizer(path: str) -> Any:
    """Return the tokenizer as it is in its files, whatever it is for; a run stands for its newest valid checkpoint.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    from torchrecipes.data.tokenizers import load_tokenizer

    folder = Path(path)
    if (folder / "checkpoints").is_dir() and not (folder / "tokenizer.json").exists():
        from torchrecipes.model_folder import resolve_model_folder

        folder = resolve_model_folder(folder, warn=True)
    try:
        return load_tokenizer(folder, pad_vocab_to_multiple_of=1, required=())
    except UserError as error:  # its key is an argument of the function
        raise UserError(error.problem, hint=error.hint, code=error.code) from None


def _with_progress(source: Any, limit: int | None) -> Any:
    from torchrecipes.data.progress import Progress

    progress = Progress("measuring", None if limit else source.num_bytes)
    try:
        for document in source:
            progress.add(1, len(document.text.encode()))
            yield document
    finally:
        progress.close()


def _print_description(name: str, found: dict[str, Any]) -> None:
    lines = [f"{name}: {found['kind']}, {found['vocab_size']:,} ids"]
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        lines.append(f"  {part.replace('_', '-'):<15} {found[part] or 'none'}")
    holes = found["holes"]
    shown = f"{len(holes):,}: {', '.join(map(str, holes[:10]))}{', ...' * (len(holes) > 10)}" if holes else "none"
    lines += [
        f"  {'holes':<15} {shown}",
        f"  {'added tokens':<15} {found['added_tokens']:,}",
        f"  {'chat template':<15} {'yes' if found['chat_template'] else 'no'}",
        f"  {'fingerprint':<15} {found['fingerprint']}",
        "",
        f"{'id':>9}  special token",
    ]
    for token in found["special_tokens"]:
        roles = f"  {', '.join(token['roles'])}" if token["roles"] else ""
        lines.append(f"{token['id']:>9,}  {token['name']}{roles}")
    lines += ["", f"{'id':>9}  longest tokens"]
    lines += [f"{token['id']:>9,}  {token['text']!r}" for token in found["longest"]]
    lines.append("")
    for sample in found["not_restored"]:
        lines.append(f"not restored: {sample['text']!r} becomes {sample['decoded']!r}")
    if not found["not_restored"]:
        lines.append("all sample texts are restored by decoding")
    print("\n".join(lines))


def _print_measures(name: str, found: dict[str, Any]) -> None:
    lines = [f"\n{name}: {found['documents']:,} documents, {found['words']:,} words, {found['bytes']:,} bytes of text"]
    for key, value, said in (
        ("tokens", f"{found['tokens']:,}", ""),
        ("tokens per word", f"{found['tokens_per_word']:.3f}", "fertility; a word is what white space separates"),
        ("tokens per byte", f"{found['tokens_per_byte']:.3f}", f"{found['bytes_per_token']:.2f} bytes per token"),
        ("unknown", f"{found['unknown_share']:.3%}", "of the tokens"),
        ("vocabulary used", f"{found['vocabulary_used']:.1%}", ""),
        ("restored", f"{found['restored_share']:.1%}", "of the documents are equal after decoding"),
    ):
        lines.append(f"  {key:<16} {value:>12}  {said}".rstrip())
    if found["unknown_characters"]:
        lines.append(f"  unknown characters: {' '.join(found['unknown_characters'])}")
    if found["split_words"]:
        lines += ["", f"{'count':>9}  words that take most tokens"]
        lines += [f"{row['count']:>9,}  {row['word']}: {' '.join(row['tokens'])}" for row in found["split_words"]]
    sys.stdout.write("\n".join(lines) + "\n")
