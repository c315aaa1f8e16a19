"""A lock on a folder that the kernel releases however its process ends."""

from pathlib import Path

from torchrecipes.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def lock_folder(folder: Path) -> list:
    """Keeps other processes from writing into `folder` as long as the files in the returned list are open.

    Returns:
        An open file; nothing on a system or file system without locks.

    Raises:
        UserError: another process holds the lock (code `locked`).
    """
    if fcntl is None:
        return []
    file = (folder / ".lock").open("a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(
            f"another process is writing into {folder}",
            key="output_dir",
            hint="Wait for it or stop it, or give another output_dir=...",
            code="locked",
        ) from None
    except OSError:  # a file system without locks
        return []
    return [file]
