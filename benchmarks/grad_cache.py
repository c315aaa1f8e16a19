"""Memory of a contrastive step: all pairs at once, and cached (GradCache) in micro-batches.

    python benchmarks/grad_cache.py --json grad_cache.json
    python benchmarks/grad_cache.py --pairs 64 512 4096 --plain-up-to 512 --micro-batch 64

The model is a BERT of 6 layers of 384 (all-MiniLM-L6-v2's size, random weights) with dropout, the loss InfoNCE. What is
counted is the growth of the process's resident memory from just before the step to its peak (on CUDA: of the memory
that tensors take), less the size of the weights' gradients. Every figure is taken in a process of its own. The last
line is the largest difference between the gradients of both steps, relative to the largest gradient of each tensor,
with the same dropout. Linux only.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from torchrecipes.data import Examples
from torchrecipes.data.batching.batch import Batch
from torchrecipes.data.batching.texts import pack_texts
from torchrecipes.losses import InfoNCE
from torchrecipes.models import EmbeddingModel, bert
from torchrecipes.training import random_state, replay

MIB = 1 << 20


def make_batches(pairs, micro_batch, length, device):
    """Micro-batches of random pairs, of texts of `length / 2` to `length` tokens."""
    random = np.random.default_rng(0)
    batches = []
    for first in range(0, pairs, micro_batch):
        count = min(micro_batch, pairs - first)
        lengths = random.integers(length // 2, length + 1, 2 * count)
        fields, places = pack_texts(random.integers(1000, 30_000, lengths.sum()), lengths, 0)
        texts = torch.from_numpy(places.reshape(count, 2))
        examples = Examples(texts, torch.from_numpy(random.integers(0, 2**62, 2 * count)))
        batches.append(Batch(num_targets=count, examples=examples, **fields).to(device))
    return batches


def make_model(device):
    model = EmbeddingModel(bert("minilm-l6", hidden_dropout_prob=0.1), max_length=512)
    return model.to(device).train()


def plain_step(model, batches, loss, device):  # noqa: ARG001
    """What a cached step has to equal: the same dropout for each micro-batch, all in one graph."""
    embeddings = torch.cat([model.embed(batch) for batch in batches])
    loss(embeddings, Examples.join([batch.examples for batch in batches]))[0].backward()


def cached_step(model, batches, loss, device):
    states, parts = [], []
    for batch in batches:
        states.append(random_state(device))
        with torch.no_grad():
            parts.append(model.embed(batch))
    embeddings = torch.cat(parts).requires_grad_()
    loss(embeddings, Examples.join([batch.examples for batch in batches]))[0].backward()
    gradients = embeddings.grad.split([len(part) for part in parts])
    for batch, state, gradient in zip(batches, states, gradients, strict=True):
        with replay(state):
            model.embed(batch).backward(gradient)


STEPS = {"plain": plain_step, "cached": cached_step}


def measure_here(args):
    """Bytes and seconds of one step."""
    model, loss, device = make_model(args.device), InfoNCE(), args.device

    def used():
        if device == "cuda":
            return torch.cuda.memory_allocated()
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    STEPS[args.step](model, make_batches(4, 2, args.length, device), loss, device)  # libraries load their kernels
    batches = make_batches(args.pairs[0], args.micro_batch, args.length, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    before, start = used(), time.perf_counter()
    STEPS[args.step](model, batches, loss, device)
    if device == "cuda":
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"bytes": peak - before, "seconds": time.perf_counter() - start}


def measure_apart(step, pairs, args):
    options = [f"--{key.replace('_', '-')}={getattr(args, key)}" for key in ("micro_batch", "length", "device")]
    command = [sys.executable, __file__, f"--step={step}", "--pairs", str(pairs), *options]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def gradient_difference(args):
    """Of 64 pairs in micro-batches of 16."""
    batches, found = make_batches(64, 16, args.length, args.device), []
    for step in STEPS.values():
        torch.manual_seed(0)
        model = make_model(args.device)
        torch.manual_seed(1)
        step(model, batches, InfoNCE(), args.device)
        found.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    pairs = zip(*found, strict=True)
    # A gradient that is zero but for rounding, such as that of the keys' biases, counts as zero.
    largest = max(one.abs().max() for one in found[0])
    return max(((one - other).abs().max() / max(one.abs().max(), 1e-4 * largest)).item() for one, other in pairs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[64, 512, 4096])
    parser.add_argument("--plain-up-to", type=int, default=512, help="pairs, for the step that is not cached")
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=32, help="tokens of a text at most")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step is not None:
        print(json.dumps(measure_here(args)))
        return
    rows = []
    print(f"{'pairs':>6} {'plain MiB':>10} {'cached MiB':>10} {'plain s':>8} {'cached s':>8}")
    for pairs in args.pairs:
        row = {"pairs": pairs, "cached": measure_apart("cached", pairs, args)}
        row["plain"] = measure_apart("plain", pairs, args) if pairs <= args.plain_up_to else None
        plain = [f"{row['plain']['bytes'] / MIB:.0f}", f"{row['plain']['seconds']:.1f}"] if row["plain"] else ["-", "-"]
        cached = row["cached"]
        print(f"{pairs:>6} {plain[0]:>10} {cached['bytes'] / MIB:>10.0f} {plain[1]:>8} {cached['seconds']:>8.1f}")
        rows.append(row)
    difference = gradient_difference(args)
    print(f"largest relative difference of the gradients: {difference:.1e}")
    if args.json is not None:
        result = {"rows": rows, "gradient_difference": difference, "micro_batch": args.micro_batch}
        result |= {"length": args.length, "device": args.device, "torch": torch.__version__}
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
