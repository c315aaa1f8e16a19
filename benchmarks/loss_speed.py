"""Time of the loss, forward and backward: `linear_cross_entropy` beside `F.linear` and `F.cross_entropy`, in turns.

    python benchmarks/loss_speed.py --positions 832 --vocab 16384 --hidden 256 --json loss_speed.json

Prints the median over the rounds and the ratio. One round before them warms up. bf16 means autocast with fp32 weights.
Full logits need some 12 bytes per position and vocabulary entry; on CUDA they are compiled.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from torchrecipes.losses import linear_cross_entropy


def full_cross_entropy(hidden, weight, labels):
    return F.cross_entropy(F.linear(hidden, weight), labels, reduction="sum")


def seconds(loss_function, hidden, weight, labels, args):
    hidden.grad = weight.grad = None
    start = time.perf_counter()
    with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.dtype == "bf16"):
        loss = loss_function(hidden, weight, labels)
    (loss / args.positions).backward()
    if args.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=832)
    parser.add_argument("--vocab", type=int, default=16_384)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    torch.manual_seed(0)
    hidden = torch.randn(args.positions, args.hidden, device=args.device, requires_grad=True)
    weight = torch.randn(args.vocab, args.hidden, device=args.device).mul_(0.02).requires_grad_()
    labels = torch.randint(0, args.vocab, (args.positions,), device=args.device)
    full = torch.compile(full_cross_entropy) if args.device == "cuda" else full_cross_entropy
    times = {"full": [], "chunked": []}
    for _ in range(1 + args.rounds):
        for name, loss_function in (("full", full), ("chunked", linear_cross_entropy)):
            times[name].append(seconds(loss_function, hidden, weight, labels, args))
    median = {name: statistics.median(values[1:]) for name, values in times.items()}
    ratio = median["full"] / median["chunked"]
    print(f"{args.positions} positions, vocabulary {args.vocab}, hidden {args.hidden}, {args.dtype} on {args.device}:")
    print(f"  full logits {median['full'] * 1e3:9.1f} ms")
    print(f"  chunked     {median['chunked'] * 1e3:9.1f} ms, {ratio:.2f} times as fast")
    if args.json is not None:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        result = {**settings, "torch": torch.__version__, "threads": torch.get_num_threads()}
        result |= {"seconds": times, "median_s": median, "ratio": ratio}
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
