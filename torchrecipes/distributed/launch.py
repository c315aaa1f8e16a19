"""Starts the processes of a run on this node and stays with them until all have ended.

PyTorch's elastic agent (what torchrun is made of) does the meeting of the nodes, the numbering of the ranks and the
restarts. Its own way of handling processes, `LocalElasticAgent`, could not be kept: after a signal it waits 30 s, which
is a parameter in newer versions of torch only, it starts again what was preempted, and it prints a report of its own.
So the four methods that torch documents for agents of one's own are written here: start, watch, stop and shut down.

Between nodes, one small store says what all have to know: which of them got a signal, which one failed.
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

from torchrecipes.distributed.error_file import RankError, read
from torchrecipes.errors import UserError

POLL = 0.1  # seconds
POLL_NODES = 1.0  # seconds: over the network, and not urgent
AFTER_FAILURE = 20.0  # seconds that the others have after SIGTERM when one has failed: to finish writing, not to train
ROOT_CAUSE_WAIT = 5.0  # seconds to wait for the cause, when what is known is only that a peer was lost
RENDEZVOUS_TIMEOUT = 600  # seconds that nodes wait for each other
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
    """Ends the agent; everything has been said."""

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

    SIGTERM and SIGINT are passed on to every process once; SIGHUP as SIGTERM. The first process that fails ends all
    the others. Called from the main thread.

    Args:
        command: a program and its arguments.
        nproc_per_node, min_nodes, max_nodes, backend, endpoint, run_id, node_rank, local_addr, max_restarts: as
            torchrun's flags.
        grace_period: seconds that the processes have after a signal until they are killed.
        environment: the environment of the processes, without their numbers.

    Returns:
        The exit code: 0; 2 for a user's mistake and 1 for a bug or a death, told on stderr; 128 + the signal's number.

    Raises:
        UserError: the nodes did not find each other.
    """
    configs = (
        {"rank": node_rank}
        if backend == "static"
        else {"read_timeout": RENDEZVOUS_TIMEOUT, "join_timeout": RENDEZVOUS_TIMEOUT}
    )
    if "LOGLEVEL" not in os.environ:  # torch's wish to see what its agent does; else we say what there is to say
        elastic = logging.getLogger("torch.distributed.elastic")
        elastic.propagate = False
        elastic.addHandler(logging.NullHandler())
    where = f"{max_nodes} nodes at {endpoint}" if max_nodes > 1 else endpoint
    if max_nodes > 1:
        print(f"meeting {where} ...", file=sys.stderr)
    agent = None
    # A node that waits for others is ended by the signal itself: Python would handle it only after the waiting.
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
            raise UserError(_no_meeting(error, where)) from error
        print(
            "ended: another node has gone, and the place where the nodes meet with it. Its own message says why.",
            file=sys.stderr,
        )
        return 1
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)
    if agent.preempted is None:  # else others may still come back to this place
        with contextlib.suppress(Exception):
            handler.shutdown()
    return code


def _no_meeting(error: Exception, where: str) -> str:
    detail = str(error.__cause__ or error).split("\n", 1)[0]
    return (
        f"The nodes did not meet ({where}): {type(error).__name__}: {detail}. Start the command on every node within "
        f"{RENDEZVOUS_TIMEOUT // 60} minutes, with the same --nnodes, --rdzv-endpoint and --rdzv-id, and with a "
        f"port that is free "
        "on the host of the endpoint and open between the nodes."
    )


