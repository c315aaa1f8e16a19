"""`tune-style data clean`: normalizes, filters and removes duplicates of text."""

import argparse
import json
from typing import Any

from torchrecipes.cli.data_source import add_source_arguments, source_from
from torchrecipes.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `data clean`."""
    parser.epilog = (
        "steps, in this order: normalize, c4, boilerplate_lines, gopher_quality, gopher_repetition, language,\n"
        "exact_duplicates, near_duplicates\n\n"
        "example: tune-style data clean --data raw/ --output clean/\n"
        "         tune-style data clean --data raw/ --output clean/ --steps normalize c4 near_duplicates \\\n"
        "             gopher_quality.min_words=20 --exempt '*.py' --eval-sets held_out.jsonl"
    )
    add_output_arguments(parser)
    parser.add_argument(
        "--steps",
        nargs="+",
        metavar="STEP",
        help="names, options as STEP.OPTION=VALUE, .yaml files (default: normalize exact_duplicates near_duplicates)",
    )
    parser.add_argument(
        "--exempt",
        nargs="+",
        metavar="PATTERN",
        help="sources, such as '*.py', that are only normalized and compared for duplicates",
    )
    parser.add_argument("--against", nargs="+", default=[], metavar="PATH", help="remove what duplicates these, too")
    parser.add_argument("--eval-sets", nargs="+", default=[], metavar="PATH", help="the same for evaluation sets")
    add_job_arguments(parser, "lines, filter, merge or remove: what this one of several jobs does")
    add_source_arguments(parser)


def main(args: argparse.Namespace) -> None:
    """Clean, and print what was removed."""
    from torchrecipes.data.cleaning import clean
    from torchrecipes.data.cleaning.steps import DEFAULT_STEPS, read_steps

    words = list(args.steps or DEFAULT_STEPS)
    if args.exempt:
        words.append(f"exempt={json.dumps(args.exempt)}")
    report = clean(
        source_from(args),
        args.output,
        read_steps(words),
        against=references(args, args.against, "--against"),
        eval_sets=references(args, args.eval_sets, "--eval-sets"),
        shard_index=args.shard_index,
        num_shards=args.num_shards,
        stage=args.stage,
        workers=args.workers,
    )
    if report is not None:
        print_report(report, args.output)


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the folder that `clean` and `decontaminate` write to."""
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="for the documents and the report")


def add_job_arguments(parser: argparse.ArgumentParser, stages: str) -> None:
    """Declare how the work is shared between jobs and processes."""
    group = parser.add_argument_group("several jobs")
    group.add_argument("--shard-index", type=int, default=0, metavar="I", help="number of this job, from 0")
    group.add_argument("--num-shards", type=int, default=1, metavar="N", help="number of jobs")
    group.add_argument("--stage", metavar="STAGE", help=stages)
    group.add_argument("--workers", type=int, metavar="N", help="processes of this job (default: one per core, or 0)")


def references(args: argparse.Namespace, paths: list[str], option: str) -> list[Any]:
    """Return a source for every path, read like the text that is cleaned.

    Raises:
        UserError: no such file.
    """
    from torchrecipes.data.sources import files

    names = ("text_column", "sample_by", "on_bad_record")
    options = {name: value for name in names if (value := getattr(args, name)) is not None}
    try:
        return [files(path, **options) for path in paths]
    except UserError as error:
        raise UserError(error.problem, key=option, hint=error.hint, code=error.code) from None


def print_report(report: dict[str, Any], output: str) -> None:
    """Print the counts of a report, and where everything is."""
    from torchrecipes.data.cleaning.report import summary_lines

    print("\n".join(summary_lines(report)))
    print(f"\ndocuments: {output}/documents\nreport: {output}/report.html, .md, .json")
