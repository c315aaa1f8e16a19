"""How one process of many tells why it ended, so that the command line tells it once.

torchrun and `tune-style run --nproc-per-node` give each process a file for its error (TORCHELASTIC_ERROR_FILE). The
launcher reads them all, shows the earliest and ends the others. A process of another launcher (srun, mpirun, ...)
has no such file and prints its error itself, with its rank before it.
"""

import json
import os
import sys
import time
import traceback
from dataclasses import dataclass
from typing import NoReturn

# What a process is told by its network when another one died: a consequence, never the cause.
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
    """What ended a process.

    Attributes:
        text: one message for a user's is_user_error, a traceback for a bug.
        is_user_error: whether it is a user's is_user_error.
        lost_peer: whether it is what a process sees when another one died.
        time: when it happened, in seconds since 1970.
    """

    text: str
    is_user_error: bool
    lost_peer: bool
    time: float


def tells_launcher() -> bool:
    """Whether a launcher reads this process' error from a file."""
    return bool(os.environ.get("TORCHELASTIC_ERROR_FILE"))


def tell(error: BaseException, message: str | None, *, debug: bool = False) -> int:
    """Tell the error that ends this process, one of several: to the launcher's file, or else on stderr.

    With a launcher's file it does not return: the process ends here, because Python's own end may wait long for a
    network whose other ends have gone.

    Args:
        error: the error, being handled.
        message: what to say if it is a user's mistake; None: it is a bug, told with its traceback.
        debug: a mistake is told with its traceback, too.

    Returns:
        The exit code: 2 for a is_user_error, 1 for a bug.
    """
    code = 1 if message is None else 2
    text = message if message is not None and not debug else traceback.format_exc().rstrip()
    if not tells_launcher():
        print(f"[rank {os.environ['RANK']}] {text}", file=sys.stderr)
        return code
    lost_peer = message is None and (
        type(error).__name__ in _LOST_PEER_TYPES or any(part in str(error) for part in _LOST_PEER_TEXTS)
    )
    now = time.time()
    # The shape that torchelastic reads, `torchrecipes` is for our own launcher. torchrun shows the error with the
    # earliest timestamp, in whole seconds: what is a consequence has to come later.
    timestamp = int(now) + 60 * lost_peer
    said = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(timestamp)}}
    ours = {"is_user_error": message is not None, "lost_peer": lost_peer, "time": now}
    path = os.environ["TORCHELASTIC_ERROR_FILE"]
    with open(f"{path}.part", "w", encoding="utf-8") as file:
        json.dump({"message": said, "torchrecipes": ours}, file)
    os.replace(f"{path}.part", path)  # the launcher may read it at any moment
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def hard_exit(code: int) -> NoReturn:
    """End this process, one of several whose work is done, at once.

    Python's own end takes apart process groups, meshes and sharded models in any order, and now and then a thread of
    gloo aborts the process then, which would pass for a failure.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def read(path: str) -> RankError | None:
    """Return what a process told in its error file, or None if it told nothing."""
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
        said, ours = data["message"], data.get("torchrecipes")
        if ours:
            return RankError(said["message"], ours["is_user_error"], ours["lost_peer"], ours["time"])
        # Written by torchelastic's own `record`, which a recipe may use, or by a library under it.
        info = said["extraInfo"]
        return RankError(info["py_callstack"].rstrip(), False, False, float(info["timestamp"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
