"""Writes files that are either complete or not there, whenever the power fails."""

import os
from collections.abc import Iterable
from pathlib import Path

from torchrecipes.errors import UserError


def write_atomically(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Writes a file under a temporary name in the same folder, syncs it to disk and renames it to `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def check_writable(folder: str | Path, key: str | None = None) -> None:
    """Checks that files can be written into `folder`, or that it can be made, without making it.

    Raises:
        UserError: it cannot (code `not_writable`).
    """
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        problem = f"{place} is not a folder"
    elif not os.access(place, os.W_OK | os.X_OK):
        problem = f"no permission to write into {place}"
    else:
        return
    hint = "Give another folder, or the permission to write there."
    raise UserError(f"{folder} cannot be written: {problem}", key=key, hint=hint, code="not_writable")
