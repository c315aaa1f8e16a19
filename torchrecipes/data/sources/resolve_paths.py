"""From the paths in a config to the list of files to read.

1. A path is a file, a folder (all of it, sub-folders too), a pattern with `*`, `**`, `?` or `[]`, or a list of those.
2. A folder gives its files in the order of their names, so that every run and every machine reads the same order.
3. What a folder or pattern holds and is not read is said, with the reason.

A file's format follows from its name. A file that is named, or that a pattern names by its extension (`logs/*.log`), is
read as plain text where the extension is not known; one that only lies in a folder is left out.
"""

import difflib
import glob
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from torchrecipes.data.sources.records import BadRecord
from torchrecipes.errors import UserError

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    **dict.fromkeys((".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".adoc", ".org"), "text"),
}
HIDDEN = "hidden (its name starts with a dot)"
UNKNOWN = "unknown format; to read such files as plain text, name them or a pattern like folder/*.ext"
NO_FILE = "not a file that can be read"
TWICE = "named twice"


@dataclass(frozen=True)
class FoundFile:
    """A file to read. `name` is how messages show it, `relative` is what of its path enters a fingerprint."""

    path: str  # absolute
    name: str  # as the config has it
    relative: str  # below the folder or pattern that named it, with /
    format: str  # one of FORMATS' values
    gzipped: bool
    size: int  # bytes on disk
    modified_ns: int


def find_files(paths: list[str]) -> tuple[list[FoundFile], list[BadRecord]]:
    """Return the files that `paths` stand for, in their order, and what was seen there and is left out.

    Raises:
        UserError: a path that matches nothing (with the nearest name that exists), or no file to read in any of them.
    """
    if not paths or not all(isinstance(path, str) and path for path in paths):
        raise UserError("data.source.path names no file: give a file, a folder, a pattern like texts/*.txt, or a list")
    found: dict[str, FoundFile] = {}
    skipped = []
    for path in paths:
        for item in _search(path):
            if isinstance(item, BadRecord):
                skipped.append(item)
            elif item.path in found:
                skipped.append(BadRecord(item.name, TWICE))
            else:
                found[item.path] = item
    if not found:
        seen = "".join(f"\n  {record}" for record in skipped[:20]) or " (nothing there)"
        raise UserError(f"no file to read in {', '.join(map(os.path.abspath, paths))}{seen}")
    return list(found.values()), skipped


def _search(path: str) -> Iterator[FoundFile | BadRecord]:
    if "://" in path:
        raise UserError(f"data.source.path is an address, {path}: download it first, then give the file's path")
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        yield from _folder(path)
    elif os.path.lexists(path):
        yield _file(path, os.path.basename(path), named=True)
    elif glob.has_magic(path):
        yield from _pattern(path)
    else:
        raise UserError(f"there is no file or folder {os.path.abspath(path)}; {_nearest(os.path.abspath(path))}")


def _folder(folder: str) -> Iterator[FoundFile | BadRecord]:
    unreadable: list[OSError] = []
    entries = []
    for parent, folders, names in os.walk(folder, onerror=unreadable.append):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        hidden = [name for name in folders if name.startswith(".") and name not in links]
        folders[:] = [name for name in folders if name not in hidden and name not in links]
        entries += [(os.path.join(parent, name), "") for name in names]
        entries += [(os.path.join(parent, name), HIDDEN) for name in hidden]
        entries += [(os.path.join(parent, name), "a link to a folder; name it if it is meant") for name in links]
    entries += [(error.filename, f"cannot be listed ({error.strerror})") for error in unreadable]
    # By the parts of the path, so that the order is that of a tree, and no matter of the separator or the locale.
    for path, reason in sorted(entries, key=lambda entry: entry[0].split(os.sep)):
        if reason:
            yield BadRecord(path, reason)
        else:
            yield _file(path, os.path.relpath(path, folder), named=False)


def _pattern(pattern: str) -> Iterator[FoundFile | BadRecord]:
    fixed = pattern
    while glob.has_magic(fixed):
        fixed = os.path.dirname(fixed)
    matches = sorted(glob.glob(pattern, recursive=True), key=lambda match: match.split(os.sep))
    if not matches:
        parent = os.path.abspath(fixed or os.curdir)
        held = _holds(parent) if os.path.isdir(parent) else f"there is no {parent}; {_nearest(parent)}"
        raise UserError(f"nothing matches the pattern {os.path.abspath(pattern)}; {held}")
    suffix = os.path.splitext(pattern)[1]
    for match in matches:
        if os.path.isdir(match):
            if "**" not in pattern:
                yield BadRecord(match, "a folder; give its path, or a pattern with **")
        else:
            named = bool(suffix) and not glob.has_magic(suffix) and match.endswith(suffix)
            yield _file(match, os.path.relpath(match, fixed or os.curdir), named)


def _file(path: str, relative: str, named: bool) -> FoundFile | BadRecord:
    base = os.path.basename(path)
    if base.startswith(".") and not named:
        return BadRecord(path, HIDDEN)
    stem, suffix = os.path.splitext(base.lower())
    gzipped = suffix == ".gz"
    if gzipped:
        suffix = os.path.splitext(stem)[1]
    form = FORMATS.get(suffix, "text" if named else None)
    try:
        status = os.stat(path)
    except OSError as error:
        return _refuse(path, error.strerror or str(error), named)
    if not stat.S_ISREG(status.st_mode):
        return _refuse(path, "a pipe, socket or device", named)
    if form == "parquet" and gzipped:
        return _refuse(path, "Parquet inside gzip: unpack it first", named)
    if form is None:
        return BadRecord(path, UNKNOWN)
    relative = relative.replace(os.sep, "/")
    return FoundFile(os.path.abspath(path), path, relative, form, gzipped, status.st_size, status.st_mtime_ns)


def _refuse(path: str, detail: str, named: bool) -> BadRecord:
    if named:
        raise UserError(f"{os.path.abspath(path)}: {NO_FILE}: {detail}")
    return BadRecord(path, NO_FILE, detail)


def _nearest(path: str) -> str:
    """Return the end of a message on a path that does not exist: the name that it most likely misspells."""
    parent, wanted = os.path.split(path)
    while not os.path.isdir(parent):
        parent, wanted = os.path.split(parent)
    try:
        close = difflib.get_close_matches(wanted, os.listdir(parent), n=1, cutoff=0.5)
    except OSError as error:
        return f"{parent} cannot be listed ({error.strerror})"
    return f"did you mean {os.path.join(parent, close[0])}?" if close else _holds(parent)


def _holds(folder: str) -> str:
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        return f"{folder} cannot be listed ({error.strerror})"
    return f"{folder} holds: {', '.join(names[:10]) or 'nothing'}" + (", ..." if len(names) > 10 else "")
