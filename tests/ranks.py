"""Runs a script in several processes that form a gloo group, for tests of what ranks do together.

The processes are forked from a server that has imported torch and this library, once per test session: a fork takes
milliseconds, Python and torch take seconds.
"""

import atexit
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

SERVER = r"""
import array, atexit, json, os, runpy, socket, sys, traceback, warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch._dynamo, torch.distributed.checkpoint, torch.distributed.fsdp, torch.distributed.tensor
    import torchrecipes.checkpoint, torchrecipes.data.tokenizers.load, torchrecipes.models, torchrecipes.optim
    import torchrecipes.evaluation, torchrecipes.losses, torchrecipes.training

def run(request, fds):
    os.setsid()
    os.dup2(fds[0], 1), os.dup2(fds[1], 2)
    for fd in (*fds, connection.fileno()):
        os.close(fd)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv, sys.path[0] = request["argv"], os.path.dirname(request["argv"][0])
    code = 0
    try:
        runpy.run_path(request["argv"][0], run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)

connection = socket.socket(fileno=int(sys.argv[1]))
while True:
    message, fds, _, _ = socket.recv_fds(connection, 1 << 20, 2)
    if not message:
        os._exit(0)
    request = json.loads(message)
    if "wait" in request:
        answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
    else:
        answer = os.fork()
        if answer == 0:
            run(request, fds)
        for fd in fds:
            os.close(fd)
    connection.sendall(json.dumps(answer).encode())
"""


@cache
def _server() -> socket.socket:
    """The server's end of a connection of packets."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SERVER, str(theirs.fileno())]
    process = subprocess.Popen(
        command, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    theirs.close()
    atexit.register(lambda: (ours.close(), process.wait(10)))
    return ours


class Process:
    """A forked process, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, arguments: list[str], environment: dict[str, str]):
        pipes = [os.pipe() for _ in range(2)]
        request = {"argv": arguments, "env": environment, "cwd": os.getcwd()}
        socket.send_fds(_server(), [json.dumps(request).encode()], [write for _, write in pipes])
        self.pid, self.returncode = json.loads(_server().recv(1 << 10)), None
        self._ended = os.pidfd_open(self.pid)
        for _, write in pipes:
            os.close(write)
        self.stdout, self.stderr = (os.fdopen(read, errors="replace") for read, _ in pipes)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; raises TimeoutError after `timeout` seconds."""
        if self.returncode is None:
            poll = select.poll()
            poll.register(self._ended, select.POLLIN)
            if not poll.poll(timeout and timeout * 1000):
                raise TimeoutError(f"process {self.pid} has not ended after {timeout} s")
            _server().send(json.dumps({"wait": self.pid}).encode())
            self.returncode = json.loads(_server().recv(1 << 10))
            os.close(self._ended)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """The rest of both outputs, once they are closed."""
        deadline = time.monotonic() + (timeout or 1e9)
        parts: dict = {self.stdout: [], self.stderr: []}
        still_open = list(parts)
        while still_open:
            ready, _, _ = select.select(still_open, [], [], max(0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"process {self.pid} has not closed its outputs after {timeout} s")
            for stream in ready:
                if data := os.read(stream.fileno(), 1 << 16):
                    parts[stream].append(data)
                else:
                    still_open.remove(stream)
        return tuple(b"".join(part).decode(errors="replace") for part in parts.values())

    def send_signal(self, number: int) -> None:
        """Sends a signal unless the process has ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kills the process and what it has started."""
        if self.returncode is None:
            os.killpg(self.pid, signal.SIGKILL)


def start(script: Path, world_size: int, *args: object, local_world_size: int | None = None) -> list[Process]:
    """Starts `python script *args` once per rank, with the environment that torchrun would give it."""
    if not hasattr(os, "pidfd_open"):
        pytest.skip("needs Linux")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    local = local_world_size or world_size
    return [
        Process(
            [str(script), *map(str, args)],
            os.environ
            | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank % local),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(local),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            },
        )
        for rank in range(world_size)
    ]


def finish(processes: list[Process], timeout: float = 180) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of every rank; ranks that hang are killed, which is an error."""
    try:
        outputs = [process.communicate(timeout) for process in processes]
        return [(process.wait(timeout), *output) for process, output in zip(processes, outputs, strict=True)]
    finally:
        for process in processes:
            process.kill()


def run(script: Path, world_size: int, *args: object, local_world_size: int | None = None) -> list[str]:
    """What every rank printed; fails with the first rank's error if one fails."""
    results = finish(start(script, world_size, *args, local_world_size=local_world_size))
    for rank, (code, out, err) in enumerate(results):
        assert code == 0, f"rank {rank} ended with {code}\n{out}\n{err}"
    return [out for _, out, _ in results]


def call(function: Callable, *args: object, world_size: int = 2) -> list[Any]:
    """What `function(*args)`, of a test module, returns on every rank; arguments and results are JSON values."""
    outputs = run(Path(__file__), world_size, function.__module__, function.__name__, json.dumps(args))
    return [json.loads(out.splitlines()[-1]) for out in outputs]


if __name__ == "__main__":
    import torch.distributed as dist

    sys.path.insert(0, str(Path(__file__).parents[1]))
    dist.init_process_group("gloo")
    result = getattr(importlib.import_module(sys.argv[1]), sys.argv[2])(*json.loads(sys.argv[3]))
    print(json.dumps(result), flush=True)
    dist.barrier()
    os._exit(0)  # gloo's threads sometimes abort a process whose interpreter is being torn down
