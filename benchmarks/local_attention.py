"""Attention within a window on the CPU, forward and backward: bands of keys against a mask over whole rows.

    python benchmarks/local_attention.py [--threads 1] [--repeats 7] [--json FILE]

Rows are packed with documents of 100 tokens and more; heads and window are those of ModernBERT base. All run in turns
in one process; a ratio is the median, over the turns, of the bands' time by the other's.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from torchrecipes.modules import AttentionBackend, attention, choose_attention_backend
from torchrecipes.modules.attention_backend import masked_backend

HEADS, HEAD_DIM, WINDOW = 12, 64, 64
SHAPES = [(8, 512), (4, 1024), (1, 4096)]  # rows, tokens per row
CPU = torch.device("cpu")


def boundaries(rows: int, length: int) -> Tensor:
    """Documents of 100 tokens to a whole row."""
    generator, bounds = torch.Generator().manual_seed(0), [0]
    while bounds[-1] < rows * length:
        size = int(torch.randint(100, length, (1,), generator=generator))
        bounds.append(min(bounds[-1] + size, (bounds[-1] // length + 1) * length))
    return torch.tensor(bounds)


def plans(rows: int, length: int, dtype: torch.dtype) -> dict[str, AttentionBackend]:
    """The band, the same attention with a mask over rows in two kernels, and that of a layer without a window."""
    bounds = boundaries(rows, length)
    masked = masked_backend((rows, length), None, bounds, False, WINDOW, 0.0, CPU, dtype)
    options = {"cu_seqlens": bounds, "device": CPU, "dtype": dtype}
    return {
        "banded": choose_attention_backend((rows, length), window=WINDOW, **options),
        "sdpa": masked,
        "math": masked._replace(name="math"),
        "global": choose_attention_backend((rows, length), **options),
    }


def measure(rows: int, length: int, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Milliseconds of the band, and its ratios to the others."""
    qkv = torch.randn(rows, length, 3 * HEADS, HEAD_DIM, dtype=dtype, requires_grad=True)
    grad = torch.randn(rows, length, HEADS, HEAD_DIM, dtype=dtype)
    times: dict[str, list[float]] = {}
    for repeat in range(repeats + 1):
        for name, backend in plans(rows, length, dtype).items():
            qkv.grad = None
            start = time.perf_counter()
            attention(*qkv.split(HEADS, dim=2), backend=backend).backward(grad)
            if repeat:
                times.setdefault(name, []).append(time.perf_counter() - start)
    ratios = {
        f"banded / {name}": statistics.median(a / b for a, b in zip(times["banded"], times[name], strict=True))
        for name in ("sdpa", "math", "global")
    }
    return {"banded_ms": statistics.median(times["banded"]) * 1e3} | ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        for rows, length in SHAPES:
            found = measure(rows, length, dtype, arguments.repeats)
            figures = ", ".join(f"{key} {value:.2f}" for key, value in found.items())
            print(f"{str(dtype)[6:]:9} {rows} x {length:<6} {figures}", flush=True)
            results.append({"dtype": str(dtype)[6:], "rows": rows, "length": length} | found)
    if arguments.json:
        arguments.json.write_text(json.dumps({"torch": torch.__version__, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
