"""The step of `torchrecipes.optim.muon` beside `torch.optim.Muon`: a part of `benchmarks/gpu.py`."""

import torch
from gpu_bench import Bench, clean_up, time_ms
from torch import nn

from torchrecipes.models import llama
from torchrecipes.optim import adamw, muon
from torchrecipes.optim.muon_optimizer import muon_params, row_splits
from torchrecipes.planning import peak_flops

MODELS = {
    "100M": {"vocab_size": 32_768, "hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 2048},
    "700M": {"vocab_size": 50_304, "hidden_size": 1280, "num_hidden_layers": 32, "intermediate_size": 3456},
}
TINY = {"tiny": {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}}
TOKENS = 524_288  # of the step that the optimizer's share is of
MFU = 0.5  # of the rest of that step


def run(bench: Bench) -> None:
    for name, keys in (TINY if bench.tiny else MODELS).items():
        bench.run(name, _compare, keys)


def _compare(bench: Bench, keys: dict[str, int]) -> None:
    with torch.device("meta"):
        model = llama(**keys, num_attention_heads=keys["hidden_size"] // 64, tie_word_embeddings=True)
    model.to_empty(device=bench.device)
    count = sum(p.numel() for p in model.parameters())
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
        parameter.grad = torch.randn_like(parameter) * 1e-2
    peak = peak_flops(bench.device, torch.bfloat16)
    rest_ms = None if peak is None else 1e3 * 6 * count * TOKENS / (MFU * peak)

    def measure(variant: str, *optimizers: torch.optim.Optimizer) -> None:
        def step() -> None:
            for optimizer in optimizers:
                optimizer.step()

        (milliseconds,) = time_ms(bench.device, step, seconds=1.0)
        share = None if rest_ms is None else 100 * milliseconds / (milliseconds + rest_ms)
        bench.add(variant=variant, ms=milliseconds, percent_of_step=share, parameters=count)

    for name in ("polar_express", "quintic"):
        measure(f"torchrecipes.optim.muon, {name}", muon(model, ns_coefficients=name))
        clean_up(bench.device)
    hidden = [p for _, p in muon_params(model)]
    rows = row_splits(model)
    taken = {id(p) for p in hidden}
    rest = torch.optim.AdamW(_copies(p for p in model.parameters() if id(p) not in taken), fused=True)
    # What the papers train, and ours: queries, keys, values, gate and up as matrices of their own.
    parts = _copies(part for p in hidden for part in p.split(rows.get(p, (p.shape[0],))))
    measure("torch.optim.Muon, the same matrices, and AdamW", torch.optim.Muon(parts), rest)
    del parts
    clean_up(bench.device)
    measure("torch.optim.Muon, fused matrices whole, and AdamW", torch.optim.Muon(_copies(hidden)), rest)
    clean_up(bench.device)
    measure("fused AdamW", adamw(model))


def _copies(parameters) -> list[nn.Parameter]:
    found = []
    for parameter in parameters:
        found.append(nn.Parameter(parameter.detach().clone()))
        found[-1].grad = torch.randn_like(found[-1]) * 1e-2
    return found