class _Agent(SimpleElasticAgent):
    """The processes of one node. The four methods with an underscore are those that torch's agent calls."""

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
        self._status_store: TCPStore | None = (
            None  # what nodes tell each other in this start; also the processes' own store
        )
        self._nodes = 1
        self._next_look = 0.0

    def _catch_signals(self) -> None:
        """From here on they are collected in `_signals`."""
        for number in (*_STOPS, signal.SIGHUP):
            if number in _STOPS or signal.getsignal(number) != signal.SIG_IGN:  # ignored: nohup, the run goes on
                signal.signal(number, lambda received, _frame: self._signals.append(received))

    def _die_of_signals(self) -> None:
        """From here on, while no processes are there: see `launch`."""
        for number in _STOPS:
            signal.signal(number, signal.SIG_DFL)

    # What torch's agent calls

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
                start_new_session=True,  # Ctrl+C on the terminal reaches the launcher alone, which passes it on once
            )
            self._workers.append(_Worker(worker.global_rank, process, error_file))
        return {local_rank: worker.process.pid for local_rank, worker in enumerate(self._workers)}

    def _open_status_store(self, worker_group: WorkerGroup) -> tuple[str, int]:
        # One for every start: keys that processes of an earlier one left would lead the new ones to dead addresses.
        host = worker_group.master_addr
        if worker_group.group_rank == 0:
            board = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        static = worker_group.spec.rdzv_handler.get_backend() == "static"
        key = f"torchrecipes/port/{self._starts if static else ''}"  # static: the store of the meeting stays the same
        if worker_group.group_rank == 0:
            worker_group.store.set(key, str(board.port))
        else:
            port = int(worker_group.store.get(key))
            board = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))
        self._status_store = board
        return host, board.port

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if self._signals:
            self._preempt(self._signals[0])
        self._handle(self._poll())
        if all(worker.process.poll() == 0 for worker in self._workers):
            self._die_of_signals()
            return RunResult(WorkerState.SUCCEEDED, return_values={worker.rank: None for worker in self._workers})
        self._handle_preempted_workers()
        cause = self._cause()
        if cause is None:
            return RunResult(WorkerState.HEALTHY)
        if cause.lost_peer:
            self._handle_preempted_workers()
            news = self._poll(at_once=True)
            self._handle(news)
            if "restart" in news and self._remaining_restarts:
                print(f"starting all processes again: {news['restart']}", file=sys.stderr)
                return RunResult(WorkerState.FAILED)

        print(cause.text, file=sys.stderr)
        brief = f"{cause.text.splitlines()[0]} (on {socket.gethostname()})"
        if self._remaining_restarts and cause.code != 2:  # a mistake would be made again
            number = worker_group.spec.max_restarts - self._remaining_restarts + 1
            print(f"starting all processes again ({number} of {worker_group.spec.max_restarts})", file=sys.stderr)
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

    # Ends

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
        """Send the signal to all processes, wait for them, and kill what is left after so many seconds."""
        passed_on = len(self._signals)
        number = number if number in _STOPS else signal.SIGTERM  # what a run listens to
        self._send(number)
        deadline = time.monotonic() + seconds
        while any(worker.process.poll() is None for worker in self._workers) and time.monotonic() < deadline:
            time.sleep(POLL / 2)
            new, passed_on = self._signals[passed_on:], len(self._signals)
            if signal.SIGINT in new:  # Ctrl+C again: at once; and once more: whatever they do
                if self._signals.count(signal.SIGINT) > 2:
                    break
                self._send(signal.SIGINT)
        for worker in self._workers:
            if worker.process.poll() is None:
                worker.killed = True
                with contextlib.suppress(ProcessLookupError):  # the session: also what the process has started
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
        """What ended the first process that failed, or None while none has."""
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
            # Somebody was lost: who? A process may need a moment to die, or it is on another node.
            alone = self._nodes == 1 and len(ended) == len(self._workers)
            if alone or waited > ROOT_CAUSE_WAIT or self._signals or self._poll():
                return best
            time.sleep(POLL)

    def code_after_signal(self) -> int:
        """The exit code of a run that a signal ended; what went wrong on the way is told."""
        codes = [worker.process.poll() for worker in self._workers]
        for worker in self._workers:
            failure = _failure(worker)
            if worker.killed:
                print(
                    f"rank {worker.rank} had not ended {self._grace_period:g} s after the signal and was killed: what "
                    "it did since its last checkpoint is lost. --grace-period gives more time.",
                    file=sys.stderr,
                )
            elif failure and not failure.lost_peer:
                print(failure.text, file=sys.stderr)
                return failure.code
        if codes and all(code == 0 for code in codes):  # it came in the last step
            return 0
        return 128 + self.preempted

    # Nodes

    def _publish(self, key: str, value: object) -> None:
        if self._nodes > 1 and self._status_store is not None:
            with contextlib.suppress(Exception):  # the node that had the store has gone: its own message says why
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
        """Wait until all nodes are here: the one that has the store should go last."""
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
    """The stop signal that a process' exit code tells of, or None."""
    number = 0 if code is None else -code if code < 0 else code - 128
    return number if number in _STOPS else None


def _failure(worker: _Worker) -> _Failure | None:
    """What went wrong in a process, or None if nothing did so far."""
    code = worker.process.poll()
    told: RankError | None = read(worker.error_file)
    if told:  # it may still be on its way out
        text = f"rank {worker.rank}: {told.text}" if told.is_user_error else f"[rank {worker.rank}] {told.text}"
        return _Failure(text, 2 if told.is_user_error else 1, told.lost_peer, told.time)
    if code is None or code == 0 or _stop_signal(code):
        return None
    if code > 0:
        return _Failure(f"rank {worker.rank} ended with exit code {code} and said nothing", 1, time=time.time())
    name = signal.Signals(-code).name
    hint = (
        "Out of memory on the host? `dmesg` names what the kernel killed; fewer data.num_workers need less."
        if name == "SIGKILL"
        else "A crash in native code: PYTHONFAULTHANDLER=1 shows where."
    )
    return _Failure(f"rank {worker.rank} was killed ({name}). {hint}", 1, time=time.time())
