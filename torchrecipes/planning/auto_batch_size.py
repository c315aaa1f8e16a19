"""`micro_batch_size: auto`: the most rows that fit into the device's memory, by an estimate and one trial."""

import itertools
import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchrecipes.data.batching.loader import rows_per_rank
from torchrecipes.devices import accelerator_in_use, empty_cache, fork_rng, is_out_of_memory
from torchrecipes.distributed.collectives import all_reduce_min, world_size
from torchrecipes.distributed.fsdp import choose_strategy, device_memory
from torchrecipes.errors import UserError
from torchrecipes.planning.memory_estimate import StepEstimate, rank_memory
from torchrecipes.planning.run_estimate import USABLE
from torchrecipes.training.run import Run


def auto_micro_batch_size(
    config: Any,
    tokenizer: Any,
    build_model: Callable,
    build_collator: Callable,
    compute_loss: Callable,
    run: Run,
    model: nn.Module,
) -> int:
    """`config.micro_batch_size`, or for `auto` the largest divisor of the rank's rows that fits into memory.

    It is estimated on tensors without data, then confirmed by one forward and backward pass of the real model, whose
    gradients are cleared. All ranks get the same number. Random number generators and the model's buffers are left as
    they were, so a run that found its number equals a run that was given it, bit for bit.

    Args:
        config: a recipe's config.
        tokenizer: the run's tokenizer.
        build_model, build_collator, compute_loss: the recipe's functions.
        run: says on which device, and among how many processes.
        model: on its device; the optimizer has no state yet.

    Raises:
        UserError: memory runs out with one row, or, with several processes, with the estimated number (code
            `out_of_memory`).
    """
    if config.micro_batch_size != "auto":
        return config.micro_batch_size
    collator = build_collator(config, tokenizer)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def clean_up() -> None:
        model.zero_grad()
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        for module in model.modules():
            if getattr(module, "max_logits", None) is not None:
                module.max_logits.fill_(-math.inf)  # those of made-up tokens must not clip the first step

    def try_step(rows: int) -> None:
        batch = collator.example_batch(rows, config.seq_len).to(run.device)
        with run.autocast():
            loss, _ = compute_loss(model, batch, config)
        loss.backward()

    return find_micro_batch_size(
        _estimated_fit(config, tokenizer, build_model, build_collator, compute_loss, run),
        rows_per_rank=rows_per_rank(config.global_batch_size, run.world_size),
        try_step=try_step,
        clean_up=clean_up,
        agree=all_reduce_min,
    )


def find_micro_batch_size(
    fits: Callable[[int], bool],
    *,
    rows_per_rank: int,
    try_step: Callable[[int], None],
    clean_up: Callable[[], object],
    agree: Callable[[int], int] = lambda number: number,
) -> int:
    """The number of rows per micro-batch: a divisor of `rows_per_rank`, the same on every rank.

    The largest that is estimated to fit is tried; if memory runs out, the next smaller divisor, and so on. Random
    number generators are left as they were.

    With several processes a failed trial is an error that names the number to set: a backward pass that ends halfway
    leaves a sharded model with wrong gradients, and a rank that fails alone leaves the others waiting.

    Args:
        fits: rows -> whether a step with so many is estimated to fit. If none does, 1 is tried: an estimate can be
            wrong.
        rows_per_rank: a rank's rows of an optimizer step.
        try_step: takes a forward and backward pass over so many rows. All ranks call it together.
        clean_up: clears the gradients and whatever else a trial leaves, whether or not memory ran out.
        agree: number -> the smallest of all ranks' numbers (`distributed.collectives.all_reduce_min`).

    Raises:
        UserError: memory runs out with one row, or, with several processes, at all (code `out_of_memory`).
    """
    divisors = [rows for rows in range(rows_per_rank, 0, -1) if rows_per_rank % rows == 0]
    start = agree(next((rows for rows in divisors if fits(rows)), 1))
    candidates = divisors[divisors.index(start) :]
    for rows, smaller in itertools.zip_longest(candidates, candidates[1:]):
        if _runs(try_step, clean_up, rows):
            print(f"micro_batch_size=auto: {rows} of a rank's {rows_per_rank} rows per step", flush=True)
            return rows
        if smaller and world_size() > 1:
            raise UserError(
                f"auto: out of memory with {rows} rows, which were estimated to fit",
                key="micro_batch_size",
                hint=f"Set micro_batch_size={smaller}",
                code="out_of_memory",
            )
        print(f"micro_batch_size=auto: out of memory with {rows} rows", flush=True)
    raise UserError(
        "auto: out of memory with a single row",
        key="micro_batch_size",
        hint="Use compute.activation_checkpointing=selective, or full, a smaller seq_len or model, an optimizer with "
        "less state (torchrecipes.optim.adamw_8bit), or more processes with compute.strategy=fsdp",
        code="out_of_memory",
    )


def free_memory(device: torch.device, processes: int = 1) -> int:
    """Bytes that this process can still allocate: on its GPU, or its part of this machine's memory.

    Args:
        device: of the process. What PyTorch has reserved of a GPU and does not use counts as free; of the memory that
            an Apple GPU shares with the CPU, what Metal recommends to use.
        processes: of this machine, which share its memory in equal parts if the device is the CPU.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    return _free_of_machine() // processes


def _estimated_fit(
    config: Any, tokenizer: Any, build_model: Callable, build_collator: Callable, compute_loss: Callable, run: Run
) -> Callable[[int], bool]:
    """Rows -> whether a step of so many is estimated to fit into the free memory, of which weights are taken."""
    usable = USABLE * free_memory(run.device, run.local_world_size)
    try:
        trace = StepEstimate(
            *(config, tokenizer, build_model, build_collator, compute_loss),
            device_type=run.device.type,
            dtype=run.dtype,
        )
        trace.step(1, accumulate=True)
    except Exception as error:  # whatever a model that reads values raises
        print(f"micro_batch_size=auto: 1, as the model does not run without data ({error})", flush=True)
        return lambda _rows: False
    processes = {"world_size": run.world_size, "local_world_size": run.local_world_size}
    memory = device_memory(run.device, run.local_world_size)
    strategy = choose_strategy(trace.model, config.compute.strategy, memory, **processes)

    def fits(rows: int) -> bool:
        parts = rank_memory(trace, rows, strategy=strategy, **processes)
        return sum(parts.values()) - parts["weights"] - parts["process"] <= usable

    return fits


def _free_of_machine() -> int:
    """What the kernel can give without swapping and, in a container, what its limit leaves."""
    with suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        for limit, used in _LIMITS:
            with suppress(OSError, ValueError):  # no such file, or its number is "max"
                found.append(max(0, int(Path(limit).read_text()) - int(Path(used).read_text())))
        return min(found)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


_LIMITS = (  # of a container: control groups, version 2 and 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def _runs(try_step: Callable[[int], None], clean_up: Callable[[], object], rows: int) -> bool:
    """Whether a step of so many rows finds enough memory."""
    try:
        with fork_rng():
            try_step(rows)
        return True
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    finally:
        clean_up()
    # Outside of the `except`: the error holds the frames of the failed step, and they hold its tensors.
    empty_cache(accelerator_in_use())
    return False
