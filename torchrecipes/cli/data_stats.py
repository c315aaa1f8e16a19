"""`tune-style data stats`: describes a corpus: documents, tokens, their lengths, and how they fill rows."""

import argparse
import json
from pathlib import Path
from typing import Any

from torchrecipes.cli.data_verify import corpus_splits
from torchrecipes.errors import UserError

BAR = 40  # characters of the longest bar
EXCERPT = 80  # characters of a document


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `data stats`."""
    parser.epilog = (
        "example: tune-style data stats runs/first/corpus\n"
        "         tune-style data stats corpus --seq-len 512 1024 2048 --plot lengths.png"
    )
    parser.add_argument("corpus", help="a corpus folder, or its train or validation folder")
    parser.add_argument(
        "--seq-len", nargs="+", type=int, default=[], metavar="N", help="show what rows of N tokens would hold"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw the lengths of the documents into a picture")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> None:
    """Print the figures of every split."""
    if wrong := [number for number in args.seq_len if number < 1]:
        raise UserError(f"{wrong[0]} is out of range", key="--seq-len", hint="Give 1 or more.", code="out_of_range")
    from torchrecipes.data.corpus import open_corpus
    from torchrecipes.data.examples import holds_examples, open_examples

    folders = corpus_splits(args.corpus)
    if holds_examples(folders[0]):
        _show_examples(args, [open_examples(folder) for folder in folders])
        return
    corpora = {str(folder): open_corpus(folder) for folder in folders}
    figures = {name: describe(corpus, args.seq_len) for name, corpus in corpora.items()}
    if args.json:
        print(json.dumps(figures, indent=2, ensure_ascii=False))
    else:
        print("\n\n".join(_report(name, found) for name, found in figures.items()))
    if args.plot:
        output = Path(args.plot)
        output = output if output.suffix else output.with_suffix(".png")  # as matplotlib does it
        draw(figures, output)
        if not args.json:
            print(f"\nsaved {output}")


def _show_examples(args: argparse.Namespace, corpora: list[Any]) -> None:
    for option, value in (("--seq-len", args.seq_len), ("--plot", args.plot)):
        if value:
            problem = f"{args.corpus} is a corpus of examples, which has no rows of documents"
            raise UserError(problem, key=option, hint="Leave it out.", code="unused_option")
    if args.json:
        figures = {
            str(corpus.folder): {key: corpus.account[key] for key in ("kind", "totals", "statistics", "label_names")}
            for corpus in corpora
        }
        print(json.dumps(figures, indent=2, ensure_ascii=False))
    else:
        print("\n\n".join(corpus.summary() for corpus in corpora))


def describe(corpus: Any, seq_lens: list[int]) -> dict[str, Any]:
    """Return the figures of a corpus as JSON values; lengths are in tokens, special ones included."""
    from torchrecipes.data.corpus.lengths import document_lengths

    numbers, lengths = corpus.statistics, document_lengths(corpus)
    quantiles = {f"p{share}": lengths.quantile(share / 100) for share in (1, 10, 50, 90, 99)}
    known = numbers.characters > 0  # a corpus of another tool does not say
    return {
        "documents": numbers.documents,
        "tokens": numbers.tokens,
        "characters": numbers.characters,
        "bytes": numbers.bytes,
        "tokens_per_character": numbers.tokens / numbers.characters if known else None,
        "tokens_per_byte": numbers.tokens / numbers.bytes if known else None,
        "unknown_share": numbers.unknown / numbers.tokens,
        "empty_documents": numbers.empty,
        "shards": len(corpus.shards),
        "fingerprint": corpus.fingerprint,
        "tokenizer": corpus.tokenizer_fingerprint,
        "additions": corpus.additions,
        "lengths": {
            "mean": numbers.tokens / numbers.documents,
            "shortest": numbers.shortest,
            **quantiles,
            "longest": numbers.longest,
            "histogram": [
                {"from": low, "to": high, "documents": documents, "tokens": tokens}
                for low, high, documents, tokens in lengths.histogram()
            ],
        },
        "examples": {name: _example(corpus, getattr(lengths, name)) for name in ("shortest", "longest")},
        "rows": [_rows(corpus, lengths, kind, seq_len) for seq_len in seq_lens for kind in PACKINGS],
    }


def _rows(corpus: Any, lengths: Any, packing: str, seq_len: int) -> dict[str, Any]:
    rows, cut = PACKINGS[packing](corpus, lengths, seq_len)
    return {
        "seq_len": seq_len,
        "packing": packing,
        "rows": rows,
        "fill": corpus.num_tokens / (rows * seq_len),
        "cut_share": cut / corpus.num_documents,
    }


def _concat(corpus: Any, _lengths: Any, seq_len: int) -> tuple[int, int]:
    from torchrecipes.data.corpus.lengths import cut_by_concatenation

    return -(-corpus.num_tokens // seq_len), cut_by_concatenation(corpus, seq_len)


def _none(_corpus: Any, lengths: Any, seq_len: int) -> tuple[int, int]:
    rows = (-(-lengths.values // seq_len) * lengths.counts).sum()
    return int(rows), int(lengths.counts[lengths.values > seq_len].sum())


def _best_fit(corpus: Any, lengths: Any, seq_len: int) -> tuple[int, int]:
    from torchrecipes.data.batching.best_fit import plan_rows

    rows = sum(plan_rows(shard.document_offsets, seq_len).num_rows for shard in corpus.shards)
    return rows, int(lengths.counts[lengths.values > seq_len].sum())


def _next_fit(corpus: Any, lengths: Any, seq_len: int) -> tuple[int, int]:
    from torchrecipes.data.batching.next_fit import plan_corpus

    rows = int(plan_corpus(corpus, seq_len)[1][-1])
    return rows, int(lengths.counts[lengths.values > seq_len].sum())


# Of each packing, the rows of the corpus and the documents that do not lie in one row.
PACKINGS = {"concat": _concat, "best_fit": _best_fit, "next_fit": _next_fit, "none": _none}


def _example(corpus: Any, number: int) -> dict[str, Any]:
    """A document by its number, with the beginning of its text where the corpus' tokenizer lies beside it."""
    (start,), (stop,) = corpus.spans([number])
    example = {"document": number, "tokens": int(stop - start)}
    file = corpus.folder.parent / "tokenizer" / "tokenizer.json"
    if file.is_file():
        from tokenizers import Tokenizer

        ids = corpus.read(int(start), int(min(stop, start + EXCERPT))).tolist()
        example["text"] = Tokenizer.from_file(str(file)).decode(ids)[:EXCERPT]
    return example


