"""Domain names per second and core: read, parsed, encoded, packed, masked; and training on packed and padded rows.

    python benchmarks/domains.py [FILE] [--names 500000] [--rounds 5] [--only parse,encode] [--json FILE]

FILE holds a name per line, such as a list of the most visited domains; it is repeated up to the number of names.
Without it, the names are synthetic ones. A figure is the CPU time of one thread, the best of the rounds. `train` needs
minutes and is measured only when it is named. Needs the extra `domains`.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from torchrecipes.data.domains import (
    ParsedNames,
    PublicSuffixList,
    domain_names,
    domain_tokenizer,
    parse_lines,
    synthetic_names,
)
from torchrecipes.data.tokenizers import Tokenizer

LONGEST = 62  # characters: what padded rows of 64 hold
BLOCK = 2 << 20  # bytes that a thread parses and encodes at a time, as in the preparation of a corpus


class Setup:
    """What the sections share; each part is made when it is first used."""

    def __init__(self, folder: Path, args: argparse.Namespace):
        self.folder, self.args = folder, args

    @cached_property
    def file(self) -> Path:
        """The names, one per line."""
        path, count = self.folder / "names.txt", 0
        with path.open("wb") as file:
            while count < self.args.names:
                for block in self._source().blocks():
                    lines = [line for line in block.data.split(b"\n")[:-1] if len(line) <= LONGEST]
                    lines = lines[: self.args.names - count]
                    count += len(lines)
                    file.write(b"\n".join([*lines, b""]))
        return path

    @cached_property
    def blocks(self) -> list[bytes]:
        """The lines, some MiB at a time."""
        data, blocks, start = self.file.read_bytes(), [], 0
        while start < len(data):
            end = data.rfind(b"\n", start, start + BLOCK) + 1
            blocks.append(data[start:end])
            start = end
        return blocks

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of the lines."""
        return sum(map(len, self.blocks))

    @cached_property
    def suffixes(self) -> PublicSuffixList:
        """The rules of `publicsuffixlist`."""
        return PublicSuffixList()

    @cached_property
    def parsed(self) -> list[ParsedNames]:
        """The names of the blocks."""
        return [parse_lines(block, psl=self.suffixes) for block in self.blocks]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """That of the names."""
        return domain_tokenizer(domain_names(str(self.file)))

    @cached_property
    def corpus(self) -> Any:
        """The names, tokenized on disk."""
        from torchrecipes.data.corpus import prepare_corpus

        return prepare_corpus(self.folder / "corpus", domain_names(str(self.file)), self.tokenizer, 0)[0]

    def measure(self, work: Callable[[], Any]) -> dict[str, float]:
        """The CPU time of one thread, the best of the rounds, by names and bytes."""
        seconds = min(_seconds(work) for _ in range(self.args.rounds))
        names = sum(map(len, self.parsed))
        figures = {
            "seconds": seconds,
            "names_per_second": names / seconds,
            "mb_per_second": self.num_bytes / seconds / 1e6,
        }
        figures["ns_per_name"] = 1e9 / figures["names_per_second"]
        return figures

    def _source(self) -> Any:
        return domain_names(self.args.file) if self.args.file else synthetic_names(self.args.names)


def read(setup: Setup) -> dict[str, Any]:
    """Blocks of lines of a plain and of compressed files."""
    figures = {}
    for kind in ("txt", "txt.gz", "txt.xz", "txt.zst"):
        path = _compressed(setup.file, kind)
        figures[kind] = setup.measure(lambda path=path: [len(block.data) for block in domain_names(str(path)).blocks()])
        _show(kind, figures[kind])
    return figures


def parse(setup: Setup) -> dict[str, Any]:
    """`parse_lines`: names normalized, validated, hashed, and their public suffixes found."""
    figures = setup.measure(lambda: [parse_lines(block, psl=setup.suffixes) for block in setup.blocks])
    _show("parse", figures)
    return figures


def encode(setup: Setup) -> dict[str, Any]:
    """The tokenizer: tokens, suffix ids, and what else a corpus holds of each name."""
    encoding, parsed = setup.tokenizer.domain, setup.parsed
    figures = setup.measure(lambda: [encoding.encode(names) for names in parsed])
    _show("encode", figures)
    return figures


def pack(setup: Setup) -> dict[str, Any]:
    """Rows of 512 tokens by `next_fit`, in random order; and `DomainCollator`: rows, masks and batches of 128 rows."""
    import numpy as np

    from torchrecipes.data.batching import make_rows
    from torchrecipes.data.batching.shuffle import fold_in, permute
    from torchrecipes.data.domains import DomainCollator
    from torchrecipes.training.activation_checkpointing import tune_malloc

    tune_malloc()  # as a run does
    rows, collator = make_rows("next_fit", setup.corpus, 512, setup.tokenizer.pad_id), DomainCollator(setup.tokenizer)
    order = permute(np.arange(rows.num_rows), rows.num_rows, fold_in(0))
    parts = [(order[i : i + 128], fold_in(0, order[i : i + 128])) for i in range(0, len(order), 128)]
    figures = {"rows": setup.measure(lambda: [rows.rows(numbers).lengths[0] for numbers, _ in parts])}
    figures |= setup.measure(lambda: [collator.batch(rows, *part).num_targets for part in parts])
    _show("rows alone", figures["rows"])
    _show("batches", figures)
    return figures | {"fill": rows.tokens_per_row / rows.seq_len}


