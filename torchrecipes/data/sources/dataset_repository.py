"""Recognizes a cloned dataset repository: which of its files belong to which split.

1. The card, `README.md`, may name the files of every split in YAML (`configs`, `data_files`), as the Hugging Face hub
   reads it; a repository with several configurations has subsets.
2. Otherwise names do: `train-00000-of-00002.parquet`, `test.jsonl`, or a folder `validation/`. A folder that has
   training files and no others is a folder of files like any other.
"""

import glob
import os
import re
from dataclasses import dataclass, field
from typing import Any

from torchrecipes.config.suggest import did_you_mean
from torchrecipes.errors import UserError

CARD = "README.md"
TRAINING = ("train", "training")
HELD_OUT = ("test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation")
SPLIT_FILE = re.compile(rf"({'|'.join(TRAINING + HELD_OUT)})([-._]\d+(-of-\d+)?)?(\.[a-z]+)+")
SHARD = re.compile(r"(\w+)-\d{5}-of-\d{5}(\.[a-z]+)+")  # as `push_to_hub` names the files of any split


@dataclass
class Repository:
    """The files of a dataset repository.

    Attributes:
        folder: where it is.
        splits: paths of the files by split, in the order of their names.
        others: split or subset of the files of other subsets, by path.
    """

    folder: str
    splits: dict[str, list[str]]
    others: dict[str, str] = field(default_factory=dict)


def find_repository(folder: str, paths: list[str], subset: str | None) -> Repository | None:
    """Return the splits of a folder, or None where it is no dataset repository.

    Args:
        folder: its path.
        paths: all files in it that may hold text, in the order in which they would be read.
        subset: one of the configurations in the card, or a sub-folder. None: the only one, or the card's default.

    Raises:
        UserError: no such subset (code `no_such_subset`), several and none is named (`several_subsets`), or a card that
            names files which are not there (`no_such_file`).
    """
    stated = _stated(folder)
    if stated:
        return _from_card(folder, paths, stated, subset)
    inside = paths
    if subset is not None:
        start = os.path.join(folder, subset, "")
        inside = [path for path in paths if path.startswith(start)]
        if not inside:
            raise _no_such_subset(
                folder, subset, sorted({os.path.relpath(path, folder).split(os.sep)[0] for path in paths})
            )
    splits: dict[str, list[str]] = {}
    for path in inside:
        if name := _split_of(os.path.relpath(path, folder)):
            splits.setdefault(name, []).append(path)
    if subset is None and not (any(name in splits for name in TRAINING) and any(name in splits for name in HELD_OUT)):
        return None
    others = {
        path: f"the subset '{os.path.relpath(path, folder).split(os.sep)[0]}'" for path in paths if path not in inside
    }
    return Repository(folder, splits or {"train": inside}, others)


def _split_of(path: str) -> str | None:
    """Return the split that the name of a file says, or the folder that it is in."""
    *folders, name = path.split(os.sep)
    if found := SPLIT_FILE.fullmatch(name.lower()) or SHARD.fullmatch(name):
        return found[1]
    return next((part.lower() for part in reversed(folders) if part.lower() in TRAINING + HELD_OUT), None)


def _stated(folder: str) -> dict[str, tuple[dict[str, list[str]], bool]]:
    """Return the subsets in the card of a folder: the patterns of every split, and whether it is the default."""
    try:
        with open(os.path.join(folder, CARD), encoding="utf-8", errors="replace") as file:
            if file.readline().rstrip() != "---":
                return {}
            lines = []
            for line in file:
                if line.rstrip() == "---":
                    break
                lines.append(line)
    except OSError:
        return {}
    import yaml

    try:
        configs = yaml.safe_load("".join(lines)).get("configs")
        return {
            str(config.get("config_name", "default")): (_patterns(config), bool(config.get("default")))
            for config in configs or []
            if config.get("data_files") or config.get("data_dir")
        }
    except (yaml.YAMLError, AttributeError, KeyError, TypeError):  # a card that is written by hand
        return {}


def _patterns(config: dict[str, Any]) -> dict[str, list[str]]:
    files, start = config.get("data_files"), str(config.get("data_dir") or "")
    if not files:
        return {"": [os.path.join(start, "**")]}  # splits by their names
    if isinstance(files, str) or isinstance(files[0], str):
        files = [{"split": "train", "path": files}]
    found: dict[str, list[str]] = {}
    for item in files:
        paths = [item["path"]] if isinstance(item["path"], str) else item["path"]
        found.setdefault(str(item["split"]), []).extend(os.path.join(start, path) for path in paths)
    return found


def _from_card(
    folder: str, paths: list[str], stated: dict[str, tuple[dict[str, list[str]], bool]], subset: str | None
) -> Repository:
    if subset is None:
        defaults = [name for name, (_, is_default) in stated.items() if is_default or name == "default"]
        if len(stated) > 1 and not defaults:
            raise UserError(
                f"{folder} holds several subsets: {', '.join(stated)}",
                key="subset",
                hint="Name one of them.",
                code="several_subsets",
            )
        subset = (defaults or list(stated))[0]
    if subset not in stated:
        raise _no_such_subset(folder, subset, list(stated))
    by_name = {os.path.normpath(path): path for path in paths}
    position = {path: number for number, path in enumerate(by_name)}

    def matched(pattern: str) -> list[str]:
        found = glob.glob(os.path.join(folder, pattern), recursive=True)
        return sorted((path for path in map(os.path.normpath, found) if path in position), key=position.__getitem__)

    files: dict[str, dict[str, list[str]]] = {}
    for name, (patterns, _) in stated.items():
        splits: dict[str, list[str]] = {}
        for split, several in patterns.items():
            for path in (path for pattern in several for path in matched(pattern)):
                of = split or _split_of(os.path.relpath(path, folder)) or "train"
                if by_name[path] not in splits.setdefault(of, []):
                    splits[of].append(by_name[path])
        files[name] = splits
    if not files[subset]:
        patterns = ", ".join(pattern for several in stated[subset][0].values() for pattern in several)
        problem = f"{os.path.join(folder, CARD)} names files that are not there: {patterns}"
        hint = "Download them (in a git clone: git lfs pull), or give the paths of those that are there."
        raise UserError(problem, key="path", hint=hint, code="no_such_file")
    own = {path for several in files[subset].values() for path in several}
    others = {
        path: f"the subset '{name}'"
        for name, splits in files.items()
        for several in splits.values()
        for path in several
        if path not in own
    }
    return Repository(folder, files[subset], others)


def _no_such_subset(folder: str, subset: str, names: list[str]) -> UserError:
    hint = did_you_mean(subset, names, "Its subsets are")
    return UserError(f"{folder} has no subset '{subset}'", key="subset", hint=hint, code="no_such_subset")
