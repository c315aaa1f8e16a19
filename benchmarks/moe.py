"""A mixture of experts, forward and backward in bf16: this library, transformers, and a dense layer of the same FLOPs.

    python benchmarks/moe.py [--threads 2] [--rounds 9] [--clock wall|cpu] [--json FILE]

All three run in turns in one process: `MoE`, the `Qwen3MoeSparseMoeBlock` of transformers with its default experts, and
a `SwiGLU` as wide as the experts of a token together. A ratio is the median over the rounds. `--clock cpu` counts the
processor's time, which other processes on the machine disturb less; take one thread with it.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from torchrecipes.modules import MoE, SwiGLU
from torchrecipes.training.activation_checkpointing import tune_malloc

SHAPES = [  # tokens, width, experts, width of one, experts of a token
    (2048, 768, 8, 1024, 2),
    (4096, 256, 64, 128, 8),
]
WARM_UP = 2  # rounds


def blocks(width: int, experts: int, inner: int, chosen: int) -> dict[str, nn.Module]:
    """The three contestants."""
    config = Qwen3MoeConfig(
        hidden_size=width,
        moe_intermediate_size=inner,
        num_experts=experts,
        num_experts_per_tok=chosen,
        norm_topk_prob=True,
    )
    found = {
        "torchrecipes": MoE(width, inner, experts, chosen),
        "transformers": Qwen3MoeSparseMoeBlock(config),
        "dense": SwiGLU(width, inner * chosen),
    }
    for block in found.values():
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.02)
    return found


def measure(shape: tuple[int, ...], rounds: int, clock) -> dict[str, float]:
    """Milliseconds of each, medians, and the ratios."""
    tokens, *sizes = shape
    torch.manual_seed(0)
    x = torch.randn(1, tokens, sizes[0], requires_grad=True)
    grad = torch.randn(1, tokens, sizes[0], dtype=torch.bfloat16)
    times: dict[str, list[float]] = {}
    contestants = blocks(*sizes)
    for turn in range(WARM_UP + rounds):
        for name, block in contestants.items():
            start = clock()
            with torch.autocast("cpu", torch.bfloat16):
                out = block(x)
            (out[0] if isinstance(out, tuple) else out).backward(grad)
            if turn >= WARM_UP:
                times.setdefault(name, []).append((clock() - start) * 1e3)
            x.grad = None
            block.zero_grad()
    ours = times["torchrecipes"]
    return {f"{name}_ms": statistics.median(values) for name, values in times.items()} | {
        "transformers / ours": statistics.median(a / b for a, b in zip(times["transformers"], ours, strict=True)),
        "ours / dense": statistics.median(a / b for a, b in zip(ours, times["dense"], strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tune_malloc()
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    found = []
    for shape in SHAPES:
        found.append({"shape": shape} | measure(shape, args.rounds, clock))
        tokens, width, experts, inner, chosen = shape
        print(f"{tokens:,} tokens of {width}, {experts} experts of {inner}, {chosen} for each:")
        for name, value in found[-1].items():
            if name != "shape":
                print(f"  {name:20} {value:9.2f}")
    if args.json:
        args.json.write_text(json.dumps({"threads": args.threads, "clock": args.clock, "results": found}, indent=2))


if __name__ == "__main__":
    main()
