"""`micro_batch_size: auto`: the most rows that fit into the device's memory, by an estimate and one trial."""

import itertools
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from torchrecipes.distributed import collectives
from torchrecipes.errors import UserError

SHARE = 0.9  # of the free memory that a step may take: the rest is for what no estimate sees, such as fragmentation


def find_micro_batch_size(
    fits: Callable[[int], bool],
    *,
    rows_per_rank: int,
    try_step: Callable[[int], None],
    clean_up: Callable[[], object],
    agree: Callable[[int], int] = lambda number: number,
) -> int:
    """The number of rows per micro-batch: a divisor of `rows_per_rank`, the same on every rank.

    The largest that the estimate lets pass is tried; if memory runs out, the next smaller divisor, and so on. The
    generators of random numbers are afterwards where they were: a run that has found its number is, to the last bit, a
    run that was given it.

    With several processes a failed trial is an error, which says what to set: a backward pass that ends halfway leaves
    a sharded model with wrong gradients from then on, and a rank that fails alone leaves the others waiting.

    Args:
        fits: rows -> whether a step with so many is estimated to fit: into `SHARE` of `free_memory`, say. Where not
            even 1 does, 1 is tried: an estimate can be wrong.
        rows_per_rank: a rank's share of the rows of an optimizer step.
        try_step: takes a forward and backward pass over so many rows. All ranks call it together.
        clean_up: throws the gradients away, whether or not memory ran out: `optimizer.zero_grad`.
        agree: number -> the least of all ranks' numbers (`training.collectives.all_reduce_min`).

    Raises:
        UserError: memory runs out with one row, or, with several processes, at all.
    """
    divisors = [rows for rows in range(rows_per_rank, 0, -1) if rows_per_rank % rows == 0]
    start = agree(next((rows for rows in divisors if fits(rows)), 1))
    candidates = divisors[divisors.index(start) :]
    for rows, smaller in itertools.zip_longest(candidates, candidates[1:]):
        if _runs(try_step, clean_up, rows):
            print(f"micro_batch_size=auto: {rows} of a rank's {rows_per_rank} rows per step", flush=True)
            return rows
        said = f"micro_batch_size=auto: memory runs out with {rows}"
        if smaller and collectives.world_size() > 1:
            raise UserError(f"{said}, which was estimated to fit. Set micro_batch_size={smaller}.")
        print(said, flush=True)
    raise UserError(
        "micro_batch_size=auto: memory runs out with a single row. Use activation_checkpointing=selective, or "
        "full, a smaller seq_len or model, an optimizer with less state (torchrecipes.optim.adamw_8bit), or more "
        "processes with parallel.strategy=fsdp."
    )


def free_memory(device: torch.device, processes: int = 1) -> int:
    """Bytes that this process can still take: of its GPU, or its part of this machine's memory.

    Args:
        device: of the process. What PyTorch holds of a GPU and does not use counts as free.
        processes: of this machine, which share its memory in equal parts if the device is the CPU.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return _free_of_machine() // processes


def _free_of_machine() -> int:
    """What the kernel can give without swapping, and, in a container, what its limit leaves."""
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
    cuda = torch.cuda.is_initialized()
    try:
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if cuda else []):
            try_step(rows)
        return True
    except (torch.OutOfMemoryError, MemoryError):
        pass
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
    finally:
        clean_up()
    # Outside of the `except`: the error holds the frames of the failed step, and they hold its tensors.
    if cuda:
        torch.cuda.empty_cache()  # pieces for other sizes would be in the way
    return False
