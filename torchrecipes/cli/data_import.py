"""`tune-style data import`: turns Markdown, reStructuredText, HTML and source code into documents, with a manifest."""

import argparse
from pathlib import Path

from torchrecipes.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `data import`."""
    parser.epilog = (
        "example: tune-style data import --output corpora/docs --source guides=~/cheatsheets code=~/project "
        "--target code=2M --license guides=CC-BY-SA-4.0 --exclude tests/"
    )
    parser.add_argument(
        "--output", "-o", required=True, metavar="DIR", help="folder for the documents and the manifest"
    )
    parser.add_argument(
        "--source",
        nargs="+",
        action="extend",
        required=True,
        metavar="[NAME=]PATH",
        help="files and folders; a name may have several, and is that of the file or folder if there is none",
    )
    parser.add_argument("--target-tokens", metavar="N", help="stop with the document that reaches N tokens, as in 10M")
    parser.add_argument(
        "--target", nargs="+", action="extend", default=[], metavar="NAME=N", help="the same for one source"
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="counts the tokens (default: characters / 4)")
    parser.add_argument(
        "--license",
        nargs="+",
        action="extend",
        default=[],
        metavar="[NAME=]SPDX",
        help="the licence of a source, or of all, in place of what its files say",
    )
    parser.add_argument(
        "--exclude", nargs="+", action="extend", default=[], metavar="PATTERN", help="skip files, as in .gitignore"
    )
    parser.add_argument("--exclude-from", metavar="FILE", help="a file of such patterns, as a .gitignore")
    parser.add_argument(
        "--include", nargs="+", action="extend", default=[], metavar="PATTERN", help="take these files only"
    )
    parser.add_argument(
        "--shuffle", action="store_true", help="take files by a hash of their names, not in their order"
    )
    parser.add_argument("--text-column", default="text", metavar="KEY", help="of JSON lines and tables (default text)")
    parser.add_argument(
        "--text-format",
        default="text",
        metavar="FORMAT",
        help="what the texts of JSON lines and tables are: text (default), markdown, rst, html",
    )
    parser.add_argument("--max-file-mb", type=float, default=16.0, metavar="MB", help="skip larger files (default 16)")
    parser.add_argument(
        "--time-limit", type=float, default=60.0, metavar="S", help="seconds for one file (default 60; 0: no limit)"
    )
    parser.add_argument("--shard-mb", type=float, default=64.0, metavar="MB", help="text per shard (default 64)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that convert (default: one per core)")


def main(args: argparse.Namespace) -> None:
    """Import the sources and print what was taken and skipped.

    Raises:
        UserError: an option is not valid; what `import_documents` raises.
    """
    from torchrecipes.data.converting import import_documents, summary

    sources: dict[str, list[str]] = {}
    for word in args.source:
        name, path = _named(word)
        sources.setdefault(name or Path(path).expanduser().absolute().stem, []).append(path)
    targets = {}
    for word in args.target:
        name, number = _named(word)
        if not name:
            raise UserError(f"{word} names no source", key="--target", hint="Write NAME=N.", code="invalid_value")
        targets[name] = _tokens(number, "--target")
    licenses = {name or "*": license for name, license in map(_named, args.license)}
    exclude = list(args.exclude)
    if args.exclude_from:
        try:
            exclude = Path(args.exclude_from).read_text("utf-8").splitlines() + exclude
        except (OSError, UnicodeDecodeError) as error:
            problem = f"{args.exclude_from} cannot be read ({error})"
            raise UserError(problem, key="--exclude-from", code="unreadable_file") from None
    for option in ("max_file_mb", "shard_mb"):
        if getattr(args, option) <= 0:
            key = f"--{option.replace('_', '-')}"
            raise UserError(f"{getattr(args, option)} is not above 0", key=key, code="invalid_value")
    for option in ("time_limit", "workers"):
        if (getattr(args, option) or 0) < 0:
            key = f"--{option.replace('_', '-')}"
            raise UserError(f"{getattr(args, option)} is negative", key=key, code="invalid_value")
    manifest = import_documents(
        args.output,
        sources,
        target_tokens=_tokens(args.target_tokens, "--target-tokens") if args.target_tokens else None,
        targets=targets,
        tokenizer=args.tokenizer,
        licenses=licenses,
        exclude=exclude,
        include=args.include,
        shuffle=args.shuffle,
        text_column=args.text_column,
        text_format=args.text_format,
        max_file_mb=args.max_file_mb,
        time_limit=args.time_limit,
        shard_mb=args.shard_mb,
        workers=args.workers,
    )
    print(summary(manifest))
    size = sum(shard["size"] for shard in manifest["shards"])
    where = f"{len(manifest['shards'])} shards of {size / 1e6:,.1f} MB in {args.output}"
    print(f"{manifest['documents']:,} documents, {manifest['tokens']:,} tokens: {where}")
    print(f"read it with: data.source._component_=torchrecipes.data.sources.files data.source.path={args.output}")


def _named(word: str) -> tuple[str, str]:
    # The name is a plain word, so that a path may have an equals sign in it.
    name, equals, value = word.partition("=")
    if equals and name.replace("-", "_").isidentifier():
        return name, value
    return "", word


def _tokens(text: str, option: str) -> int:
    from torchrecipes.config.scalars import read_number

    number = read_number(text)
    if not isinstance(number, int | float) or number < 1 or number != int(number):
        hint = "Write a whole number, as 2M or 500000."
        raise UserError(f"'{text}' is no number of tokens", key=option, hint=hint, code="invalid_value")
    return int(number)
