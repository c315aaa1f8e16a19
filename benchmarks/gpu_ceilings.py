"""What the device gives at most, to hold the other figures against: a part of `benchmarks/gpu.py`."""

import torch
from gpu_bench import Bench, time_ms


def run(bench: Bench) -> None:
    bench.run("product", _product, 256 if bench.tiny else 8192)
    bench.run("copy", _copy, 2**16 if bench.tiny else 2**30)


def _product(bench: Bench, size: int) -> None:
    """Random numbers: a GPU that multiplies zeros draws less power and is faster."""
    a, b = (torch.randn(size, size, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    (milliseconds,) = time_ms(bench.device, lambda: a @ b, seconds=1.0)
    bench.add(shape=f"{size} x {size} x {size}, bf16", ms=milliseconds, tflops=2 * size**3 / milliseconds / 1e9)


def _copy(bench: Bench, size: int) -> None:
    source = torch.randn(size // 4, device=bench.device)
    target = torch.empty_like(source)
    (milliseconds,) = time_ms(bench.device, lambda: target.copy_(source), seconds=0.5)
    bench.add(bytes=size, ms=milliseconds, gigabytes_per_second=2 * size / milliseconds / 1e6)
