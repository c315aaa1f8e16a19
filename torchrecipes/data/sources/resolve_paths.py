"""Turns the paths of a config into the list of files to read.

1. A path is a file, a folder (with its sub-folders), a pattern with `*`, `**`, `?` or `[]`, or a list of those.
2. A folder gives its files in the order of their names, so that every run and every machine reads the same order.
3. What a folder or pattern holds and is not read is reported with the reason. Of a dataset repository one split is read
   (dataset_repository.py); what `save_to_disk` wrote is refused with the setting that reads it.

The name of a file decides its format. A file that is named, or that a pattern names by its extension (`logs/*.log`), is
read as plain text if the extension is unknown; one that only lies in a folder is skipped.
"""

import glob
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from torchrecipes.config.suggest import closest, did_you_mean
from torchrecipes.data.sources.dataset_repository import find_repository
from torchrecipes.data.sources.line_reader import COMPRESSIONS
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
CARD = "the card of a dataset; name it to read it"
MANIFEST = "the manifest of an import, which says where the documents are from"
TWICE = "named twice"


@dataclass(frozen=True)
class FoundFile:
    """A file to read."""

    path: str  # absolute
    name: str  # as the config has it, for messages
    format: str  # one of FORMATS' values
    compression: str | None  # one of COMPRESSIONS' values
    size: int  # bytes on disk
    modified_ns: int


def find_files(
    paths: list[str], split: str = "train", subset: str | None = None
) -> tuple[list[FoundFile], list[BadRecord], list[str]]:
    """Return the files that `paths` stand for, in their order.

    Args:
        paths: files, folders and patterns.
        split: of a folder that is a dataset repository, what is read.
        subset: one of a repository's, where it has several.

    Returns:
        The files, what was found there and is skipped, and the names of all splits (none without a repository).

    Raises:
        UserError: a path that matches nothing (code `no_such_file`; names the closest one), no file to read in any
            (`no_files`), a folder that another source reads (`saved_dataset`), no such split (`no_such_split`) or
            subset (`no_such_subset`, `several_subsets`).
    """
    if not paths or not all(isinstance(path, str) and path for path in paths):
        hint = "Give a file, a folder, a pattern like texts/*.txt, or a list of these."
        raise UserError("no file is named", key="path", hint=hint, code="no_files")
    found: dict[str, FoundFile] = {}
    skipped = []
    splits: dict[str, None] = {}
    for path in paths:
        for item in _search(path, split, subset, splits):
            if isinstance(item, BadRecord):
                skipped.append(item)
            elif item.path in found:
                skipped.append(BadRecord(item.name, TWICE))
            else:
                found[item.path] = item
    if not found:
        seen = "".join(f"\n  {record}" for record in skipped[:20]) or " (nothing is there)"
        places = ", ".join(map(os.path.abspath, paths))
        raise UserError(f"no file to read in {places}{seen}", key="path", code="no_files")
    if not splits and (split != "train" or subset is not None):
        key = "split" if subset is None else "subset"
        problem = f"{', '.join(paths)}: no folder with several splits, as a dataset repository has"
        raise UserError(problem, key=key, hint=f"Leave {key} out, or give its folder.", code=f"no_such_{key}")
    return list(found.values()), skipped, list(splits)


def _search(path: str, split: str, subset: str | None, splits: dict[str, None]) -> Iterator[FoundFile | BadRecord]:
    if "://" in path:
        hint = "Download it, then give the path of the file."
        raise UserError(f"{path} is an address", key="path", hint=hint, code="no_such_file")
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        yield from _folder(path, split, subset, splits)
    elif os.path.lexists(path):
        yield _file(path, named=True)
    elif glob.has_magic(path):
        yield from _pattern(path)
    else:
        path = os.path.abspath(path)
        raise _no_such_file(f"there is no file or folder {path}", path)


