"""The data layer beside its peers, in turns: packing, batches, resuming, tokenizing, memory.

    python benchmarks/data.py --json data.json
    python benchmarks/data.py --only packing,loader
    python benchmarks/data.py --streaming-python ../streaming/bin/python

Peers are `datasets` (a table on disk, and streaming from Parquet) and `mosaicml-streaming`, with the collator of
`transformers`. The latter needs versions of its own: `pip install mosaicml-streaming` in another environment, and name
its Python. All rows of the peers were cut beforehand and hold no document boundaries. A ratio above 1 says that this
library is better. Needs the extra `dev`.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

VOCAB = 16_384
STREAMING = "mosaicml-streaming"


class Setup:
    """What the cases share; each part is made when it is first used."""

    def __init__(self, folder: Path, args: argparse.Namespace):
        self.folder, self.args = folder, args

    @cached_property
    def text(self) -> Path:
        """JSON lines with the source files of Python's standard library, tests included: real text on every machine."""
        path, left = self.folder / "text.jsonl", self.args.megabytes * 1e6
        with path.open("w", encoding="utf-8") as file:
            for source in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
                text = source.read_text("utf-8", errors="ignore")
                if left > 0 and text.strip() and "site-packages" not in source.parts:
                    file.write(json.dumps({"text": text}) + "\n")
                    left -= len(text.encode())
        return path

    @cached_property
    def tokenizer(self) -> Any:
        """A WordPiece of 16,384 entries, which `transformers` reads from `self.folder / "tokenizer"`, too."""
        from torchrecipes.data.sources import files
        from torchrecipes.data.tokenizers.load import train_wordpiece

        tokenizer = train_wordpiece(files(str(self.text), max_documents=500), vocab_size=VOCAB)
        tokenizer.save(self.folder / "tokenizer")
        return tokenizer

    @cached_property
    def corpus(self) -> Any:
        """Random tokens in documents of about 400."""
        from gpu_corpus import write_corpus

        return write_corpus(self.folder / "corpus", self.tokenizer, "web", self.args.tokens, causal=False)

    @cached_property
    def cut(self) -> np.ndarray:
        """The rows of the peers, `[R, S]` uint16."""
        count = self.corpus.num_tokens // self.args.seq_len
        return self.corpus.read(0, count * self.args.seq_len).reshape(count, self.args.seq_len)

    @cached_property
    def parquet(self) -> list[str]:
        """The rows as Parquet files for `datasets`."""
        import datasets

        paths = [str(self.folder / f"rows-{number}.parquet") for number in range(8)]
        for path, rows in zip(paths, np.array_split(self.cut.astype(np.int32), len(paths)), strict=True):
            datasets.Dataset.from_dict({"input_ids": rows}).to_parquet(path, batch_size=1000)
        return paths

    def collator(self) -> Callable[[list[Any]], Any]:
        """`DataCollatorForLanguageModeling` on tensors, which it stacks without padding them one by one."""
        return _collator(self.folder / "tokenizer")

    @cached_property
    def streaming(self) -> dict[str, Any] | None:
        """Figures of mosaicml-streaming for loader and resuming, measured by its own Python; None: not installed."""
        python = self.args.streaming_python or sys.executable
        if subprocess.run([python, "-c", "import streaming"], capture_output=True).returncode:
            print(f"  {STREAMING} is left out: python -m venv E; E/bin/pip install {STREAMING} transformers; then")
            print("  --streaming-python E/bin/python")
            return None
        np.save(self.folder / "rows.npy", self.cut)
        sizes = {"rows": self.args.rows, "batches": self.args.batches // 10, "rounds": self.args.rounds}
        command = [python, __file__, "--measure-streaming", str(self.folder), json.dumps(sizes)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"  {STREAMING} failed: {done.stderr[-500:]}")
            return None
        return json.loads(done.stdout.splitlines()[-1])


def packing(setup: Setup) -> dict[str, Any]:
    """Documents per second and fill of `best_fit`, on lengths as of web text, of lines and of code."""
    from gpu_corpus import document_lengths

    from torchrecipes.data.batching.best_fit import plan_rows

    figures = {}
    for kind, seq_len in itertools.product(("web", "lines"), (512, 2048, 8192)):
        lengths = document_lengths(kind, 2**26 if setup.args.tokens > 10**6 else 2**18)  # of one shard
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        seconds, plan = _timed(lambda offsets=offsets, seq_len=seq_len: plan_rows(offsets, seq_len), setup.args.rounds)
        figures[f"{kind} {seq_len}"] = found = {
            "documents_per_second": len(lengths) / seconds,
            "fill": lengths.sum() / (plan.num_rows * seq_len),
            "bytes_per_document": sum(array.nbytes for array in plan) / len(lengths),
        }
        print(
            f"  {kind:5s} in rows of {seq_len:5d}: {found['documents_per_second'] / 1e6:6.2f} M documents/s, "
            f"{found['fill']:.2%} full, {found['bytes_per_document']:.1f} bytes per document"
        )
    return figures


def loader(setup: Setup) -> dict[str, Any]:
    """Rows per second of shuffled batches with 20 % masked."""
    import datasets

    args, collator = setup.args, setup.collator
    table = datasets.Dataset.from_parquet(setup.parquet, cache_dir=str(setup.folder / "cache"))

    def ours(name: str) -> Callable[[int], Iterator[Any]]:
        return lambda workers: iter(_our_loader(setup, name, workers))

    def from_table(workers: int) -> Iterator[Any]:
        return iter(_peer_loader(table.with_format("torch"), collator(), args.rows, workers, shuffle=True))

    def from_stream(workers: int) -> Iterator[Any]:
        return iter(_peer_loader(_stream(setup), collator(), args.rows, workers))

    cases = {"concat": ours("concat"), "best_fit": ours("best_fit"), "datasets table": from_table}
    cases["datasets streaming"] = from_stream
    rates: dict[str, list[float]] = {}
    for _, (name, make), workers in itertools.product(range(args.rounds), cases.items(), (0, 2)):
        batches = args.batches // (10 if "datasets" in name else 1)
        rates.setdefault(f"{name}, {workers} workers", []).append(_rate(make(workers), batches, args.rows))
    rates |= setup.streaming["rates"] if setup.streaming else {}
    return _compare(rates, "rows/s", ours=("concat", "best_fit"))


def resume(setup: Setup) -> dict[str, Any]:
    """Milliseconds from a state at half of an epoch to the first batch, without workers."""
    from torchrecipes.data import open_corpus

    half = len(setup.cut) // 2 // setup.args.rows
    seconds: dict[str, list[float]] = {}
    for name in ("concat", "best_fit"):
        before = _our_loader(setup, name, 0)
        before.seek(half)
        state = before.state_dict()
        for _ in range(setup.args.rounds):
            start = time.perf_counter()
            setup.corpus = open_corpus(setup.corpus.folder)
            after = _our_loader(setup, name, 0)
            after.load_state_dict(state)
            after.next_step()
            seconds.setdefault(name, []).append(time.perf_counter() - start)

    before = _stream(setup)
    for _ in itertools.islice(before, half * setup.args.rows):
        pass
    state = before.state_dict()
    for _ in range(setup.args.rounds):
        start = time.perf_counter()
        after = _stream(setup)
        after.load_state_dict(state)
        next(iter(_peer_loader(after, setup.collator(), setup.args.rows, 0)))
        seconds.setdefault("datasets streaming", []).append(time.perf_counter() - start)
    seconds |= setup.streaming["resume"] if setup.streaming else {}
    milliseconds = {name: [1000 * value for value in values] for name, values in seconds.items()}
    return _compare(milliseconds, "ms", ours=("concat", "best_fit"), smaller=True)


def tokenization(setup: Setup) -> dict[str, Any]:
    """Megabytes of text per second, from JSON lines to tokens on disk; and the tokenizer alone, on texts in memory."""
    import datasets
    import transformers

    from torchrecipes.data import prepare_corpus
    from torchrecipes.data.sources import files

    threads = setup.args.threads
    texts = [json.loads(line)["text"] for line in setup.text.open(encoding="utf-8")]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    tokenizer = setup.tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(setup.folder / "tokenizer")

    def build(round_: int) -> None:
        folder = setup.folder / f"tokenized-{round_}"
        prepare_corpus(folder, files(str(setup.text)), tokenizer, validation_fraction=0, tokenizer_threads=threads)

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {
            "input_ids": theirs(batch["text"], return_attention_mask=False, return_token_type_ids=False)["input_ids"]
        }

    def map_(round_: int) -> None:
        folder = str(setup.folder / f"mapped-{round_}")
        rows = datasets.Dataset.from_json(str(setup.text), cache_dir=folder)
        rows.map(encode, batched=True, num_proc=threads, remove_columns=["text"])

    rates: dict[str, list[float]] = {}
    for round_ in range(setup.args.rounds):
        for name, function in (
            ("prepare_corpus", build),
            (f"datasets.map, {threads} processes", map_),
            ("encode_batch alone", lambda _: tokenizer.encode_batch(texts)),
        ):
            start = time.perf_counter()
            function(round_)
            rates.setdefault(name, []).append(megabytes / (time.perf_counter() - start))
    return _compare(rates, "MB/s", ours=("prepare_corpus",))


def memory(setup: Setup) -> dict[str, Any]:
    """Peak memory, in MB, of a stream that is larger than the limit set (stream_memory.py, a process of its own)."""
    text, limit, block = (8, 96, 2) if setup.args.tiny else (160, 96, 16)
    script = Path(__file__).with_name("stream_memory.py")
    sizes = [f"--text-mb={text}", f"--limit-mb={limit}", f"--block-mb={block}"]
    done = subprocess.run([sys.executable, script, *sizes], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print("  " + ", ".join(f"{name} {value:,.1f}" for name, value in found.items()))
    return found


# Cases by name, in order: a function of the setup that prints lines and returns figures.
CASES: dict[str, Callable[[Setup], dict[str, Any]]] = {
    "packing": packing,
    "loader": loader,
    "resume": resume,
    "tokenization": tokenization,
    "memory": memory,
}


def measure_streaming(folder: Path, rows: int, batches: int, rounds: int) -> dict[str, Any]:
    """Rows per second and resuming of mosaicml-streaming, in its own environment: imports nothing of this library."""
    from streaming import MDSWriter, StreamingDataLoader, StreamingDataset

    cut = np.load(folder / "rows.npy", mmap_mode="r")
    with MDSWriter(out=str(folder / "mds"), columns={"tokens": f"ndarray:uint16:{cut.shape[1]}"}) as writer:
        for row in cut:
            writer.write({"tokens": np.asarray(row)})
    collator = _collator(folder / "tokenizer")

    def make(workers: int) -> Any:
        dataset = StreamingDataset(local=str(folder / "mds"), shuffle=True, batch_size=rows)
        return StreamingDataLoader(
            dataset,
            batch_size=rows,
            num_workers=workers,
            collate_fn=lambda samples: collator([torch.from_numpy(s["tokens"].astype(np.int64)) for s in samples]),
        )

    rates: dict[str, list[float]] = {}
    seconds = []
    for _ in range(rounds):
        for workers in (0, 2):
            found = _rate(iter(make(workers)), batches, rows)
            rates.setdefault(f"{STREAMING}, {workers} workers", []).append(found)
        before = make(0)
        next(iter(before))
        state = before.state_dict() | {"sample_in_epoch": len(cut) // 2}
        start = time.perf_counter()
        after = make(0)
        after.load_state_dict(state)
        next(iter(after))
        seconds.append(time.perf_counter() - start)
    return {"rates": rates, "resume": {STREAMING: seconds}}


def _our_loader(setup: Setup, kind: str, workers: int) -> Any:
    from torchrecipes.data import Loader, MLMCollator, make_rows

    dataset = make_rows(kind, setup.corpus, setup.args.seq_len, setup.tokenizer.pad_id)
    sizes = {"global_batch_size": setup.args.rows, "micro_batch_size": setup.args.rows}
    return Loader(dataset, MLMCollator(setup.tokenizer, 0.2), seed=0, num_workers=workers, **sizes)


def _stream(setup: Setup) -> Any:
    import datasets

    rows = datasets.load_dataset("parquet", data_files=setup.parquet, split="train", streaming=True)
    return rows.shuffle(seed=0, buffer_size=10_000).with_format("torch")


def _peer_loader(rows: Any, collator: Any, size: int, workers: int, **options: Any) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(
        rows,
        batch_size=size,
        collate_fn=lambda samples: collator([sample["input_ids"].long() for sample in samples]),
        num_workers=workers,
        drop_last=True,
        **options,
    )


def _collator(folder: Path) -> Any:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.2)


def _rate(batches: Iterator[Any], count: int, rows: int) -> float:
    """Rows per second of `count` batches, after a few that warm up."""
    for _ in range(5):
        next(batches)
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count * rows / (time.perf_counter() - start)


def _timed(function: Callable[[], Any], rounds: int) -> tuple[float, Any]:
    """The median seconds of some calls, and what the last returned."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


def _compare(rounds: dict[str, list[float]], unit: str, ours: tuple[str, ...], smaller: bool = False) -> dict[str, Any]:
    """Prints the median of each, and how much better ours are than the peer's best number of workers."""
    median = {name: statistics.median(values) for name, values in rounds.items()}
    best = min if smaller else max
    groups = {name.split(", ")[0]: [] for name in median}
    for name, value in median.items():
        groups[name.split(", ")[0]].append(value)
    figures: dict[str, Any] = {"median": median, "rounds": rounds, "ratio": {}}
    for name, value in median.items():
        print(f"  {name:34s} {value:12,.1f} {unit}")
    for mine in ours:
        for peer in groups.keys() - set(ours):
            ratio = best(groups[mine]) / best(groups[peer])
            figures["ratio"][f"{mine} / {peer}"] = 1 / ratio if smaller else ratio
    for name, ratio in sorted(figures["ratio"].items()):
        print(f"  {name}: {ratio:.2f} times")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"cases, separated by commas: {', '.join(CASES)}")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rows", type=int, default=32, help="of a batch")
    parser.add_argument("--batches", type=int, default=500, help="of a round; peers take a tenth")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=40_000_000, help="of the corpus that batches come from")
    parser.add_argument("--megabytes", type=float, default=20, help="of text to tokenize")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="that tokenize; processes of datasets.map")
    parser.add_argument("--streaming-python", help=f"a Python that has {STREAMING}")
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--tiny", action="store_true", help="everything small, to see that it runs")
    parser.add_argument("--measure-streaming", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure_streaming:
        folder, sizes = args.measure_streaming
        print(json.dumps(measure_streaming(Path(folder), **json.loads(sizes))))
        return
    if args.tiny:
        args.rounds, args.batches, args.tokens, args.megabytes, args.rows = 1, 20, 200_000, 0.5, 4

    import datasets

    datasets.disable_progress_bars()
    figures: dict[str, Any] = {"cores": os.cpu_count(), "arguments": vars(args)}
    with tempfile.TemporaryDirectory() as name:
        setup = Setup(Path(name), args)
        for case in args.only.split(",") if args.only else CASES:
            print(f"{case}: {CASES[case].__doc__}", flush=True)
            figures[case] = CASES[case](setup)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