def _report(name: str, found: dict[str, Any]) -> str:
    lengths = found["lengths"]
    lines = [
        f"{name}: {found['documents']:,} documents, {found['tokens']:,} tokens in {found['shards']:,} shards",
        f"{'unknown tokens':<22} {found['unknown_share']:.3%}",
    ]
    if found["tokens_per_byte"] is not None:
        lines.insert(1, f"{'tokens per character':<22} {found['tokens_per_character']:.3f}")
        lines.insert(2, f"{'tokens per byte':<22} {found['tokens_per_byte']:.3f}")
    if found["empty_documents"]:
        lines.append(f"{'empty documents':<22} {found['empty_documents']:,}, left out")
    lines += [
        f"added {addition['time']}: {addition['documents']:,} documents, {addition['tokens']:,} tokens of "
        f"{addition['name']}"
        for addition in found["additions"]
    ]
    quantiles = ", ".join(f"{key} {lengths[key]:,}" for key in ("p1", "p10", "p50", "p90", "p99"))
    lines += ["", f"tokens of a document: mean {lengths['mean']:,.1f}, {quantiles}"]
    for key, example in found["examples"].items():
        text = f": {example['text']!r}" if "text" in example else ""
        lines.append(f"  {key}: {example['tokens']:,} tokens, document {example['document']:,}{text}")
    most = max(row["documents"] for row in lengths["histogram"])
    lines += ["", f"{'tokens':>21}  {'documents':>12}  share of tokens"]
    for row in lengths["histogram"]:
        share, bar = row["tokens"] / found["tokens"], "#" * -(-BAR * row["documents"] // most)
        lines.append(f"{row['from']:>9,} - {row['to']:>9,}  {row['documents']:>12,}  {share:>6.1%}  {bar}".rstrip())
    if found["rows"]:
        lines += ["", f"{'seq_len':>9}  {'packing':<9} {'rows':>12} {'fill':>8}  documents cut"]
        lines += [
            f"{row['seq_len']:>9,}  {row['packing']:<9} {row['rows']:>12,} {row['fill']:>8.2%}  {row['cut_share']:.2%}"
            for row in found["rows"]
        ]
    return "\n".join(lines)


def draw(figures: dict[str, dict[str, Any]], output: Path) -> None:
    """Write a picture: documents and tokens by the length of the document, a line for every corpus.

    Raises:
        UserError: matplotlib is missing (code `missing_package`), or the picture cannot be written (`not_writable`).
    """
    try:
        import matplotlib
    except ImportError:
        hint = "Install it: pip install 'torchrecipes[plot]'"
        raise UserError("--plot needs matplotlib", key="--plot", hint=hint, code="missing_package") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharex=True)
    for panel, key in zip(panels, ("documents", "tokens"), strict=True):
        for name, found in figures.items():
            rows = found["lengths"]["histogram"]
            edges = [row["from"] for row in rows] + [rows[-1]["to"] + 1]
            panel.stairs([row[key] / found[key] for row in rows], edges, label=name)
        panel.set_title(f"share of {key}", loc="left", fontsize=10)
        panel.set_xscale("log", base=2)
        panel.set_xlabel("tokens of the document")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=8)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=120)
    except (OSError, ValueError) as error:
        problem = f"cannot write {output}: {error}"
        raise UserError(problem, key="--plot", hint="Give another file: lengths.png", code="not_writable") from None
    finally:
        pyplot.close(figure)
