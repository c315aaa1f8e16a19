"""`tune-style data split-report`: how the domain names of a corpus are divided into training and validation."""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

from torchrecipes.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `data split-report`."""
    parser.epilog = (
        "example: tune-style data split-report runs/names/corpus\n"
        "         tune-style data split-report corpus --csv suffixes.csv\n\n"
        "It reads every name and compares the split with the rule: a share of the names by a hash of the name, and\n"
        "one name at least of every public suffix with 100 or more. Exit code 2: the split is another one."
    )
    parser.add_argument("corpus", help="a corpus of domain names: a run's corpus_dir, or what data tokenize wrote")
    parser.add_argument("--top", type=int, default=20, metavar="N", help="suffixes that are shown (default: 20)")
    parser.add_argument("--csv", metavar="FILE", help="write a row for every suffix to a CSV file")
    parser.add_argument("--json", action="store_true", help="print JSON, with all suffixes")
    parser.add_argument("--threads", type=int, metavar="N", help="threads that read (default: one per core)")


def main(args: argparse.Namespace) -> None:
    """Print the report.

    Raises:
        UserError: the split is not what the rule gives (code `other_split`), or a name is on both sides (`in_both`).
    """
    from torchrecipes.data.domains.split_report import report_split

    report = report_split(args.corpus, args.threads)
    if args.csv:
        _write(Path(args.csv), report.rows())
    print(json.dumps(_figures(report), indent=2) if args.json else _text(report, args.top, args.csv))
    if args.csv and not args.json:
        print(f"\nsaved {args.csv}")
    if report.problems:
        raise UserError(
            f"the split of {args.corpus} is not what it should be:\n  " + "\n  ".join(report.problems),
            hint="Build the corpus again.",
            code="in_both" if report.num_in_both else "other_split",
        )


def _figures(report: Any) -> dict[str, Any]:
    rows = report.rows()
    without = [row for row in rows if not row["validation"]]
    return {
        "train": int(report.train.sum()),
        "validation": int(report.validation.sum()),
        "in_both": report.num_in_both,
        "fraction": report.fraction,
        "problems": report.problems,
        "suffixes_without_validation": len(without),
        "names_of_suffixes_without_validation": sum(row["train"] for row in without),
        "suffixes": rows,
    }


def _text(report: Any, top: int, csv_file: str | None) -> str:
    figures = _figures(report)
    train, held_out = figures["train"], figures["validation"]
    lines = [
        f"{train:,} names in train, {held_out:,} in validation ({held_out / (train + held_out):.3%}), "
        f"{len(report.suffixes):,} public suffixes",
        f"names on both sides: {report.num_in_both:,}",
        f"suffixes without a validation name: {figures['suffixes_without_validation']:,}, with "
        f"{figures['names_of_suffixes_without_validation']:,} names",
    ]
    if report.fraction is not None:
        says = "the split is not what the rule gives" if report.problems else "the split is what the rule gives"
        lines.append(f"rule: {report.fraction:.3%} by hash, and one name at least of a suffix with 100: {says}")
    shown = figures["suffixes"][:top]
    width = max([len("suffix"), *(len(row["suffix"]) for row in shown)])
    lines += ["", f"{'suffix':<{width}}  {'train':>13}  {'validation':>10}  {'share':>8}"]
    for row in shown:
        lines.append(f"{row['suffix']:<{width}}  {row['train']:>13,}  {row['validation']:>10,}  {row['share']:>8.3%}")
    if len(report.suffixes) > len(shown):
        lines.append(f"and {len(report.suffixes) - len(shown):,} more: {csv_file or '--csv FILE'}")
    return "\n".join(lines)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        problem = f"cannot write {path}: {error.strerror or error}"
        raise UserError(problem, key="--csv", hint="Give another file.", code="not_writable") from None
