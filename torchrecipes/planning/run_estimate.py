"""Estimate of a run from its config: parameters, memory of a rank, FLOPs, time and disk."""

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from torchrecipes.config.components import parameters, resolve
from torchrecipes.config.suggest import closest
from torchrecipes.data.batching.loader import largest_micro_batch
from torchrecipes.devices import choose_device, device_name
from torchrecipes.distributed.fsdp import choose_strategy, device_memory
from torchrecipes.errors import UserError
from torchrecipes.models.param_count import active_parameters
from torchrecipes.planning.fake_model import tokenizer_for
from torchrecipes.planning.flops import DEVICES, flops_per_token, peak_flops
from torchrecipes.planning.memory_estimate import StepEstimate, rank_memory
from torchrecipes.training.float8 import RECIPES as FLOAT8
from torchrecipes.training.precision import DTYPES, resolve_dtype

GIB = 2**30
USABLE = 0.9  # of the free memory; the rest is for what an estimate cannot see, such as fragmentation


class Device(NamedTuple):
    """`name` for people, `type` (cuda, mps, cpu), bytes `memory` of a process, `peak` FLOP/s in the run's precision."""

    name: str
    type: str
    memory: int
    peak: float | None


def estimate_run(
    recipe: ModuleType,
    config: Any,
    *,
    device: str | None = None,
    world_size: int = 1,
    per_node: int = 8,
    mfu: float = 0.4,
) -> dict[str, Any]:
    """Estimates a run without its text and without memory for its weights.

    Args:
        recipe: the recipe's module: has `build_model`, `build_collator` and `compute_loss`.
        config: its config, checked.
        device: a name of `DEVICES`, `cpu`, or None for the one of `compute.device`.
        world_size: processes of the run.
        per_node: processes on a machine, at most.
        mfu: share of the device's peak FLOP/s that is reached, for the time.

    Returns:
        JSON values: `parameters` (by part), `memory` (bytes of a rank at the peak of a step, by part, and `total`),
        `micro_batch_size`, `max_micro_batch_size` (None: not one row fits), `flops_per_token`,
        `tokens_per_step`, `steps` (None: unknown before the run, and a note says why), `hours` (None: steps or the
        device's peak are unknown), `checkpoint_bytes`, `kept_bytes`, `notes` (sentences: what was assumed), and what
        it was estimated for.

    Raises:
        UserError: an unknown device, or numbers of processes and rows that do not divide.
    """
    _check_arguments(config, world_size, per_node, mfu)
    here, dtype = _device(device, config.compute, min(world_size, per_node))
    tokenizer = tokenizer_for(config)
    objective = (config, tokenizer, recipe.build_model, recipe.build_collator, recipe.compute_loss)
    trace = StepEstimate(*objective, device_type=here.type, dtype=dtype)
    counts = {name: sum(p.numel() for p in child.parameters()) for name, child in trace.model.named_children()}
    local = min(world_size, per_node)
    strategy = choose_strategy(trace.model, config.compute.strategy, here.memory, world_size, local)

    rank_rows = config.global_batch_size // world_size
    spread = {"strategy": strategy, "world_size": world_size, "local_world_size": local}

    ema = getattr(config, "ema", None)

    def memory_of(rows: int) -> dict[str, int]:
        parts = rank_memory(trace, rows=rows, **spread)
        return parts | {"ema": parts["weights"]} if ema else parts

    divisors = [rows for rows in range(1, rank_rows + 1) if rank_rows % rows == 0]
    largest = last_that_fits(divisors, lambda rows: sum(memory_of(rows).values()) <= USABLE * here.memory)
    asked = config.micro_batch_size
    rows = largest or 1 if asked == "auto" else largest_micro_batch(rank_rows, asked)
    memory = memory_of(rows)

    flops = flops_per_token(*objective)
    steps, tokens = _steps_and_tokens(config)
    checkpoint = 4 * trace.parameters + trace.saved_bytes
    if ema:  # the averages, and the model folder that is exported
        checkpoint += 4 * trace.parameters * (2 if ema.args.get("export", True) else 1)
    kept = config.checkpoint.keep_last + bool(config.checkpoint.keep_best) + 1
    is_known = steps is not None and here.peak is not None
    return {
        "device": here.name,
        "device_bytes": here.memory,
        "world_size": world_size,
        "strategy": strategy,
        "precision": str(dtype).removeprefix("torch."),
        "micro_batch_size": rows,
        "micro_batches": rank_rows // rows,
        "max_micro_batch_size": largest,
        "parameters": {name: count for name, count in counts.items() if count}
        | {"total": trace.parameters, "active": active_parameters(trace.model)},
        "memory": memory | {"total": sum(memory.values())},
        "flops_per_token": flops,
        "tokens_per_step": round(tokens),
        "steps": steps,
        "mfu": mfu,
        "hours": steps * tokens * flops / (mfu * here.peak * world_size) / 3600 if is_known else None,
        "checkpoint_bytes": checkpoint,
        "kept_bytes": kept * checkpoint,
        "notes": _notes(config, tokenizer.vocab_size, steps),
    }


