"""The flags of `run` for more than one process, with torchrun's names."""

import argparse
import os
import socket
import uuid
from dataclasses import dataclass

from torchrecipes.errors import UserError

GRACE_PERIOD = 120  # seconds
_PORT = 29500  # torchrun's


@dataclass(frozen=True)
class Launch:
    """The processes to start, checked.

    Attributes:
        nproc_per_node: processes on this node.
        min_nodes, max_nodes: how many nodes the run may have.
        backend: of the rendezvous: `c10d`, or `static` where each node has a fixed rank.
        endpoint: HOST:PORT of the rendezvous. Port 0: a free one, for a single node.
        run_id: distinguishes runs at one endpoint.
        node_rank: this node's rank, for `static`.
        local_addr: the name under which the other nodes reach this one; None: its host name.
        max_restarts: how often all processes are restarted after one has died.
        grace_period: seconds between SIGTERM and SIGKILL.
    """

    nproc_per_node: int
    min_nodes: int
    max_nodes: int
    backend: str
    endpoint: str
    run_id: str
    node_rank: int | None
    local_addr: str | None
    max_restarts: int
    grace_period: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags. Without any of them the recipe runs in this process."""
    group = parser.add_argument_group(
        "more than one process", "The names are torchrun's. With none of these the recipe runs in this process."
    )
    group.add_argument("--nproc-per-node", metavar="N", help="processes on this node: a number, gpu, cpu or auto (1)")
    group.add_argument("--nnodes", metavar="N", help="nodes, or MIN:MAX (1)")
    group.add_argument("--node-rank", type=int, metavar="N", help="this node's rank, from 0; with --master-addr")
    group.add_argument("--rdzv-endpoint", metavar="HOST:PORT", help="the rendezvous; the same on all nodes")
    group.add_argument("--rdzv-backend", choices=("c10d", "static"), help="kind of rendezvous (c10d)")
    group.add_argument("--rdzv-id", metavar="ID", help="the run's name there; the same on all nodes")
    group.add_argument("--master-addr", metavar="HOST", help="node 0, for --rdzv-backend static")
    group.add_argument("--master-port", type=int, metavar="PORT", help=f"a free port of node 0 ({_PORT})")
    group.add_argument("--local-addr", metavar="HOST", help="this node's name for the others (its host name)")
    group.add_argument("--max-restarts", type=int, metavar="N", help="restarts of all processes after one has died (0)")
    help_grace = f"from SIGTERM, when the processes save, to SIGKILL ({GRACE_PERIOD})"
    group.add_argument("--grace-period", type=float, metavar="SECONDS", help=help_grace)


def asked_for(args: argparse.Namespace) -> bool:
    """Whether any of the flags is given."""
    names = (
        "nproc_per_node nnodes node_rank rdzv_endpoint rdzv_backend rdzv_id master_addr master_port local_addr "
        "max_restarts grace_period"
    )
    return any(getattr(args, name) is not None for name in names.split())


def check(args: argparse.Namespace, *, here: bool = True) -> Launch:
    """Return what the flags ask for.

    Args:
        args: the parsed arguments.
        here: whether to launch on this machine; else its GPUs are not counted, and `nproc_per_node` may be 0.

    Raises:
        UserError: a flag has a wrong value, is missing, or contradicts another one; its key is the flag.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise UserError(
            "this process was started by torchrun or tune-style run",
            hint="Give --nproc-per-node, --nnodes, ... to that command, and none of them to this one.",
            code="nested_launch",
        )
    min_nodes, max_nodes = _nodes(args.nnodes or "1")
    if args.max_restarts is not None and args.max_restarts < 0:
        raise _wrong("--max-restarts", args.max_restarts, "Give 0 or more.")
    if args.grace_period is not None and not 0 <= args.grace_period < float("inf"):
        raise _wrong("--grace-period", args.grace_period, "Give 0 seconds or more.")
    master = args.master_addr is not None or args.master_port is not None
    if args.rdzv_endpoint is not None and master:
        raise UserError(
            "it says the same as --master-addr and --master-port", key="--rdzv-endpoint", hint="Give one of them."
        )
    backend = args.rdzv_backend or ("static" if master or args.node_rank is not None else "c10d")
    run_id = args.rdzv_id or "tune-style"
    local_addr = args.local_addr
    if backend == "static":
        endpoint = _static_endpoint(args, min_nodes, max_nodes)
    elif master or args.node_rank is not None:
        flag = "--node-rank" if args.node_rank is not None else "--master-addr and --master-port"
        raise UserError(
            "c10d numbers the nodes itself and needs only --rdzv-endpoint",
            key="--rdzv-backend",
            hint=f"Leave {flag} out.",
        )
    elif args.rdzv_endpoint is not None:
        endpoint = _endpoint(args.rdzv_endpoint)
    elif max_nodes > 1:
        raise UserError(
            f"{args.nnodes} nodes need --rdzv-endpoint HOST:PORT, the same on every node",
            key="--nnodes",
            hint=f"Give the name and a free port of one node, as in --rdzv-endpoint {socket.gethostname()}:{_PORT}.",
        )
    else:  # this node alone: any free port, no name to look up
        endpoint, run_id, local_addr = "localhost:0", args.rdzv_id or uuid.uuid4().hex, local_addr or "localhost"
    return Launch(
        nproc_per_node=processes(args.nproc_per_node or "1", here),
        min_nodes=min_nodes,
        max_nodes=max_nodes,
        backend=backend,
        endpoint=endpoint,
        run_id=run_id,
        node_rank=(args.node_rank or 0) if backend == "static" else None,
        local_addr=local_addr,
        max_restarts=args.max_restarts or 0,
        grace_period=GRACE_PERIOD if args.grace_period is None else args.grace_period,
    )


