"""Peak memory of the loss: `linear_cross_entropy` beside the full logits of `F.linear` and `F.cross_entropy`.

    python benchmarks/loss_memory.py --positions 8192 --vocab 131072 --json loss_memory.json

What is counted: the growth of the process's resident memory (on CUDA: of the memory that tensors take) from just before
the loss to its peak during loss and backward, less the size of the gradients of `hidden` and `weight`, which any
method has to give. So the inputs and the gradients count nothing, and all else does: logits, softmax, copies in bf16,
scratch space of the matrix library. Each variant runs in a process of its own. Linux only.

Full logits take some 12 bytes per position and vocabulary entry. Where this machine has less than 16 of them free,
they are measured with a quarter (a sixteenth, ...) of the positions and scaled up, and the output says so.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from torchrecipes.losses import linear_cross_entropy

MIB = 1 << 20
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def full_cross_entropy(hidden, weight, labels):
    return F.cross_entropy(F.linear(hidden, weight), labels, reduction="sum")


VARIANTS = {"chunked": linear_cross_entropy, "full": full_cross_entropy}


def train(loss_function, positions, vocab, size, args, measure=lambda: None):
    """One loss and backward; returns what `measure` gave before them, and the bytes of the gradients."""
    generator = torch.Generator(args.device).manual_seed(0)
    hidden = torch.randn(positions, size, device=args.device, generator=generator).requires_grad_()
    weight = torch.randn(vocab, size, device=args.device, generator=generator).mul_(0.02).requires_grad_()
    labels = torch.randint(0, vocab, (positions,), device=args.device, generator=generator)
    before = measure()
    with torch.autocast(args.device, dtype=DTYPES[args.dtype], enabled=args.dtype != "fp32"):
        loss = loss_function(hidden, weight, labels)
    (loss / positions).backward()
    return before, hidden.grad.nbytes + weight.grad.nbytes


def measure_here(args) -> int:
    """The figure of one variant, in bytes."""

    def used():
        if args.device == "cuda":
            return torch.cuda.memory_allocated()
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    train(VARIANTS[args.variant], 64, 1024, args.hidden, args)  # libraries load their kernels
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before, gradients = train(VARIANTS[args.variant], args.positions, args.vocab, args.hidden, args, used)
    if args.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return peak - before - gradients


def measure_apart(variant: str, positions: int, args) -> int:
    settings = {"positions": positions, "vocab": args.vocab, "hidden": args.hidden, "dtype": args.dtype}
    options = [f"--{key}={value}" for key, value in settings.items()]
    command = [sys.executable, __file__, f"--variant={variant}", f"--device={args.device}", *options]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=131_072)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant is not None:
        print(measure_here(args))
        return

    positions = args.positions
    while positions > 64 and positions * args.vocab * 16 > free_bytes(args.device):
        positions //= 4
    chunked = measure_apart("chunked", args.positions, args)
    full = measure_apart("full", positions, args) * args.positions // positions
    note = "" if positions == args.positions else f" (measured with {positions} positions, scaled up: little memory)"
    result = {
        "positions": args.positions,
        "vocab": args.vocab,
        "hidden": args.hidden,
        "dtype": args.dtype,
        "device": args.device,
        "torch": torch.__version__,
        "chunked_mib": round(chunked / MIB, 1),
        "full_mib": round(full / MIB, 1),
        "full_measured_at_positions": positions,
        "ratio": round(chunked / full, 4),
    }
    print(f"{args.positions} positions, vocabulary {args.vocab}, {args.dtype} on {args.device}:")
    print(f"  full logits {full / MIB:9.0f} MiB{note}")
    print(f"  chunked     {chunked / MIB:9.0f} MiB = {100 * chunked / full:.1f} % of that")
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
