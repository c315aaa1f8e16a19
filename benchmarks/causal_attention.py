"""Dense causal attention on the CPU, forward and backward: tiles against the flash kernel and plain products.

    python benchmarks/causal_attention.py [--threads 1] [--repeats 15] [--json FILE]

All three run in turns in one process; a ratio is the median, over the turns, of the tiles' time by the other's.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from torchrecipes.modules import AttentionBackend, attention, choose_attention_backend

SHAPES = [  # rows, tokens per row, heads, key-value heads, size of a head
    (12, 64, 4, 4, 32),
    (8, 256, 4, 4, 32),
    (2, 1024, 4, 4, 32),
    (12, 64, 6, 6, 64),
    (8, 256, 6, 6, 64),
    (2, 1024, 6, 6, 64),
    (2, 1024, 12, 3, 64),
]


def plans(rows: int, length: int, dtype: torch.dtype) -> dict[str, AttentionBackend]:
    """The three ways of the same attention."""
    mask = torch.full((1, 1, length, length), float("-inf"), dtype=dtype).triu_(1)
    return {
        "tiled": choose_attention_backend((rows, length), causal=True, device=torch.device("cpu"), dtype=dtype),
        "sdpa": AttentionBackend("sdpa", causal=True),
        "math": AttentionBackend("math", mask=mask),
    }


def measure(shape: tuple[int, ...], dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Milliseconds of the tiles, and their ratio to the two others."""
    rows, length, heads, kv_heads, size = shape
    qkv = torch.randn(rows, length, heads + 2 * kv_heads, size, dtype=dtype, requires_grad=True)
    grad = torch.randn(rows, length, heads, size, dtype=dtype)
    times = {}
    for repeat in range(repeats + 2):
        for name, backend in plans(rows, length, dtype).items():
            qkv.grad = None
            start = time.perf_counter()
            attention(*qkv.split([heads, kv_heads, kv_heads], dim=2), backend=backend).backward(grad)
            if repeat >= 2:
                times.setdefault(name, []).append(time.perf_counter() - start)
    ratios = {
        f"tiled / {name}": statistics.median(a / b for a, b in zip(times["tiled"], times[name], strict=True))
        for name in ("sdpa", "math")
    }
    return {"tiled_ms": statistics.median(times["tiled"]) * 1e3} | ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        for shape in SHAPES:
            found = measure(shape, dtype, arguments.repeats)
            name = "{} x {}, {} heads ({}) of {}".format(*shape)
            print(
                f"{str(dtype)[6:]:9} {name:32}",
                ", ".join(f"{key} {value:.2f}" for key, value in found.items()),
                flush=True,
            )
            results.append({"dtype": str(dtype)[6:], "shape": shape} | found)
    if arguments.json:
        arguments.json.write_text(json.dumps({"torch": torch.__version__, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