def train(setup: Setup) -> dict[str, Any]:
    """Real tokens per second: packed rows of 512 and padded rows of 64, in turns, as many names in a step of each."""
    import torch

    from torchrecipes.data.batching import Loader, make_rows
    from torchrecipes.data.domains import DomainCollator
    from torchrecipes.losses import document_class_loss, masked_lm_loss
    from torchrecipes.models import domain_bert

    torch.set_num_threads(1)
    collator, speeds, steps, figures = DomainCollator(setup.tokenizer), {}, {}, {}
    for packing, seq_len in (("next_fit", 512), ("none", 64)):
        rows = make_rows(packing, setup.corpus, seq_len, setup.tokenizer.pad_id)
        model = domain_bert(size=setup.args.size, vocab_size=setup.tokenizer.vocab_size, seed=0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        num_rows = round(setup.args.step_tokens / rows.tokens_per_row)
        loader = Loader(rows, collator, seed=0, global_batch_size=num_rows, micro_batch_size=num_rows)

        def step(loader=loader, model=model, optimizer=optimizer) -> int:
            (batch,) = loader.next_step()
            hidden = model(batch.input_ids, **batch.documents)
            loss = masked_lm_loss(hidden, model.head, batch.masked_positions, batch.masked_labels)
            loss = loss + document_class_loss(hidden, model, batch)[0]
            (loss / batch.num_targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            return int((batch.input_ids != setup.tokenizer.pad_id).sum())

        steps[packing], speeds[packing] = step, []
        figures[packing] = {"seq_len": seq_len, "fill": rows.tokens_per_row / seq_len, "rows_per_step": num_rows}
        step()
    for _ in range(setup.args.rounds):
        for packing, step in steps.items():
            start = time.thread_time()
            tokens = sum(step() for _ in range(2))
            speeds[packing].append(tokens / (time.thread_time() - start))
    for packing, found in speeds.items():
        figures[packing]["tokens_per_second"] = statistics.median(found)
        print(
            f"  {packing:10s} {figures[packing]['fill']:6.1%} full {statistics.median(found):9,.0f} tokens/s",
            flush=True,
        )
    ratios = [packed / padded for packed, padded in zip(*speeds.values(), strict=True)]
    figures["ratio"] = statistics.median(ratios)
    print(f"  packed / padded: {figures['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)
    return figures


SECTIONS: dict[str, Callable[[Setup], dict[str, Any]]] = {
    "read": read,
    "parse": parse,
    "encode": encode,
    "pack": pack,
    "train": train,
}


def _seconds(work: Callable[[], Any]) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start


def _show(name: str, figures: dict[str, float]) -> None:
    print(
        f"  {name:10s} {figures['ns_per_name']:7.1f} ns/name {figures['names_per_second'] / 1e6:7.2f} M names/s "
        f"{figures['mb_per_second']:8.1f} MB/s",
        flush=True,
    )


def _compressed(path: Path, kind: str) -> Path:
    import gzip
    import lzma

    target = path.with_suffix(f".{kind}")
    if kind == "txt.gz":
        target.write_bytes(gzip.compress(path.read_bytes(), 6))
    elif kind == "txt.xz":
        target.write_bytes(lzma.compress(path.read_bytes(), preset=6))
    elif kind == "txt.zst":
        import pyarrow

        with pyarrow.CompressedOutputStream(str(target), "zstd") as file:
            file.write(path.read_bytes())
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", help="a name per line")
    parser.add_argument("--names", type=int, default=500_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", default="tiny", help="of the model of train")
    parser.add_argument("--step-tokens", type=int, default=4096, help="of train, without padding")
    parser.add_argument("--only", help=f"sections, separated by commas: {', '.join(SECTIONS)}")
    parser.add_argument("--json", help="write the figures here")
    args = parser.parse_args()
    figures: dict[str, Any] = {"arguments": vars(args)}
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(Path(folder), args)
        for name in args.only.split(",") if args.only else [name for name in SECTIONS if name != "train"]:
            print(f"{name}: {SECTIONS[name].__doc__}", flush=True)
            figures[name] = SECTIONS[name](setup)
    ways = [figures[name]["ns_per_name"] for name in ("parse", "encode", "pack") if name in figures]
    print(f"together: {1e3 / sum(ways):.2f} M names/s and core" if len(ways) > 1 else "", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