def _wrong(flag: str, value: object, hint: str) -> UserError:
    return UserError(f"{value} is not valid", key=flag, hint=hint, code="wrong_value")


def _nodes(text: str) -> tuple[int, int]:
    least, _, most = text.partition(":")
    try:
        nodes = int(least), int(most or least)
    except ValueError:
        nodes = (0, 0)
    if not 1 <= nodes[0] <= nodes[1]:
        raise _wrong("--nnodes", text, "Give a number of nodes, as in --nnodes 2, or MIN:MAX, as in --nnodes 2:4.")
    return nodes


def _endpoint(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        host = text.split(":")[0] or socket.gethostname()
        raise _wrong("--rdzv-endpoint", text, f"Give a host and a port from 1 to 65535, as in {host}:{_PORT}.")
    return text


def _static_endpoint(args: argparse.Namespace, min_nodes: int, max_nodes: int) -> str:
    if min_nodes != max_nodes:
        hint = "Give one number of nodes, or use c10d."
        raise UserError(f"static has a fixed number of nodes, not {args.nnodes}", key="--rdzv-backend", hint=hint)
    if max_nodes > 1 and args.node_rank is None:
        last = max_nodes - 1
        raise UserError(
            f"it is missing: with --master-addr each node has its rank, 0 to {last}",
            key="--node-rank",
            hint="Or leave --master-addr and --master-port out and give all nodes the same --rdzv-endpoint HOST:PORT.",
        )
    if args.node_rank is not None and not 0 <= args.node_rank < max_nodes:
        raise _wrong("--node-rank", args.node_rank, f"With --nnodes {max_nodes} it goes from 0 to {max_nodes - 1}.")
    if args.rdzv_endpoint is not None:
        return _endpoint(args.rdzv_endpoint)
    if max_nodes > 1 and args.master_addr is None:
        hint = f"Give the name of node 0, the same on all {max_nodes} nodes."
        raise UserError("it is missing", key="--master-addr", hint=hint)
    port = _PORT if args.master_port is None else args.master_port
    if not 0 < port < 2**16:
        raise _wrong("--master-port", port, "Give a port from 1 to 65535.")
    return f"{args.master_addr or 'localhost'}:{port}"


def processes(text: str, here: bool) -> int:
    """Return the number of processes of `--nproc-per-node`; 0 for a name, such as gpu, unless it is for here."""
    if text.isdecimal() and int(text) > 0:
        return int(text)
    if text not in ("gpu", "cpu", "auto"):
        raise _wrong("--nproc-per-node", text, "Give a number from 1, or gpu, cpu or auto (a process per GPU or core).")
    if not here:
        return 0
    import torch

    gpus = torch.cuda.device_count() if text != "cpu" and torch.cuda.is_available() else 0
    if text == "gpu" and not gpus:
        raise UserError(
            "torch finds no GPU on this machine", key="--nproc-per-node", hint="Give a number, or cpu.", code="no_gpu"
        )
    return gpus or cores()


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