def _folder(folder: str, split: str, subset: str | None, splits: dict[str, None]) -> Iterator[FoundFile | BadRecord]:
    unreadable: list[OSError] = []
    entries = []
    for parent, folders, names in os.walk(folder, onerror=unreadable.append):
        _refuse_saved_dataset(parent, names)
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        hidden = [name for name in folders if name.startswith(".") and name not in links]
        folders[:] = [name for name in folders if name not in hidden and name not in links]
        entries += [(os.path.join(parent, name), "") for name in names]
        entries += [(os.path.join(parent, name), HIDDEN) for name in hidden]
        entries += [(os.path.join(parent, name), "a link to a folder; name it to read it") for name in links]
    entries += [(error.filename, f"cannot be listed ({error.strerror})") for error in unreadable]
    has_tables = any(FORMATS.get(os.path.splitext(path)[1], "text") != "text" for path, _ in entries)
    # By the parts of the path, so that the order is that of a tree and independent of the separator and the locale.
    entries.sort(key=lambda entry: entry[0].split(os.sep))
    readable = [path for path, reason in entries if not reason and _format(path)]
    repository = find_repository(folder, readable, subset)
    if repository:
        splits.update(dict.fromkeys(repository.splits))
        if split not in repository.splits:
            problem, hint = f"{folder} has no split '{split}'", did_you_mean(split, splits, "Its splits are")
            raise UserError(problem, key="split", hint=hint, code="no_such_split")
    for path, reason in entries:
        if reason:
            yield BadRecord(path, reason)
        elif path == os.path.join(folder, "README.md") and (repository or (has_tables and _is_card(path))):
            yield BadRecord(path, CARD)
        elif repository and _format(path) and path not in repository.splits[split]:
            name = next((name for name, files in repository.splits.items() if path in files), None)
            what = f"the split '{name}'" if name else repository.others.get(path)
            yield BadRecord(path, f"of {what}, not of '{split}'" if what else "of no split of the dataset")
        elif os.path.basename(path) == "manifest.json" and _is_manifest(path):
            yield BadRecord(path, MANIFEST)
        else:
            yield _file(path, named=False)


def _refuse_saved_dataset(folder: str, names: list[str]) -> None:
    if "dataset_dict.json" in names or {"dataset_info.json", "state.json"} <= set(names):
        raise UserError(
            f"{folder} was written by save_to_disk of the datasets library",
            key="path",
            hint=f"Read it with _component_=torchrecipes.data.sources.hf_dataset name={folder} instead of path.",
            code="saved_dataset",
        )


def _is_manifest(path: str) -> bool:
    # `tune-style data import` writes one beside its documents.
    try:
        with open(path, "rb") as file:
            return b'"torchrecipes-import-' in file.read(64)
    except OSError:
        return False


def _is_card(path: str) -> bool:
    # Datasets on the hub have a README.md with YAML in front.
    try:
        with open(path, "rb") as file:
            return file.readline().rstrip() == b"---"
    except OSError:
        return False


def _pattern(pattern: str) -> Iterator[FoundFile | BadRecord]:
    fixed = pattern
    while glob.has_magic(fixed):
        fixed = os.path.dirname(fixed)
    matches = sorted(glob.glob(pattern, recursive=True), key=lambda match: match.split(os.sep))
    if not matches:
        raise _no_such_file(f"nothing matches {os.path.abspath(pattern)}", os.path.join(os.path.abspath(fixed), ""))
    suffix = os.path.splitext(pattern)[1]
    for match in matches:
        if os.path.isdir(match):
            if "**" not in pattern:
                yield BadRecord(match, "a folder; give its path, or a pattern with **")
        else:
            yield _file(match, bool(suffix) and not glob.has_magic(suffix) and match.endswith(suffix))


def _file(path: str, named: bool) -> FoundFile | BadRecord:
    base = os.path.basename(path)
    if base.startswith(".") and not named:
        return BadRecord(path, HIDDEN)
    compression = COMPRESSIONS.get(os.path.splitext(base.lower())[1])
    form = _format(path) or ("text" if named else None)
    try:
        status = os.stat(path)
    except OSError as error:
        return _refuse(path, error.strerror or str(error), named)
    if not stat.S_ISREG(status.st_mode):
        return _refuse(path, "a pipe, socket or device", named)
    if form == "parquet" and compression:
        return _refuse(path, f"Parquet inside {compression}: unpack it first", named)
    if form is None:
        return BadRecord(path, UNKNOWN)
    return FoundFile(os.path.abspath(path), path, form, compression, status.st_size, status.st_mtime_ns)


def _format(path: str) -> str | None:
    stem, suffix = os.path.splitext(os.path.basename(path).lower())
    return FORMATS.get(os.path.splitext(stem)[1] if suffix in COMPRESSIONS else suffix)


def _refuse(path: str, detail: str, named: bool) -> BadRecord:
    if named:
        raise UserError(f"{os.path.abspath(path)}: {NO_FILE}: {detail}", key="path", code="unreadable_file")
    return BadRecord(path, NO_FILE, detail)


def _no_such_file(problem: str, path: str) -> UserError:
    """Return the error for a path that does not exist, with the name that it most likely misspells."""
    parent, wanted = os.path.split(path)
    while not os.path.isdir(parent):
        parent, wanted = os.path.split(parent)
    try:
        names = sorted(name for name in os.listdir(parent) if not name.startswith("."))
    except OSError as error:
        hint = f"{parent} cannot be listed ({error.strerror})"
    else:
        near = closest(wanted, names) if wanted else None
        holds = f"{parent} holds: {', '.join(names[:10]) or 'nothing'}" + (", ..." if len(names) > 10 else "")
        hint = f"Did you mean {os.path.join(parent, near)}?" if near else holds
    return UserError(problem, key="path", hint=hint, code="no_such_file")
