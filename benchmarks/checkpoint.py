"""Time that training pauses for a checkpoint: written synchronously, and copied to memory and written in a thread.

    python benchmarks/checkpoint.py
    python benchmarks/checkpoint.py --rounds 5 --folder /fast/disk

A NeoBERT of 110 million parameters with AdamW's state, 1.3 GB in total. Every round saves once in each way, with one
more optimizer step between; the figures are medians. The folder should be on the disk that runs are kept on.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from torchrecipes.checkpoint import CheckpointConfig, Checkpointer
from torchrecipes.data.sources.records import Document
from torchrecipes.data.tokenizers.load import train_wordpiece
from torchrecipes.models import neobert
from torchrecipes.optim import adamw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    device = "cuda" if torch.cuda.is_available() else "cpu"

    tokenizer = train_wordpiece([Document("a small text for a small tokenizer, " * 3, "here")], vocab_size=60)
    model = neobert("100m").to(device)
    optimizer = adamw(model)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    ways = {
        way: Checkpointer(
            folder / way,
            CheckpointConfig(keep_last=1, async_save=way == "asynchronous"),
            model=model,
            optimizer=optimizer,
            tokenizer=tokenizer,
        )
        for way in ("synchronous", "asynchronous")
    }
    stalls: dict[str, list[float]] = {way: [] for way in ways}
    behind, size, first = [], 0, 0.0
    try:
        for step in range(1, args.rounds + 2):
            for way, checkpointer in ways.items():
                optimizer.step()
                if device == "cuda":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                path = checkpointer.save(step)
                stalled = time.perf_counter() - start
                checkpointer.wait()
                if step == 1:
                    first = stalled
                    continue  # the first asynchronous save allocates the copy's memory, once per run
                stalls[way].append(stalled)
                if way == "asynchronous":
                    behind.append(time.perf_counter() - start)
                size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    finally:
        shutil.rmtree(folder)

    medians = {way: statistics.median(values) for way, values in stalls.items()}
    for way, seconds in medians.items():
        print(f"{way:>12}: training stands still for {seconds:6.2f} s, {size / seconds / 1e6:8,.0f} MB/s")
    print(f"asynchronous: the first save of a run, which allocates the copy: {first:.2f} s")
    print(f"asynchronous: on the disk after {statistics.median(behind):.2f} s")
    print(f"asynchronous / synchronous: {medians['asynchronous'] / medians['synchronous']:.1%} ({size / 1e9:.2f} GB)")


if __name__ == "__main__":
    main()
