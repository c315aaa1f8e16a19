"""Tokens per second of packed and masked batches: this loader beside `datasets` with `transformers`' collator.

    python benchmarks/loader.py --json loader.json

Both read the same random corpus from disk and give batches of `--rows` rows of `--seq-len` tokens with 20 % masked. The
peer's rows were cut beforehand (a `datasets` table of `input_ids`, read by `torch.utils.data.DataLoader` with
`DataCollatorForLanguageModeling`), and it keeps no document boundaries. The two are measured in turns. Then: the time
from opening the corpus to the first batch of step 1,000,000. Needs the extra `dev`.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

VOCAB = 16_384


def make_corpus(folder: Path, num_tokens: int):
    """A tokenizer of 16,384 entries and a corpus of random documents, 20 to 400 tokens long, written as shards."""
    from torchrecipes.data.corpus.corpus import prepare_corpus
    from torchrecipes.data.sources.text_files import files
    from torchrecipes.data.tokenizers.load import train_wordpiece

    rng = np.random.default_rng(0)
    words = np.array(["".join(chr(97 + int(c)) for c in rng.integers(0, 26, 4)) for _ in range(12_000)])
    with (folder / "text.txt").open("w") as file:
        left = num_tokens
        while left > 0:
            length = int(rng.integers(20, 400))
            file.write(" ".join(words[rng.integers(0, len(words), length)]) + "\n")
            left -= length
    source = files(str(folder / "text.txt"), sample_by="line")
    tokenizer = train_wordpiece(source, vocab_size=VOCAB)
    corpus, _ = prepare_corpus(folder / "corpus", source, tokenizer, validation_fraction=0)
    tokenizer.save(folder / "tokenizer")
    return corpus, tokenizer


def ours(corpus, tokenizer, args, workers):
    """Seconds for `args.batches` batches, after a few to warm up."""
    from torchrecipes.data.batching.loader import Loader
    from torchrecipes.data.batching.mlm import MLMCollator
    from torchrecipes.data.batching.packing import PackedDataset

    loader = Loader(
        PackedDataset(corpus, args.seq_len, tokenizer.pad_id),
        MLMCollator(tokenizer, 0.2),
        seed=0,
        global_batch_size=args.rows,
        micro_batch_size=args.rows,
        num_workers=workers,
    )
    for _ in range(20):
        loader.next_step()
    start = time.perf_counter()
    for _ in range(args.batches):
        loader.next_step()
    return time.perf_counter() - start


def peer(table, collator, args, workers):
    """The same from `datasets` and `DataCollatorForLanguageModeling`, with fewer batches, scaled up."""
    loader = torch.utils.data.DataLoader(
        table, batch_size=args.rows, shuffle=True, collate_fn=collator, num_workers=workers, drop_last=True
    )
    batches = iter(loader)
    for _ in range(20):
        next(batches)
    count = max(1, args.batches // 10)
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    return (time.perf_counter() - start) * args.batches / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--batches", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--json", help="write the figures here")
    args = parser.parse_args()

    import datasets
    import transformers

    from torchrecipes.data.batching.loader import Loader
    from torchrecipes.data.batching.mlm import MLMCollator
    from torchrecipes.data.batching.packing import PackedDataset
    from torchrecipes.data.corpus.corpus import open_corpus

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus, tokenizer = make_corpus(folder, args.tokens)
        count = corpus.num_tokens // args.seq_len
        cut = corpus.read(0, count * args.seq_len).reshape(count, args.seq_len).astype(np.int32)
        table = datasets.Dataset.from_dict({"input_ids": cut})
        table.save_to_disk(folder / "table")
        table = datasets.load_from_disk(folder / "table").with_format("torch")
        collator = transformers.DataCollatorForLanguageModeling(
            transformers.AutoTokenizer.from_pretrained(folder / "tokenizer"), mlm_probability=0.2
        )
        tokens = args.batches * args.rows * args.seq_len
        rates: dict[str, list[float]] = {}
        for _ in range(args.rounds):
            for workers in (0, 2):
                rates.setdefault(f"ours, {workers} workers", []).append(tokens / ours(corpus, tokenizer, args, workers))
                rates.setdefault(f"datasets, {workers} workers", []).append(
                    tokens / peer(table, collator, args, workers)
                )

        start = time.perf_counter()
        opened = open_corpus(corpus.folder, tokenizer)
        late = Loader(
            PackedDataset(opened, args.seq_len, tokenizer.pad_id),
            MLMCollator(tokenizer, 0.2),
            seed=0,
            global_batch_size=args.rows,
            micro_batch_size=args.rows,
        )
        late.seek(10**6)
        late.next_step()
        resume = time.perf_counter() - start

    median = {label: statistics.median(values) for label, values in rates.items()}
    print(f"{args.rows} rows of {args.seq_len}, {corpus.num_tokens:,} tokens on disk")
    for label, value in median.items():
        print(f"{label:22s} {value / 1e6:8.2f} M tokens/s")
    for workers in (0, 2):
        ratio = median[f"ours, {workers} workers"] / median[f"datasets, {workers} workers"]
        print(f"{workers} workers: {ratio:.1f} times the peer")
    print(f"first batch of step 1,000,000 after {resume * 1000:.1f} ms")
    if args.json:
        figures = {"cores": os.cpu_count(), "median": median, "rounds": rates, "resume_seconds": resume}
        Path(args.json).write_text(json.dumps(figures | {"arguments": vars(args)}, indent=2) + "\n")


if __name__ == "__main__":
    main()
