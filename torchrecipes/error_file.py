"""Reports the error that ends one process of several, so that the command line shows it once.

torchrun and `tune-style run --nproc-per-node` give each process a file for its error (TORCHELASTIC_ERROR_FILE). The
launcher reads them all, shows the earliest and ends the other processes. A process of another launcher (srun, mpirun)
has no such file and prints its error itself, after its rank. This module does not import torch, which takes seconds.
"""

import json
import os
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from torchrecipes.atomic_write import write_atomically

# Errors that a process sees when a peer has died: a consequence, never the cause.
_LOST_PEER_TYPES = {"DistBackendError", "DistNetworkError", "DistStoreError"}
_LOST_PEER_TEXTS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "remote process exited",
    "Timed out waiting",
    "Socket Timeout",
    "ncclRemoteError",
    "ncclSystemError",
)


@dataclass(frozen=True)
class RankError:
    """The error that ended a process.

    Attributes:
        text: the message of a user's mistake, the traceback of a bug.
        is_user_error: whether it is a user's mistake.
        lost_peer: whether it only says that another process has died.
        time: seconds since the epoch.
    """

    text: str
    is_user_error: bool
    lost_peer: bool
    time: float


def has_error_file() -> bool:
    """Whether a launcher reads this process' error from a file."""
    return bool(os.environ.get("TORCHELASTIC_ERROR_FILE"))


def report_error(error: BaseException, message: str | None, *, debug: bool = False) -> int:
    """Report the error that ends this process, one of several: in the launcher's file, or else on stderr.

    With a launcher's file it does not return: the process ends here, because the interpreter's shutdown may wait long
    for peers that have gone.

    Args:
        error: the error, being handled.
        message: the message of a user's mistake; None: a bug, reported with its traceback.
        debug: report a mistake with its traceback, too.

    Returns:
        The exit code: 2 for a user's mistake, 1 for a bug.
    """
    code = 1 if message is None else 2
    text = message if message is not None and not debug else traceback.format_exc().rstrip()
    if not has_error_file():
        print(f"[rank {os.environ['RANK']}] {text}", file=sys.stderr)
        return code
    lost_peer = message is None and (
        type(error).__name__ in _LOST_PEER_TYPES or any(part in str(error) for part in _LOST_PEER_TEXTS)
    )
    now = time.time()
    # The layout that torchelastic reads; `torchrecipes` is for our own launcher. torchrun shows the error with the
    # earliest timestamp, in whole seconds, so a consequence gets a later one.
    timestamp = int(now) + 60 * lost_peer
    elastic = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(timestamp)}}
    ours = {"is_user_error": message is not None, "lost_peer": lost_peer, "time": now}
    contents = json.dumps({"message": elastic, "torchrecipes": ours}).encode()
    write_atomically(Path(os.environ["TORCHELASTIC_ERROR_FILE"]), [contents])  # the launcher may read it at any moment
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def hard_exit(code: int) -> NoReturn:
    """End this process, one of several whose work is done, without the interpreter's shutdown.

    That destroys process groups, meshes and sharded models in any order, and now and then a thread of gloo aborts the
    process then, which would look like a failure.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def read(path: str) -> RankError | None:
    """Return the error in a process' error file, or None if there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
        elastic, ours = data["message"], data.get("torchrecipes")
        if ours:
            return RankError(elastic["message"], ours["is_user_error"], ours["lost_peer"], ours["time"])
        # Written by torchelastic's own `record`, which a recipe or a library may use.
        info = elastic["extraInfo"]
        return RankError(info["py_callstack"].rstrip(), False, False, float(info["timestamp"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
