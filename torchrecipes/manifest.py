"""`manifest.json`: a checkpoint's files with sizes and checksums, which `verify` checks."""

import json
import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path

import torch
import xxhash

from torchrecipes import __version__

FORMAT = "torchrecipes-checkpoint-1"
HIDDEN = ".incomplete-"  # prefix of what is being written or removed
# Suffixes, and a file's name.
PICKLES = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".joblib", ".distcp", ".metadata"}


def flush(folder: Path, names: Iterable[str]) -> dict[str, dict]:
    """Flushes files to the disk and computes their checksums.

    Args:
        folder: where they are.
        names: their paths in it.

    Returns:
        Their entries in the manifest: name -> size in bytes and checksum.
    """
    entries = {}
    for name in names:
        fsync(folder / name)
        entries[name] = {"size": (folder / name).stat().st_size, "xxh3": _checksum(folder / name)}
    return entries


def write_manifest(folder: Path, step: int, files: dict[str, dict]) -> None:
    """Writes and flushes `manifest.json`, then the names of all files in the folder and in the folders inside it.

    Args:
        folder: the checkpoint's.
        step: its step.
        files: what `flush` returned, of every rank.
    """
    versions = {"torchrecipes": __version__, "torch": torch.__version__, "python": platform.python_version()}
    manifest = {"format": FORMAT, "step": step, "versions": versions, "files": dict(sorted(files.items()))}
    manifest["xxh3"] = _digest(manifest)
    (folder / "manifest.json").write_bytes(_text(manifest))
    fsync(folder / "manifest.json")
    for inside in {(folder / name).parent for name in files} - {folder}:
        fsync(inside)
    fsync(folder)


def verify(path: Path, checksums: bool = True) -> list[str]:
    """The problems of a checkpoint, file by file; empty if it is valid.

    Args:
        path: the checkpoint's folder. One that is named after a step has to be of that step.
        checksums: False checks the manifest and sizes only, and reads no other file.
    """
    if not path.is_dir():
        return [f"{path} does not exist"]
    try:
        raw = (path / "manifest.json").read_bytes()
        manifest = json.loads(raw)
        stated = manifest.pop("xxh3")
        if manifest["format"] != FORMAT:
            return [f"manifest.json: its format is {manifest['format']!r}, this version reads {FORMAT!r}"]
        # The text is compared, too: a changed byte between two values does not change the digest.
        if stated != _digest(manifest) or raw != _text(manifest | {"xxh3": stated}):
            return ["manifest.json is corrupt"]
        files = manifest["files"]
    except FileNotFoundError:
        return ["manifest.json is missing"]
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return ["manifest.json is corrupt"]
    problems = [problem for name, entry in files.items() if (problem := _problem(path, name, entry, checksums))]
    if (named := re.fullmatch(r"step-(\d+)", path.name)) and int(named[1]) != manifest["step"]:
        problems.append(f"manifest.json is of step {manifest['step']}")
    added = {
        str(file.relative_to(path)) for file in path.rglob("*") if {file.suffix.lower(), file.name.lower()} & PICKLES
    }
    return problems + [f"{name} is not allowed: pickles can run code" for name in sorted(added)]


def read_digest(path: Path) -> str:
    """The manifest's own checksum, which is another one for every checkpoint.

    Raises:
        OSError, ValueError, KeyError: there is no manifest.
    """
    return json.loads((path / "manifest.json").read_bytes())["xxh3"]


def fsync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _problem(folder: Path, name: str, entry: dict, checksums: bool) -> str | None:
    file = folder / name
    try:
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["size"]:
            return f"{name} has {file.stat().st_size:,} bytes, not {entry['size']:,}"
        return None if not checksums or _checksum(file) == entry["xxh3"] else f"{name} is corrupt (wrong checksum)"
    except OSError as error:  # what a bad sector gives
        return f"{name} cannot be read ({error.strerror})"


def _text(manifest: dict) -> bytes:
    # No newline at the end, so that a manifest without its last byte is not valid.
    return json.dumps(manifest, indent=2).encode()


def _digest(manifest: dict) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())


def _checksum(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
