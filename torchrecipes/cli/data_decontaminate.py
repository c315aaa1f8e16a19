"""`tune-style data decontaminate`: removes from text what occurs in evaluation sets."""

import argparse

from torchrecipes.cli.data_clean import add_job_arguments, add_output_arguments, print_report, references
from torchrecipes.cli.data_source import add_source_arguments, source_from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `data decontaminate`."""
    parser.epilog = (
        "example: tune-style data decontaminate --data clean/documents --eval-sets test.jsonl -o train\n"
        "         tune-style data decontaminate --data clean/documents --eval-sets test.jsonl -o found --action report"
    )
    add_output_arguments(parser)
    parser.add_argument("--eval-sets", nargs="+", required=True, metavar="PATH", help="evaluation sets, one per path")
    parser.add_argument("-n", type=int, default=13, metavar="N", help="words of an n-gram (default 13)")
    parser.add_argument(
        "--action",
        default="cut",
        metavar="WHAT",
        help="cut (the default): the n-grams and 200 characters around; remove: the document; report: count only",
    )
    parser.add_argument(
        "--max-share",
        type=float,
        default=0.0,
        metavar="F",
        help="act where more than this share of a document's n-grams is in an evaluation set (default 0)",
    )
    parser.add_argument(
        "--max-documents",
        type=int,
        default=10,
        metavar="N",
        help="ignore n-grams that more than N training documents have (default 10)",
    )
    add_job_arguments(parser, "count, filter or merge: what this one of several jobs does")
    add_source_arguments(parser)


def main(args: argparse.Namespace) -> None:
    """Decontaminate, and print what was found."""
    from torchrecipes.data.cleaning import decontaminate

    report = decontaminate(
        source_from(args),
        args.output,
        references(args, args.eval_sets, "--eval-sets"),
        n=args.n,
        action=args.action,
        max_share=args.max_share,
        max_documents=args.max_documents,
        shard_index=args.shard_index,
        num_shards=args.num_shards,
        stage=args.stage,
        workers=args.workers,
    )
    if report is not None:
        print(f"{report['overlapping_documents']:,} documents overlap with an evaluation set")
        for one in report["references"]:
            print(f"{one['name']}: {one['with an n-gram in training']:,} of {one['documents']:,} documents are touched")
        print_report(report, args.output)
