"""What the processes of a run tell each other from the host: numbers, flags, and what the first of them found.

All of it works without a process group, too, where this process is all there is. Numbers and objects travel over gloo,
between CPUs: nothing here waits for a GPU.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from torchrecipes.errors import UserError

T = TypeVar("T")
CORPUS_TIMEOUT = timedelta(days=7)  # the longest that ranks wait for rank 0 to tokenize a corpus


def rank() -> int:
    """This process' number among all, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_sum(number: int) -> int:
    """The sum of every rank's number."""
    if world_size() == 1:
        return number
    tensor = torch.tensor(number, dtype=torch.int64)
    dist.all_reduce(tensor)
    return int(tensor)


def all_reduce_max(number: int) -> int:
    """The greatest of every rank's numbers."""
    if world_size() == 1:
        return number
    tensor = torch.tensor(number, dtype=torch.int64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def all_reduce_min(number: int) -> int:
    """The least of every rank's numbers."""
    return -all_reduce_max(-number)


def all_reduce_sum_(tensor: Tensor) -> Tensor:
    """Adds every rank's tensor into each, in place, on its device and without waiting for it. Returns the tensor."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_gather_object(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's value, of JSON-like types, on every rank."""
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def run_on_rank0_and_broadcast(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Rank 0 calls `function`; all return its result, or raise its UserError.

    Args:
        function: what it returns can be sent to other processes: numbers, strings, paths, lists and dicts of these.
        group: a gloo group of all ranks; None: the default group.
    """
    if world_size() == 1:
        return function()
    answer: list = [None, None]
    if rank() == 0:
        try:
            answer = [function(), None]
        except UserError as error:
            answer = [None, str(error)]
    dist.broadcast_object_list(answer, src=0, group=group, device=torch.device("cpu"))
    if answer[1] is not None:
        raise UserError(answer[1])
    return answer[0]


@contextmanager
def rank0_first(what: str) -> Iterator[None]:
    """Rank 0 runs the block; then, when all is on the disk, the others run it.

    They wait for days if need be, without the time limit of collectives. If rank 0 fails, they raise its error.

    Args:
        what: a name for the block, another one for each in a run.
    """
    if world_size() == 1:
        yield
        return
    store, key = dist.distributed_c10d._get_default_store(), f"torchrecipes/{what}"
    if rank() > 0:
        store.wait([key], CORPUS_TIMEOUT)
        kind, _, message = store.get(key).decode().partition(":")
        if kind == "is_user_error":
            raise UserError(message)
        if kind == "bug":  # to be told as a lost peer's, so that rank 0's own error is what is shown
            raise dist.DistNetworkError(f"rank 0 has ended: {message}")
        yield
        return
    try:
        yield
    except BaseException as error:
        kind = "is_user_error" if isinstance(error, UserError) else "bug"
        store.set(key, f"{kind}:{error}")
        raise
    store.set(key, "done")


def dist_env() -> tuple[int, int, int, int]:
    """(rank, local rank, world size, local world size) as torchrun and its like set them; one process without.

    Raises:
        UserError: some are set and others not.
    """
    if "WORLD_SIZE" not in os.environ:
        return 0, 0, 1, 1
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    missing = [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing and os.environ["WORLD_SIZE"] != "1":
        raise UserError(
            f"WORLD_SIZE is set and {', '.join(missing)} not. Start the processes with tune-style run --nproc-per-node "
            "N, or with torchrun; for one process unset WORLD_SIZE."
        )
    try:
        number, local, size = (int(os.environ.get(name, "0")) for name in names)
        return number, local, size, int(os.environ.get("LOCAL_WORLD_SIZE", size))
    except ValueError as error:
        raise UserError(f"RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE are numbers: {error}") from None
