"""A lock on a folder that the kernel releases however its process ends.

`filelock`, on which torch depends, is not used: its lock is inherited by forked loader workers, which outlive a process
that is killed, so that a run could not be resumed until they have gone.
"""

import sys
from pathlib import Path

from torchrecipes.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def lock_folder(folder: Path, *, wait: bool = False) -> list:
    """Keeps other processes from writing into `folder` as long as the files in the returned list are open.

    Args:
        folder: must exist.
        wait: wait for another process that holds the lock, and say so on stderr, instead of raising.

    Returns:
        An open file; nothing on a system or file system without locks.

    Raises:
        UserError: another process holds the lock (code `locked`).
    """
    if fcntl is None:
        return []
    file = (folder / ".lock").open("a")
    try:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            if not wait:
                raise UserError(
                    f"another process is writing into {folder}",
                    key="output_dir",
                    hint="Wait for it or stop it, or give another output_dir=...",
                    code="locked",
                ) from None
            print(f"waiting for another process that is writing into {folder}", file=sys.stderr, flush=True)
            fcntl.lockf(file, fcntl.LOCK_EX)
    except OSError:  # a file system without locks
        return []
    return [file]
