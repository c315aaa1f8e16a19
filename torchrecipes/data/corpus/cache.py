"""The cache of streams: where it is, what is in it, and what may be removed."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from torchrecipes.data.corpus.shards import open_shard
from torchrecipes.file_lock import fcntl

VARIABLE = "TORCHRECIPES_CACHE"
USED_FILE = ".used"  # locked by those who read; its time is that of the last use


@dataclass(frozen=True)
class CacheEntry:
    """A folder of the cache.

    Attributes:
        key: its name.
        source: name of the source.
        num_bytes: size on disk.
        num_tokens: tokens of the training text.
        finished: the source has been read to its end.
        last_used: seconds since 1970.
        in_use: a run reads it, or a process writes it.
    """

    key: str
    source: str
    num_bytes: int
    num_tokens: int
    finished: bool
    last_used: float
    in_use: bool


def default_cache_dir() -> Path:
    """The folder that the variable TORCHRECIPES_CACHE names, or ~/.cache/torchrecipes."""
    return Path(os.environ.get(VARIABLE) or Path.home() / ".cache" / "torchrecipes")


def use_folder(folder: Path) -> int:
    """Keeps `remove_entry` from removing `folder` until the returned file descriptor is closed."""
    try:
        file = os.open(folder / USED_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        os.utime(folder / USED_FILE)
    except OSError:  # someone else's, which may be read only
        return os.open(folder, os.O_RDONLY)
    if fcntl is not None:
        with suppress(OSError):  # a file system without locks, or it is being removed
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return file


def list_entries(cache_dir: Path) -> list[CacheEntry]:
    """What is in a cache, the last used first."""
    folders = [folder for folder in cache_dir.glob("[!.]*") if (folder / USED_FILE).exists()]
    return sorted(map(_describe, folders), key=lambda entry: -entry.last_used)


def remove_entry(folder: Path) -> bool:
    """Removes a folder of the cache, unless it is in use. Returns whether it did."""
    with (folder / USED_FILE).open("a+") as file:
        if fcntl is not None and (not _try(fcntl.flock, file) or _is_written(folder)):
            return False
        # Under another name first: a run that starts now makes a folder of its own.
        removed = folder.rename(folder.with_name(f".{folder.name}.removed"))
    shutil.rmtree(removed)
    return True


def _describe(folder: Path) -> CacheEntry:
    tokens = 0
    for path in (folder / "train").glob("shard-*.safetensors"):
        shard, _ = open_shard(path, 0, 0)
        tokens += len(shard.tokens)
    with (folder / USED_FILE).open("a+") as file:
        is_read = fcntl is not None and not _try(fcntl.flock, file)
    try:
        source = json.loads((folder / "about.json").read_text("utf-8"))["source"]
    except (OSError, ValueError, KeyError):
        source = "unknown"
    return CacheEntry(
        key=folder.name,
        source=source,
        num_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        num_tokens=tokens,
        finished=(folder / "train" / "corpus.json").exists(),
        last_used=(folder / USED_FILE).stat().st_mtime,
        in_use=is_read or _is_written(folder),
    )


def _is_written(folder: Path) -> bool:
    if fcntl is None or not (folder / ".lock").exists():
        return False
    with (folder / ".lock").open("a+") as file:
        return not _try(fcntl.lockf, file)


def _try(lock: Callable, file: IO) -> bool:
    try:
        lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
