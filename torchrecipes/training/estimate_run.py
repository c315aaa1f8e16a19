"""The estimate of a whole run from its config: parameters, memory per rank, arithmetic, time and disk."""

import math
import os
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchrecipes.config import build
from torchrecipes.config.suggest import did_you_mean
from torchrecipes.data.corpus import open_corpus
from torchrecipes.data.loader import largest_micro_batch
from torchrecipes.errors import UserError
from torchrecipes.losses import masked_lm_loss
from torchrecipes.models.hub import hf_network
from torchrecipes.training.estimate import Step, on_rank, trace_step
from torchrecipes.training.flops import DEVICES, PEAKS, mlm_flops_per_token, peak_flops
from torchrecipes.training.memory import checkpoint_activations
from torchrecipes.training.parallel import BYTES_PER_PARAMETER, SHARE_FOR_DDP
from torchrecipes.training.precision import autocast, choose_precision

GIB = 2**30
CUDA_CONTEXT = GIB  # what a process has on a GPU before its first tensor, and what its allocator cannot use
FIT = 0.9  # of the memory may be estimated: more is too close


def estimate_run(
    config: Any, *, device: str | None = None, world_size: int = 1, per_node: int = 8, mfu: float = 0.4
) -> dict[str, Any]:
    """Estimates a run of masked language modelling.

    Args:
        config: a recipe's config, checked.
        device: a name of `DEVICES`, `cpu`, or None for this machine's.
        world_size: processes in all.
        per_node: processes on a machine, at most.
        mfu: share of the device's peak that is reached, for the time.

    Returns:
        JSON values: `parameters` (by part), `memory` (bytes on a rank, by part, and `total`), `flops_per_token`,
        `tokens_per_step`, `steps`, `hours`, `checkpoint_bytes`, ...

    Raises:
        UserError: an unknown device; more than the processes can share.
    """
    kind, memory, peak = _device(device)
    if world_size < 1 or config.rows_per_step % world_size:
        raise UserError(
            f"--world-size {world_size} does not divide rows_per_step={config.rows_per_step}: take another one of "
            "the two."
        )
    share = config.rows_per_step // world_size
    dtype = _dtype(config.precision, kind)
    with torch.device("meta"):
        network = _network(config)
    parameters = {
        name: sum(p.numel() for p in child.parameters())
        for name, child in network.named_children()
        if any(True for _ in child.parameters())
    }
    total = sum(parameters.values())
    strategy, shards = _shards(config.parallel.strategy, total, memory, world_size, per_node)

    def on_a_rank(rows: int) -> dict[str, int]:
        step = _trace(config, rows, share // rows, kind, dtype)
        step = on_rank(step, shards=shards, half=dtype == torch.bfloat16, micro_batches=share // rows)
        found = {name: getattr(step, name) for name in ("weights", "optimizer", "gradients", "activations", "loss")}
        if kind == "cpu":
            if config.data.packing and rows:  # who sees whom, for all layers
                found["activations"] += rows * config.seq_len**2 * dtype.itemsize
            if config.async_save:
                found["checkpoint copy"] = 4 * total // shards + step.optimizer
        found["process"] = _process(kind)
        return found

    largest = _largest(on_a_rank, share, FIT * memory)
    asked = config.rows_per_micro_batch
    rows = largest_micro_batch(share, asked) if asked != "auto" else largest or 1
    parts = on_a_rank(rows)
    flops = mlm_flops_per_token(network, config.seq_len, config.data.mlm_probability)
    tokens = config.rows_per_step * config.seq_len
    steps = _steps(config, tokens)
    state = parts["optimizer"] * shards
    return {
        "parameters": parameters | {"total": total, "active": total},
        "device": device or kind,
        "device_memory": memory,
        "world_size": world_size,
        "strategy": strategy,
        "precision": str(dtype).removeprefix("torch."),
        "rows_per_micro_batch": rows,
        "micro_batches": share // rows,
        "largest_rows_per_micro_batch": largest,
        "memory": parts | {"total": sum(parts.values())},
        "flops_per_token": flops,
        "tokens_per_step": tokens,
        "steps": steps,
        "mfu": mfu,
        "hours": steps * tokens * flops / (mfu * peak * world_size) / 3600 if steps and peak else None,
        "checkpoint_bytes": 4 * total + state,
        "kept_bytes": (config.keep_last + 1) * (4 * total + state),
    }


def as_text(found: dict[str, Any]) -> str:
    """The estimate as a table to read."""
    parameters, memory = dict(found["parameters"]), dict(found["memory"])
    total, _ = parameters.pop("total"), parameters.pop("active")
    lines = [f"parameters        {total:>15,}  " + ", ".join(f"{name} {n:,}" for name, n in parameters.items())]
    where = f"{found['world_size']} x {found['device']}, {found['strategy']}, {found['precision']}"
    lines += ["", f"memory per rank   {where}, {found['rows_per_micro_batch']} rows x {found['micro_batches']}"]
    peak = memory.pop("total")
    lines += [f"  {name:<16}{size / GIB:>10.2f} GiB" for name, size in memory.items()]
    of = f"  of {found['device_memory'] / GIB:.0f}" if found["device_memory"] else ""
    lines += [f"  {'total':<16}{peak / GIB:>10.2f} GiB{of}"]
    largest = found["largest_rows_per_micro_batch"]
    if largest:
        lines += [f"  largest rows_per_micro_batch that fits: {largest}"]
    elif found["device_memory"]:
        lines += ["  not even one row fits: use more processes with parallel.strategy=fsdp, or less seq_len"]
    steps = f"{found['steps']:,}" if found["steps"] else "as many as the corpus gives, which is not made yet"
    lines += ["", f"work              {found['flops_per_token'] / 1e9:.3f} GFLOP per token, "]
    lines[-1] += f"{found['tokens_per_step']:,} tokens per step, steps: {steps}"
    if found["hours"] is not None:
        lines += [f"time              {_hours(found['hours'])} at an MFU of {found['mfu']:.0%} (--mfu)"]
    disk = f"{found['checkpoint_bytes'] / GIB:.2f} GiB per checkpoint, {found['kept_bytes'] / GIB:.2f} GiB in all"
    lines += [f"disk              {disk}, while one is written"]
    return "\n".join(lines)


def process_bytes() -> int:
    """What this process takes of the machine's memory at the moment."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _device(name: str | None) -> tuple[str, int | None, float | None]:
    """(cuda or cpu, bytes, peak FLOP/s) of a device by its name, or of this machine's."""
    if name is None and torch.cuda.is_available():
        here = torch.device("cuda")
        return "cuda", torch.cuda.get_device_properties(here).total_memory, peak_flops(here, torch.bfloat16)
    if name in (None, "cpu"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        here = torch.device("cpu")
        return "cpu", memory, peak_flops(here, choose_precision("auto", here))
    if name not in DEVICES:
        raise UserError(f"--device {name} is not known: {did_you_mean(name, [*DEVICES, 'cpu'], 'there are')}")
    full, gib = DEVICES[name]
    return "cuda", gib * GIB, PEAKS[full]


def _dtype(precision: str, kind: str) -> torch.dtype:
    if precision == "auto" and kind == "cuda":
        return torch.bfloat16
    if precision.startswith("float8"):
        return torch.bfloat16
    return choose_precision(precision, torch.device("cpu"))


def _network(config: Any) -> nn.Module:
    if config.init_from:
        return hf_network(config.init_from)
    return build(config.model, vocab_size=_vocab_size(config), seed=config.seed)


def _vocab_size(config: Any) -> int:
    """That of a tokenizer to be trained, rounded up as it will be; a ready one is loaded."""
    args = config.tokenizer.args
    if "vocab_size" in args or config.tokenizer.path.rpartition(".")[2].startswith("train_"):
        from torchrecipes.config.component import parameters, resolve

        defaults = {name: p.default for name, p in parameters(resolve(config.tokenizer.path)).items()}
        size, multiple = (args.get(key, defaults.get(key)) for key in ("vocab_size", "vocab_multiple"))
        return -(-size // (multiple or 1)) * (multiple or 1)
    return build(config.tokenizer).vocab_size


def _shards(strategy: str, total: int, memory: int | None, world_size: int, per_node: int) -> tuple[str, int]:
    """The strategy, as `parallelize` chooses it, and over how many ranks it splits a weight."""
    nodes = -(-world_size // per_node)
    if world_size == 1:
        return "none", 1
    if strategy == "auto":
        small = memory is not None and BYTES_PER_PARAMETER * total < SHARE_FOR_DDP * memory
        strategy = "ddp" if small else "hsdp" if nodes > 1 else "fsdp"
    return strategy, {"ddp": 1, "fsdp": world_size, "hsdp": min(world_size, per_node)}[strategy]


def _trace(config: Any, rows: int, micro_batches: int, kind: str, dtype: torch.dtype) -> Step:
    targets = rows * math.ceil(config.data.mlm_probability * config.seq_len)

    def build_model() -> nn.Module:
        if config.init_from:
            model = type(hf_network(config.init_from))(hf_network(config.init_from).config)
        else:
            model = _network(config)
        checkpoint_activations(model.blocks, config.activation_checkpointing)
        return model.train()

    def forward(model: nn.Module) -> Tensor:
        return model(torch.zeros(rows, config.seq_len, dtype=torch.long))

    def loss(model: nn.Module, hidden: Tensor) -> Tensor:
        labels = torch.zeros(targets, dtype=torch.long)
        return masked_lm_loss(hidden, model.head, labels, labels, masked_logits_only=config.masked_logits_only)

    return trace_step(
        build_model,
        lambda model: build(config.optimizer, model=model),
        forward,
        loss,
        autocast=partial(autocast, torch.device("cpu"), dtype),
        device=kind,
        micro_batches=micro_batches,
    )


def _process(kind: str) -> int:
    return CUDA_CONTEXT if kind == "cuda" else process_bytes()


def _largest(on_a_rank: Callable[[int], dict[str, int]], share: int, room: float) -> int | None:
    """The largest divisor of a rank's rows whose memory is not more than `room`; memory is a line over the rows."""
    few, more = 1, min(share, 4)
    at_few, at_more = (sum(on_a_rank(rows).values()) for rows in (few, more))
    per_row = (at_more - at_few) / max(1, more - few)
    fitting = [rows for rows in range(1, share + 1) if share % rows == 0 and at_few + per_row * (rows - few) <= room]
    return max(fitting, default=None)


def _steps(config: Any, tokens_per_step: int) -> int | None:
    """Optimizer steps; None: by `epochs` of a corpus that is not made yet."""
    if config.max_steps:
        return config.max_steps
    if config.total_tokens:
        return math.ceil(config.total_tokens / tokens_per_step)
    folder = Path(config.data.corpus_dir or Path(config.output_dir) / "corpus") / "train"
    if not (folder / "corpus.json").exists():
        return None
    rows = -(-open_corpus(folder).num_tokens // config.seq_len)
    return math.ceil(config.epochs * rows / config.rows_per_step)


def _hours(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
