"""Starts a function in several processes that form a gloo group, for tests of what ranks do together."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock


def start(script: Path, world_size: int, *args: object, local_world_size: int | None = None) -> list[subprocess.Popen]:
    """Starts `python script *args` once per rank, with the environment that torchrun would give it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    local = local_world_size or world_size
    return [
        subprocess.Popen(
            [sys.executable, str(script), *map(str, args)],
            env=os.environ
            | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank % local),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(local),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",  # one GPU cannot serve several ranks
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]


def finish(processes: list[subprocess.Popen], timeout: float = 180) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of every rank; ranks that hang are killed, which is an error."""
    try:
        return [(process.wait(timeout), *process.communicate()) for process in processes]
    finally:
        for process in processes:
            process.kill()


def run(script: Path, world_size: int, *args: object, local_world_size: int | None = None) -> list[str]:
    """What every rank printed; fails with the first rank's error if one fails."""
    results = finish(start(script, world_size, *args, local_world_size=local_world_size))
    for rank, (code, out, err) in enumerate(results):
        assert code == 0, f"rank {rank} ended with {code}\n{out}\n{err}"
    return [out for _, out, _ in results]


def spawn(function: Callable, *args: object, world_size: int = 2) -> None:
    """Calls `function(rank, *args)` in a new process per rank, without a GPU."""
    import torch.multiprocessing

    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):
        torch.multiprocessing.spawn(function, args, nprocs=world_size)