def last_that_fits(divisors: list[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of the ascending `divisors` that fits, or None; if one fits, so do all smaller ones."""
    first, end = 0, len(divisors)
    while first < end:
        middle = (first + end) // 2
        if fits(divisors[middle]):
            first = middle + 1
        else:
            end = middle
    return divisors[first - 1] if first else None


def _check_arguments(config: Any, world_size: int, per_node: int, mfu: float) -> None:
    rows = config.global_batch_size
    if world_size < 1 or per_node < 1:
        key = "--world-size" if world_size < 1 else "--nproc-per-node"
        raise UserError("it must be 1 or more", key=key, code="out_of_range")
    if not 0 < mfu <= 1:
        raise UserError(f"{mfu} is not a share of the device's peak, between 0 and 1", key="--mfu", code="out_of_range")
    if rows % world_size:
        raise UserError(
            f"{world_size} does not divide global_batch_size={rows}",
            key="--world-size",
            hint=f"Use a multiple, such as global_batch_size={-(-rows // world_size) * world_size}, or another number "
            "of processes",
            code="not_divisible",
        )
    if world_size > per_node and world_size % per_node:
        raise UserError(
            f"{world_size} is not a multiple of the {per_node} processes of a machine",
            key="--world-size",
            hint="See --nproc-per-node",
            code="not_divisible",
        )


def _device(name: str | None, compute: Any, processes: int) -> tuple[Device, torch.dtype]:
    """A device by its name, or this machine's, and what it computes in; `processes` share the memory of a CPU."""
    precision = "bf16" if compute.precision in FLOAT8 else compute.precision  # that of activations
    if name in (None, "cpu"):
        here = choose_device(name or compute.device)
        dtype = resolve_dtype(precision, here)
        label = device_name(here) if here.type == "cuda" else here.type
        return Device(label, here.type, device_memory(here, processes), peak_flops(here, dtype)), dtype
    if name not in DEVICES:
        known = [*DEVICES, "cpu"]
        near = closest(name, known)
        hint = f"Did you mean '{near}'?" if near else f"Use one of {', '.join(known)}"
        raise UserError(f"'{name}' is not a known device", key="--device", hint=hint, code="unknown_name")
    _, kind, gib, peaks = DEVICES[name]
    precision = next(iter(peaks)) if precision == "auto" else precision
    memory = int(gib * GIB) // (processes if kind == "cpu" else 1)
    return Device(name, kind, memory, peaks.get(precision)), DTYPES[precision]


def _notes(config: Any, vocab_size: int, steps: int | None) -> list[str]:
    notes = []
    if steps is None and config.epochs is not None:
        notes.append("steps: epochs of a text that is not prepared yet")
    elif steps is None:
        notes.append(f"steps: as many as {config.max_minutes:g} minutes have room for, timed when the run begins")
    accepted = parameters(resolve(config.tokenizer.path)) if config.tokenizer else {}
    if "limit_alphabet" in accepted and "vocab_size" not in accepted:
        notes.append(
            f"counted with {vocab_size:,} ids, the most that tokenizer.limit_alphabet allows; a text of fewer "
            "characters has fewer"
        )
    return notes


def _steps_and_tokens(config: Any) -> tuple[int | None, float]:
    """Optimizer steps (None: minutes, or epochs of a corpus that does not exist yet), and tokens of each."""
    rows, num_rows, tokens_per_row = None, None, config.seq_len  # full rows, where nothing better is known
    corpus_dir = Path(config.data.corpus_dir or Path(config.output_dir) / "corpus")
    try:
        rows, _ = config.data.open(config, corpus_dir)
        tokens_per_row, num_rows = rows.tokens_per_row, rows.num_rows
    except UserError as error:
        if error.code not in ("no_corpus", "unfinished_corpus", "unfinished_stream"):
            raise
    tokens = config.global_batch_size * config.data.computed_tokens(config, rows)
    if config.max_steps is not None:
        return config.max_steps, tokens
    if config.total_tokens is not None:
        return math.ceil(config.total_tokens / (config.global_batch_size * tokens_per_row)), tokens
    if config.epochs is None or num_rows is None:
        return None, tokens
    return math.ceil(config.epochs * num_rows / config.global_batch_size), tokens
