"""The step of `torchrecipes.optim.muon` for a decoder of 100 million parameters, against PyTorch's own parts.

    python benchmarks/muon.py
    python benchmarks/muon.py --hidden-size 384 --layers 6 --tokens 4096

Side by side, in turns, with the same gradients:

- ours;
- two optimizers, as PyTorch's documentation has it: `torch.optim.Muon` for the hidden matrices of the same model
  (fused ones whole) and fused `torch.optim.AdamW` for the rest;
- the same with queries, keys, values, gate and up as matrices of their own, which is what the papers train and what
  ours computes. `torch.optim.Muon` cannot be told parts, so these are parameters made for it;
- fused AdamW for everything.

Then a real training step (forward, loss, backward, ours) of `--tokens` tokens, and the optimizer's share of it.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn

from torchrecipes.losses import causal_lm_loss
from torchrecipes.models import llama
from torchrecipes.optim import adamw, muon
from torchrecipes.optim.muon_optimizer import muon_params, row_splits
from torchrecipes.training.precision import autocast, resolve_dtype


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--tokens", type=int, default=8192, help="of the training step, in micro-batches of 1024")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    model = make_model(args).to(device)
    sizes = {id(p): p.numel() for p in model.parameters()}
    hidden = [p for _, p in muon_params(model)]
    print(f"{sum(sizes.values()):,} parameters, {sum(p.numel() for p in hidden):,} of them in hidden matrices")
    print(f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-2

    ours = muon(model, ns_coefficients="quintic")
    rest = [p for p in model.parameters() if id(p) not in {id(q) for q in hidden}]
    whole = copies(hidden)
    rows = row_splits(model)
    split = copies(part for p in hidden for part in p.split(rows.get(p, (p.shape[0],))))
    theirs = torch.optim.AdamW(copies(rest), fused=True)
    steps = {
        "torchrecipes.optim.muon": ours.step,
        "Polar Express": muon(model, ns_coefficients="polar_express").step,
        "torch.optim.Muon, fused matrices whole, and AdamW": both(torch.optim.Muon(whole), theirs),
        "torch.optim.Muon, every matrix by itself, and AdamW": both(torch.optim.Muon(split), theirs),
        "fused AdamW": adamw(model).step,
    }
    seconds = time_in_turns(steps, args.repeat, device)
    base = seconds["torchrecipes.optim.muon"]
    for name, value in seconds.items():
        print(f"{value * 1e3:9.1f} ms  {value / base:5.2f}  {name}")

    ours.zero_grad()
    share_of_a_step(model, args, base, device)


def make_model(args: argparse.Namespace) -> nn.Module:
    heads = args.hidden_size // 64
    return llama(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=args.hidden_size * 8 // 3 // 64 * 64,
    )


def copies(parameters) -> list[nn.Parameter]:
    found = []
    for parameter in parameters:
        found.append(nn.Parameter(parameter.detach().clone()))
        found[-1].grad = torch.randn_like(found[-1]) * 1e-2
    return found


def both(*optimizers: torch.optim.Optimizer) -> Callable[[], None]:
    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    return step


def time_in_turns(steps: dict[str, Callable], repeat: int, device: torch.device) -> dict[str, float]:
    """The best of each, in seconds, since a machine may have other work; the first turn is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeat + 1):
        for name, step in steps.items():
            start = now(device)
            step()
            if turn:
                seconds[name].append(now(device) - start)
    return {name: min(values) for name, values in seconds.items()}


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def share_of_a_step(model: nn.Module, args: argparse.Namespace, optimizer_seconds: float, device: torch.device) -> None:
    dtype = resolve_dtype("auto", device)
    tokens = torch.randint(args.vocab_size, (1, 1024), device=device)

    def micro_batch() -> None:
        with autocast(device, dtype):
            causal_lm_loss(model(tokens), model.head, tokens).backward()

    seconds = time_in_turns({"": micro_batch}, 3, device)[""] * args.tokens / 1024
    print(
        f"forward and backward of {args.tokens:,} tokens ({dtype}): {seconds:.2f} s; the optimizer's share of a step:"
    )
    for tokens_per_step in (args.tokens, 65_536, 524_288):
        whole = seconds * tokens_per_step / args.tokens + optimizer_seconds
        print(f"{tokens_per_step:9,} tokens  {optimizer_seconds / whole:6.1%}")


if __name__ == "__main__":
    main()
