"""Launches the processes of a run on this node and waits until all have ended.

The rendezvous, the ranks and the restarts are those of PyTorch's elastic agent, on which torchrun is built. torchrun
itself (`torch.distributed.run`) does not fit: after a signal it kills the processes within 30 s, whether or not they
have saved a checkpoint (a parameter in newer versions of torch only); it restarts what was preempted; it prints a
report of 30 lines for a misspelt path. The tests that kill ranks, nodes and launchers need the opposite. So this is an
agent of our own, with the four methods that torch documents for one: start, monitor, stop and shut down.

Nodes share a small store, in which they publish a signal or a failure for the others.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from torch.distributed import DistError, TCPStore
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from torchrecipes.error_file import RankError, read
from torchrecipes.errors import UserError

POLL = 0.1  # seconds
POLL_NODES = 1.0  # seconds: over the network, and not urgent
AFTER_FAILURE = 20.0  # seconds from SIGTERM to SIGKILL for the others when one has failed: to finish writing
ROOT_CAUSE_WAIT = 5.0  # seconds to wait for the cause when a process only reports that it lost a peer
RENDEZVOUS_TIMEOUT = 600  # seconds that nodes wait for each other
ENDED_BY_ITSELF = 4  # exit code of a run that its recipe has ended early; it is passed on
_STOPS = (signal.SIGTERM, signal.SIGINT)


@dataclass
class _Worker:
    rank: int
    process: subprocess.Popen
    error_file: str
    killed: bool = False  # by us, with SIGKILL


@dataclass(frozen=True)
class _Failure:
    text: str
    code: int  # what the launcher exits with
    lost_peer: bool = False
    time: float = 0.0


class _Failed(Exception):
    """Ends the agent; the failure has been printed."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def launch(
    command: Sequence[str],
    *,
    nproc_per_node: int,
    min_nodes: int,
    max_nodes: int,
    backend: str,
    endpoint: str,
    run_id: str,
    node_rank: int | None,
    local_addr: str | None,
    max_restarts: int,
    grace_period: float,
    environment: dict[str, str],
) -> int:
    """Run `command` in `nproc_per_node` processes on this node, as ranks of one run over all nodes.

    SIGTERM and SIGINT are forwarded to every process once; SIGHUP as SIGTERM. The first process that fails ends all the
    others. Call it from the main thread.

    Args:
        command: a program and its arguments.
        nproc_per_node, min_nodes, max_nodes, backend, endpoint, run_id, node_rank, local_addr, max_restarts: as
            torchrun's flags.
        grace_period: seconds from a signal to SIGKILL.
        environment: the environment of the processes, without their ranks.

    Returns:
        The exit code: 0; 2 for a user's mistake and 1 for a bug or a killed process, both reported on stderr; 4 if all
        processes ended with it; 128 + the signal's number.

    Raises:
        UserError: the rendezvous failed (code `rendezvous`).
    """
    configs = (
        {"rank": node_rank}
        if backend == "static"
        else {"read_timeout": RENDEZVOUS_TIMEOUT, "join_timeout": RENDEZVOUS_TIMEOUT}
    )
    if "LOGLEVEL" not in os.environ:  # set by users who want to see the log of torch's agent
        elastic = logging.getLogger("torch.distributed.elastic")
        elastic.propagate = False
        elastic.addHandler(logging.NullHandler())
    where = f"{max_nodes} nodes at {endpoint}" if max_nodes > 1 else endpoint
    if max_nodes > 1:
        print(f"rendezvous of {where} ...", file=sys.stderr)
    agent = None
    # During the rendezvous signals have their default action: Python would handle them only after the wait.
    before = {number: signal.getsignal(number) for number in (*_STOPS, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        parameters = RendezvousParameters(
            backend, endpoint, run_id, min_nodes, max_nodes, local_addr, timeout=RENDEZVOUS_TIMEOUT, **configs
        )
        handler = get_rendezvous_handler(parameters)
        host, _, port = endpoint.rpartition(":")
        spec = WorkerSpec(
            role="default",
            local_world_size=nproc_per_node,
            rdzv_handler=handler,
            entrypoint=command[0],
            args=tuple(command[1:]),
            max_restarts=max_restarts,
            master_addr=host if backend == "static" else None,
            master_port=int(port) if backend == "static" else None,
        )
        with tempfile.TemporaryDirectory(prefix="torchrecipes-") as folder:
            agent = _Agent(spec, environment, Path(folder), grace_period)
            try:
                agent.run()
                code = 0
            except SignalException:
                code = agent.code_after_signal()
            except _Failed as failed:
                code = failed.code
            agent.leave()
    except (RendezvousError, DistError) as error:
        if agent is None or not agent.met:
            raise _rendezvous_error(error, where) from error
        print("ended: the node that holds the rendezvous has gone. Its own message says why.", file=sys.stderr)
        return 1
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)
    if agent.preempted is None:  # else other nodes may still use it
        with contextlib.suppress(Exception):
            handler.shutdown()
    return code


def _rendezvous_error(error: Exception, where: str) -> UserError:
    detail = str(error.__cause__ or error).split("\n", 1)[0]
    return UserError(
        f"the rendezvous of {where} failed: {type(error).__name__}: {detail}",
        hint=f"Start the command on every node within {RENDEZVOUS_TIMEOUT // 60} minutes, with the same --nnodes, "
        "--rdzv-endpoint and --rdzv-id, and a port that is free on the endpoint's host and open between the nodes.",
        code="rendezvous",
    )


class _Agent(SimpleElasticAgent):
    """The processes of one node."""

    def __init__(self, spec: WorkerSpec, environment: dict[str, str], folder: Path, grace_period: float) -> None:
        super().__init__(spec)
        self.preempted: int | None = None  # the signal that ends this run
        self.met = False
        self._environment = environment
        self._folder = folder
        self._grace_period = grace_period
        self._workers: list[_Worker] = []
        self._signals: list[int] = []  # as they came
        self._starts = 0
        self._status_store: TCPStore | None = None  # shared by the nodes for one start; the ranks use it, too
        self._nodes = 1
        self._next_look = 0.0

    def _catch_signals(self) -> None:
        """Collect signals in `_signals` from now on."""
        for number in (*_STOPS, signal.SIGHUP):
            if number in _STOPS or signal.getsignal(number) != signal.SIG_IGN:  # ignored: nohup, and the run continues
                signal.signal(number, lambda received, _frame: self._signals.append(received))

    def _die_of_signals(self) -> None:
        """Give signals their default action again, while there are no processes."""
        for number in _STOPS:
            signal.signal(number, signal.SIG_DFL)

    # Called by torch's agent

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, int]:
        self._catch_signals()
        self._starts += 1
        self._nodes = worker_group.group_world_size
        host, port = self._open_status_store(worker_group)
        self.met = True
        self._workers = []
        for worker in worker_group.workers:
            error_file = str(self._folder / f"{self._starts}-{worker.global_rank}.json")
            environment = {
                **self._environment,
                "RANK": str(worker.global_rank),
                "LOCAL_RANK": str(worker.local_rank),
                "GROUP_RANK": str(worker_group.group_rank),
                "ROLE_RANK": str(worker.role_rank),
                "ROLE_NAME": worker_group.spec.role,
                "WORLD_SIZE": str(worker.world_size),
                "LOCAL_WORLD_SIZE": str(worker_group.spec.local_world_size),
                "GROUP_WORLD_SIZE": str(worker_group.group_world_size),
                "ROLE_WORLD_SIZE": str(worker.role_world_size),
                "MASTER_ADDR": host,
                "MASTER_PORT": str(port),
                "TORCHELASTIC_RUN_ID": worker_group.spec.rdzv_handler.get_run_id(),
                "TORCHELASTIC_RESTART_COUNT": str(self._starts - 1),
                "TORCHELASTIC_MAX_RESTARTS": str(worker_group.spec.max_restarts),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_ERROR_FILE": error_file,
            }
            process = subprocess.Popen(
                [worker_group.spec.entrypoint, *worker_group.spec.args],
                env=environment,
                stdin=subprocess.DEVNULL,  # eight processes cannot share a keyboard
                start_new_session=True,  # Ctrl+C on the terminal reaches the launcher alone, which forwards it once
            )
            self._workers.append(_Worker(worker.global_rank, process, error_file))
        return {local_rank: worker.process.pid for local_rank, worker in enumerate(self._workers)}

    def _open_status_store(self, worker_group: WorkerGroup) -> tuple[str, int]:
        # A new store for every start: keys that an earlier one left would lead the new processes to dead addresses.
        host = worker_group.master_addr
        if worker_group.group_rank == 0:
            store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        static = worker_group.spec.rdzv_handler.get_backend() == "static"
        key = f"torchrecipes/port/{self._starts if static else ''}"  # static: all starts share the rendezvous' store
        if worker_group.group_rank == 0:
            worker_group.store.set(key, str(store.port))
        else:
            port = int(worker_group.store.get(key))
            store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))
        self._status_store = store
        return host, store.port

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if self._signals:
            self._preempt(self._signals[0])
        self._handle(self._poll())
        if all(worker.process.poll() == 0 for worker in self._workers):
            self._die_of_signals()
            return RunResult(WorkerState.SUCCEEDED, return_values={worker.rank: None for worker in self._workers})
        if all(worker.process.poll() == ENDED_BY_ITSELF for worker in self._workers):
            self._die_of_signals()
            raise _Failed(ENDED_BY_ITSELF)
        self._handle_preempted_workers()
        cause = self._cause()
        if cause is None:
            return RunResult(WorkerState.HEALTHY)
        if cause.lost_peer:
            self._handle_preempted_workers()
            news = self._poll(at_once=True)
            self._handle(news)
            if "restart" in news and self._remaining_restarts:
                print(f"restarting all processes: {news['restart']}", file=sys.stderr)
                return RunResult(WorkerState.FAILED)

        print(cause.text, file=sys.stderr)
        brief = f"{cause.text.splitlines()[0]} (on {socket.gethostname()})"
        if self._remaining_restarts and cause.code != 2:  # a user's mistake would only repeat
            number = worker_group.spec.max_restarts - self._remaining_restarts + 1
            print(f"restarting all processes ({number} of {worker_group.spec.max_restarts})", file=sys.stderr)
            self._publish("restart", brief)
            return RunResult(WorkerState.FAILED)
        self._publish("failure", {"text": brief, "code": cause.code})
        self._end(signal.SIGTERM, AFTER_FAILURE)
        raise _Failed(cause.code)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:  # noqa: ARG002
        self._end(signal.SIGTERM, AFTER_FAILURE)
        if self._signals:
            self._preempt(self._signals[0])
        self._die_of_signals()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:  # noqa: ARG002
        # Newer versions of torch pass a timeout; ours holds for all.
        self._end(death_sig, AFTER_FAILURE if self.preempted is None else self._grace_period)

    # How processes end

    def _preempt(self, number: int) -> None:
        self.preempted = number
        self._publish("signal", number)
        raise SignalException("", signal.Signals(number))

    def _handle_preempted_workers(self) -> None:
        for worker in self._workers:
            if number := _stop_signal(worker.process.poll()):  # sent to one process, past us
                self._preempt(number)

    def _handle(self, news: dict) -> None:
        if "signal" in news:
            self._preempt(news["signal"])
        if "failure" in news:
            print(f"ended: {news['failure']['text']}", file=sys.stderr)
            self._end(signal.SIGTERM, AFTER_FAILURE)
            raise _Failed(news["failure"]["code"])

    def _end(self, number: int, seconds: float) -> None:
        """Send the signal to all processes, and SIGKILL to those that are left after so many seconds."""
        forwarded = len(self._signals)
        number = number if number in _STOPS else signal.SIGTERM  # the signals that a run handles
        self._send(number)
        deadline = time.monotonic() + seconds
        while any(worker.process.poll() is None for worker in self._workers) and time.monotonic() < deadline:
            time.sleep(POLL / 2)
            new, forwarded = self._signals[forwarded:], len(self._signals)
            if signal.SIGINT in new:  # a second Ctrl+C asks them to end at once, a third kills them
                if self._signals.count(signal.SIGINT) > 2:
                    break
                self._send(signal.SIGINT)
        for worker in self._workers:
            if worker.process.poll() is None:
                worker.killed = True
                with contextlib.suppress(ProcessLookupError):  # the session: child processes, too
                    os.killpg(worker.process.pid, signal.SIGKILL)
        for worker in self._workers:
            with contextlib.suppress(subprocess.TimeoutExpired):  # in the kernel, waiting for a device
                worker.process.wait(10)

    def _send(self, number: int) -> None:
        for worker in self._workers:
            if worker.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    worker.process.send_signal(number)

    def _cause(self) -> _Failure | None:
        """Return the failure that came first, or None while there is none."""
        first_seen, failures = None, {}
        while True:
            for worker in self._workers:
                if worker.rank not in failures and (failure := _failure(worker)):
                    failures[worker.rank] = failure
            ended = {worker.rank for worker in self._workers if worker.process.poll() is not None}
            now = time.monotonic()
            if not failures:
                return None
            first_seen = first_seen or now
            best = min(failures.values(), key=lambda failure: (failure.lost_peer, failure.time))
            waited = now - first_seen
            if not best.lost_peer and (ended & failures.keys() or waited > ROOT_CAUSE_WAIT):
                return best
            # A peer was lost, but which one? A process may need a moment to die, or it is on another node.
            alone = self._nodes == 1 and len(ended) == len(self._workers)
            if alone or waited > ROOT_CAUSE_WAIT or self._signals or self._poll():
                return best
            time.sleep(POLL)

    def code_after_signal(self) -> int:
        """Return the exit code of a run that a signal ended; report what failed on the way."""
        codes = [worker.process.poll() for worker in self._workers]
        for worker in self._workers:
            failure = _failure(worker)
            if worker.killed:
                print(
                    f"rank {worker.rank} was still running {self._grace_period:g} s after the signal and was killed: "
                    "its work since the last checkpoint is lost. Give it more time with --grace-period.",
                    file=sys.stderr,
                )
            elif failure and not failure.lost_peer:
                print(failure.text, file=sys.stderr)
                return failure.code
        if codes and all(code == 0 for code in codes):  # the signal came in the last step
            return 0
        return 128 + self.preempted

    # Nodes

    def _publish(self, key: str, value: object) -> None:
        if self._nodes > 1 and self._status_store is not None:
            with contextlib.suppress(Exception):  # the node that holds the store has gone: its own message says why
                if not self._status_store.check([key]):
                    self._status_store.set(key, json.dumps(value))

    def _poll(self, at_once: bool = False) -> dict:
        if self._nodes == 1 or (time.monotonic() < self._next_look and not at_once):
            return {}
        self._next_look = time.monotonic() + POLL_NODES
        try:
            keys = [key for key in ("signal", "failure", "restart") if self._status_store.check([key])]
            return {key: json.loads(self._status_store.get(key)) for key in keys}
        except Exception:
            return {}

    def leave(self) -> None:
        """Wait until all nodes have called this: the one that holds the store should leave last."""
        if self._nodes == 1 or self._status_store is None:
            return
        seconds = ROOT_CAUSE_WAIT if self.preempted is None else self._grace_period
        deadline = time.monotonic() + seconds
        with contextlib.suppress(Exception):
            left, heard = self._status_store.add("left", 1), len(self._signals)
            while left < self._nodes and time.monotonic() < deadline and len(self._signals) == heard:
                time.sleep(POLL)
                left = self._status_store.add("left", 0)


def _stop_signal(code: int | None) -> int | None:
    """Return the stop signal in a process' exit code, or None."""
    number = 0 if code is None else -code if code < 0 else code - 128
    return number if number in _STOPS else None


def _failure(worker: _Worker) -> _Failure | None:
    """Return the failure of a process, or None if there is none so far."""
    code = worker.process.poll()
    error: RankError | None = read(worker.error_file)
    if error:  # the process may still be running
        text = f"rank {worker.rank}: {error.text}" if error.is_user_error else f"[rank {worker.rank}] {error.text}"
        return _Failure(text, 2 if error.is_user_error else 1, error.lost_peer, error.time)
    if code in (None, 0, ENDED_BY_ITSELF) or _stop_signal(code):
        return None
    if code > 0:
        return _Failure(f"rank {worker.rank} ended with exit code {code} and no message", 1, time=time.time())
    name = signal.Signals(-code).name
    hint = (
        "Out of host memory? `dmesg` shows what the kernel killed; a lower data.num_workers needs less."
        if name == "SIGKILL"
        else "A crash in native code: PYTHONFAULTHANDLER=1 shows where."
    )
    return _Failure(f"rank {worker.rank} was killed ({name}). {hint}", 1, time=time.time())
