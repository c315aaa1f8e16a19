"""Collectives over numbers and objects of the host, and functions that rank 0 runs for all.

Each also works without a process group, where this process is the only one. They run over gloo, between CPUs: none
waits for a GPU, except that `all_reduce_sum_` queues its work on the tensor's device.
"""

import json
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
    """This process' rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_sum(number: int) -> int:
    """The sum of every rank's number."""
    if world_size() == 1:
        return number
    tensor = torch.tensor(number, dtype=torch.int64)
    dist.all_reduce(tensor)
    return int(tensor)


def all_reduce_max(number: int) -> int:
    """The largest of every rank's numbers."""
    if world_size() == 1:
        return number
    tensor = torch.tensor(number, dtype=torch.int64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def all_reduce_min(number: int) -> int:
    """The smallest of every rank's numbers."""
    return -all_reduce_max(-number)


def all_reduce_sum_(tensor: Tensor) -> Tensor:
    """Sums a tensor over the ranks, in place, on its device, without synchronizing with it. Returns the tensor."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_gather_object(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's value, in the order of ranks, on every rank."""
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def run_on_rank0_and_broadcast(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Rank 0 calls `function`; all ranks return its result, or raise its UserError.

    Args:
        function: returns numbers, strings, lists and dicts of these.
        group: a gloo group of all ranks; None: the default group.
    """
    if world_size() == 1:
        return function()
    answer: list = [None, None]
    if rank() == 0:
        try:
            answer = [function(), None]
        except UserError as error:
            answer = [None, error.to_dict()]
    dist.broadcast_object_list(answer, src=0, group=group, device=torch.device("cpu"))
    if answer[1] is not None:
        raise UserError.from_dict(answer[1])
    return answer[0]


@contextmanager
def rank0_first(name: str) -> Iterator[None]:
    """Rank 0 runs the block before the others do: what it writes is on disk when they begin.

    They wait for days if need be, without the time limit of collectives. If rank 0 fails, they raise its UserError, or
    a lost connection for any other error.

    Args:
        name: a name for the block, unique in the run.
    """
    if world_size() == 1:
        yield
        return
    store, key = dist.distributed_c10d._get_default_store(), f"torchrecipes/{name}"
    if rank() > 0:
        store.wait([key], CORPUS_TIMEOUT)
        failure = json.loads(store.get(key))
        if failure and "bug" in failure:
            raise dist.DistNetworkError(f"rank 0 has ended: {failure['bug']}")
        if failure:
            raise UserError.from_dict(failure)
        yield
        return
    try:
        yield
    except BaseException as error:
        # A bug reaches the others as a lost peer, so that the launcher shows rank 0's own traceback.
        failure = error.to_dict() if isinstance(error, UserError) else {"bug": str(error)}
        store.set(key, json.dumps(failure))
        raise
    store.set(key, json.dumps(None))


def dist_env() -> tuple[int, int, int, int]:
    """Returns (rank, local rank, world size, local world size) from the variables that torchrun and its like set.

    Raises:
        UserError: some of them are set and others are not (code `environment`).
    """
    if "WORLD_SIZE" not in os.environ:
        return 0, 0, 1, 1
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    missing = [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing and os.environ["WORLD_SIZE"] != "1":
        raise UserError(
            f"WORLD_SIZE is set, but {', '.join(missing)} not",
            hint="Start the processes with tune-style run --nproc-per-node N, or with torchrun; for one process unset "
            "WORLD_SIZE",
            code="environment",
        )
    try:
        number, local, size = (int(os.environ.get(name, "0")) for name in names)
        return number, local, size, int(os.environ.get("LOCAL_WORLD_SIZE", size))
    except ValueError as error:
        raise UserError(
            f"RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE must be numbers: {error}", code="environment"
        ) from None
