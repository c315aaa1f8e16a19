"""Peak memory of a stream that is larger than the limit.

    python benchmarks/stream_memory.py --text-mb 128 --limit-mb 96

Reads a whole epoch of a stream while it is tokenized, under a limit on the address space that is smaller than the
corpus (`RLIMIT_AS`, above what the process has at the start). Prints the peak memory of the reader and of the process
that tokenizes.
"""

import argparse
import json
import random
import resource
import tempfile
import time
from functools import partial
from pathlib import Path

from torchrecipes.data import CausalLMCollator, Loader, PackedDataset
from torchrecipes.data.batching import StreamedRows
from torchrecipes.data.corpus import open_stream
from torchrecipes.data.sources import files
from torchrecipes.data.tokenizers import train_char

SEQ_LEN, GLOBAL_BATCH = 1024, 64
WORDS = "the of to and in a is that for it as was with be by on not he his but at are this have from".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text-mb", type=int, default=128, help="a character is a token of two bytes")
    parser.add_argument("--limit-mb", type=int, default=96, help="more memory than at the start is refused")
    parser.add_argument("--block-mb", type=int, default=16, help="size of a block in the corpus")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), args.text_mb, args.limit_mb, args.block_mb)


def run(folder: Path, text_mb: int, limit_mb: int, block_mb: int) -> None:
    """Streams a text of so many MB, and prints the peaks as a line of JSON."""
    draw = random.Random(0)
    with (folder / "text.jsonl").open("w") as file:
        for _ in range(text_mb * 1000):
            file.write(json.dumps({"text": " ".join(draw.choices(WORDS, k=1000))[:999]}) + "\n")
    source = files(str(folder / "text.jsonl"))
    tokenizer = train_char(source, causal=True, sample_fraction=0.001)
    start = {name: status(name) for name in ("VmRSS", "VmSize", "RssAnon")}
    resource.setrlimit(resource.RLIMIT_AS, (int((start["VmSize"] + limit_mb) * 1e6), resource.RLIM_INFINITY))
    stream = open_stream(source, tokenizer, cache_dir=folder / "cache", validation_fraction=0, shard_tokens=1 << 20)
    make_rows = partial(PackedDataset, seq_len=SEQ_LEN, pad_id=tokenizer.pad_id, lookahead=1)
    rows = StreamedRows(stream, make_rows, SEQ_LEN, block_rows=int(block_mb * 1e6 / 2 / SEQ_LEN))
    collator = CausalLMCollator(tokenizer.eos_id)
    loader = Loader(rows, collator, seed=0, global_batch_size=GLOBAL_BATCH, micro_batch_size=GLOBAL_BATCH)
    begin, of_tokenizer, most = time.perf_counter(), 0.0, 0.0
    while not stream.finished or loader.rows_consumed < rows.num_rows:
        loader.next_step()
        most = max(most, status("RssAnon"))
        of_tokenizer = max(of_tokenizer, status("VmHWM", stream.process.pid))
    size = sum(path.stat().st_size for path in stream.folder.rglob("shard-*")) / 1e6
    found = {
        "corpus_mb": size,
        "limit_mb": limit_mb,
        "reader_over_start_mb": status("VmHWM") - start["VmRSS"],
        "reader_without_mapped_files_mb": most - start["RssAnon"],
        "tokenizer_mb": of_tokenizer,
        "seconds": time.perf_counter() - begin,
    }
    print(json.dumps({name: round(value, 1) for name, value in found.items()}), flush=True)


def status(name: str, pid: int | str = "self") -> float:
    """A line of /proc/PID/status, in MB; 0 if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{name}:")), 0.0)


if __name__ == "__main__":
    main()
