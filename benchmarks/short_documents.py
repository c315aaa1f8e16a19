"""Attention of short texts on the CPU: one length at a time against rows with a mask; and batches of texts per second.

    python benchmarks/short_documents.py [--threads 1] [--repeats 15] [--json FILE]

The texts are packed, as fine-tuning packs them. `regrouped`: several share a row of 64, 128, ... tokens, with a mask.
`padded`: every text has a row of the longest one's length, with a mask and `scaled_dot_product_attention`, as
`transformers` computes it. Heads are those of MiniLM. All run in turns in one process; a ratio is the median, over the
turns, of another way's time by that of one length at a time.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from torchrecipes.data import ExampleRows, Loader, PairCollator
from torchrecipes.data.examples import ExampleBlock
from torchrecipes.modules import AttentionBackend, attention, choose_attention_backend
from torchrecipes.modules.cpu.regroup import regroup

HEADS, HEAD_DIM, DROPOUT = 12, 32, 0.1
TEXTS = {"sentences": (128, 8, 40), "paragraphs": (64, 40, 100), "passages": (32, 100, 256)}  # number, least, most
CPU = torch.device("cpu")


def regrouped_backend(lengths: np.ndarray, dropout_p: float, dtype: torch.dtype) -> AttentionBackend:
    """Several texts in a row, with a mask."""
    segments, gather, scatter = regroup(lengths, 1, int(lengths.sum()))
    seen = segments[:, :, None] == segments[:, None, :]
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))[:, None]
    name = "math" if dropout_p or dtype == torch.bfloat16 else "sdpa"
    return AttentionBackend(name, dropout_p=dropout_p, mask=mask, gather=gather, scatter=scatter)


def measure(texts: tuple[int, int, int], dtype: torch.dtype, mode: str, repeats: int) -> dict[str, float]:
    """Milliseconds of one length at a time, and the ratios of the others to it."""
    number, least, most = texts
    lengths = np.sort(np.random.default_rng(0).integers(least, most + 1, number))
    total, longest, train = int(lengths.sum()), int(lengths.max()), mode != "encode"
    dropout_p = DROPOUT if mode == "train, dropout" else 0.0
    bounds = torch.from_numpy(np.append(0, np.cumsum(lengths)))
    qkv = torch.randn(1, total, 3 * HEADS, HEAD_DIM, dtype=dtype, requires_grad=train)
    padded = torch.randn(number, longest, 3 * HEADS, HEAD_DIM, dtype=dtype, requires_grad=train)
    mask = (torch.arange(longest) < torch.from_numpy(lengths)[:, None])[:, None, None]

    def packed(backend: AttentionBackend) -> Tensor:
        return attention(*qkv.split(HEADS, dim=2), backend=backend)

    def by_rows() -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in padded.split(HEADS, dim=2))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)

    with torch.set_grad_enabled(train):
        options = {"cu_seqlens": bounds, "dropout_p": dropout_p, "device": CPU, "dtype": dtype}
        by_length = choose_attention_backend((1, total), **options)
        regrouped = regrouped_backend(lengths, dropout_p, dtype)
        ways = {"by length": lambda: packed(by_length), "regrouped": lambda: packed(regrouped), "padded": by_rows}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(repeats + 1):
            for name, way in ways.items():
                qkv.grad = padded.grad = None
                start = time.process_time()
                out = way()
                if train:
                    out.backward(torch.ones_like(out))
                if repeat:
                    times[name].append(time.process_time() - start)
    ratios = {
        name: statistics.median(a / b for a, b in zip(times[name], times["by length"], strict=True))
        for name in ("regrouped", "padded")
    }
    return {"ms": statistics.median(times["by length"]) * 1e3} | ratios


class Corpus:
    """Pairs of made-up tokens, as an `ExampleCorpus` gives them."""

    def __init__(self, num_examples: int = 20_000, longest: int = 39):
        rng = np.random.default_rng(0)
        self.lengths = rng.integers(2, longest, (num_examples, 2))
        self.num_examples, self.texts_per_example, self.fingerprint, self.labels = num_examples, 2, "made up", None
        self.example_lengths = self.lengths.sum(1)

    def read(self, numbers: np.ndarray) -> ExampleBlock:
        lengths = self.lengths[numbers].ravel()
        none, places = np.zeros_like(lengths), np.arange(len(lengths))
        tokens = np.ones(lengths.sum(), dtype=np.uint16)
        return ExampleBlock(tokens, lengths, lengths, places, none, places.reshape(-1, 2))


def texts_per_second(batch_size: int, steps: int = 100) -> float:
    """Texts in batches, with reading left out."""
    tokenizer = SimpleNamespace(pad_id=0, unpadded_vocab_size=100, domain=None)
    sizes = {"global_batch_size": batch_size, "micro_batch_size": 64}
    loader = Loader(ExampleRows(Corpus(), 64, 0), PairCollator(tokenizer), seed=0, **sizes)
    loader.next_step()
    start = time.process_time()
    for _ in range(steps):
        loader.next_step()
    return 2 * batch_size * steps / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    for batch_size in (64, 1024):
        results[f"batches of {batch_size}"] = rate = texts_per_second(batch_size)
        print(f"steps of {batch_size} pairs: {rate:,.0f} texts/s", flush=True)
    for name, texts in TEXTS.items():
        for dtype in (torch.float32, torch.bfloat16):
            for mode in ("encode", "train", "train, dropout"):
                found = measure(texts, dtype, mode, args.repeats)
                results[f"{name}, {str(dtype)[6:]}, {mode}"] = found
                print(
                    f"{name:11} {str(dtype)[6:]:9} {mode:15} {found['ms']:7.1f} ms   "
                    f"regrouped {found['regrouped']:.2f}   padded {found['padded']:.2f}",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
