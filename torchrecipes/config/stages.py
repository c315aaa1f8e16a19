"""Stages: one config that lists several runs, each of which may start from another's result.

    output_dir: runs/security
    init_from: models/base                             # these keys are those of every stage
    stages:
      foundation: {optimizer.lr: 3e-5, max_steps: 5000}
      branch: {from: foundation, optimizer.lr: 5e-5}   # starts from the best checkpoint of foundation

A stage is a name and the keys in which it differs, nested or with dots. Four keys are its own: `from`, a stage above;
`from_checkpoint`, best or last; `recipe`, where it is not the command's; and `config`, another config that the stage is
made of. Its folder is `<output_dir>/<name>`; `${output_dir}` is that of all stages. Settings on the command line apply
to every stage without a `config`; `stages.branch.max_steps=100` applies to one. The keys of a stage with a `config` may
refer to those of the config that lists it: `data.source.path: ${data.source.sources.general.path}`.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torchrecipes.config.catalog import find_config
from torchrecipes.config.components import MISSING
from torchrecipes.config.merge import (
    INVALID,
    KeyPath,
    MergedConfig,
    Problems,
    Provenance,
    format_key,
    format_key_path,
    interpolate,
    leaves,
)
from torchrecipes.config.read_yaml import add_file, add_overrides, add_tree
from torchrecipes.config.suggest import did_you_mean

KEY = "stages"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_OWN = ("from", "from_checkpoint", "recipe", "config")
_RESERVED = {"corpus", "checkpoints"}  # folders that a run has


@dataclass(frozen=True)
class Stage:
    """A stage of a config.

    Attributes:
        name: also of its folder.
        output_dir: its folder.
        start: the stage whose result it starts from; None: from its `init_from`, or from nothing.
        start_checkpoint: which checkpoint of that stage; None: the best one where it keeps one, else the last.
        recipe, config: its own, if it has them.
        tree: the keys in which it differs.
        provenances: where they are from, by key path in `tree`.
    """

    name: str
    output_dir: str
    start: str | None = None
    start_checkpoint: Literal["best", "last"] | None = None
    recipe: str | None = None
    config: str | None = None
    tree: dict[str, Any] = field(default_factory=dict)
    provenances: dict[KeyPath, Provenance] = field(default_factory=dict)

    def add_to(self, merged: MergedConfig, problems: Problems) -> None:
        """Lay the stage's keys over `merged`."""
        add_tree(merged, self.tree, self.provenances, problems)


def is_stage_override(override: str) -> bool:
    """Whether an override is of one stage: `stages.branch.max_steps=100`."""
    return override.startswith(f"{KEY}.")


def read_stages(config: str | Path | None, overrides: Sequence[str] = ()) -> dict[str, Stage]:
    """Return the stages of a config by name, in its order; {} where it has none.

    Args:
        config: as for `load`; what else is wrong with the file is left to `load`.
        overrides: `key=value`.

    Raises:
        UserError: lists what is wrong with the stages, each with its file and line (code `invalid_config`).
    """
    if config is None:
        return {}
    path, problems = find_config(str(config)), Problems()
    merged = MergedConfig({})
    add_file(merged, path, Problems())
    if KEY not in merged.tree:
        return {}
    unread, known = Problems(), list(merged.tree[KEY]) if isinstance(merged.tree[KEY], dict) else []
    add_overrides(merged, list(overrides), unread)
    for name in set(merged.tree[KEY]) - set(known) if known else ():
        hint = did_you_mean(name, known, "The stages are")
        problems.add(
            merged.nearest((KEY, name)), f"there is no stage '{name}'", key=KEY, hint=hint, code="unknown_stage"
        )
    problems.raise_all(format_key_path(path))
    texts = copy.deepcopy(merged.tree[KEY])
    interpolate(merged, unread)
    listed, root = merged.tree[KEY], merged.tree.get("output_dir")
    if not isinstance(listed, dict) or not listed:
        hint = "Write a mapping: the name of each stage, and the keys in which it differs"
        problems.add(merged.nearest((KEY,)), "expected stages by name", key=KEY, hint=hint, code="wrong_type")
        listed = {}
    if root is None:
        hint = "Add it to the config, or output_dir=... to the command: each stage has a folder in it"
        problems.add(merged.nearest(()), "missing key", key="output_dir", hint=hint, code="missing_key")
    stages: dict[str, Stage] = {}
    for name, tree in listed.items():
        # What the environment gives is resolved by `load`, which keeps it out of files.
        is_secret = any(key_path[:2] == (KEY, name) for key_path in merged.interpolations)
        is_other = isinstance(tree, dict) and tree.get("config") is not None
        tree = tree if is_other and not is_secret else texts[name]
        if is_other and not is_secret:
            _mark_missing(tree, (KEY, name), unread, problems)
        stages[name] = _read_stage(merged, name, tree, str(root), list(stages), problems)
    problems.raise_all(format_key_path(path))
    return stages


def _mark_missing(tree: dict[str, Any], place: KeyPath, unread: Problems, problems: Problems) -> None:
    # A reference to a key without a value leaves the key here without one, which `load` reports; a wrong one is wrong.
    for key_path, value in leaves(tree):
        if value is INVALID:
            key = format_key((*place, *key_path))
            problems.found += [found for found in unread.found if found[1].key == key]
            parent = tree
            for part in key_path[:-1]:
                parent = parent[part]
            parent[key_path[-1]] = MISSING


def _read_stage(merged: MergedConfig, name: str, tree: Any, root: str, above: list[str], problems: Problems) -> Stage:
    def add(key: str | None, problem: str, hint: str, code: str) -> None:
        here = (KEY, name) if key is None else (KEY, name, key)
        problems.add(merged.nearest(here), problem, key=".".join(here), hint=hint, code=code)

    if not _NAME.fullmatch(name) or name in _RESERVED:
        add(None, f"'{name}' cannot be the name of a folder of its own", "Use letters, digits, - and _", "bad_name")
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        add(None, "expected a mapping of keys to values", "Write {} for a stage without keys of its own", "wrong_type")
        tree = {}
    own = {key: tree.get(key) for key in _OWN}
    for key, value in own.items():
        if value is not None and not isinstance(value, str):
            add(key, "expected text", "Write the name of one", "wrong_type")
    start, which = own["from"], own["from_checkpoint"]
    if isinstance(start, str) and start not in above:
        hint = did_you_mean(start, above, "Those above are") if above else "Leave it out: this is the first stage"
        add("from", f"there is no stage '{start}' above", hint, "unknown_stage")
    if which not in (None, "best", "last"):
        add("from_checkpoint", f"{which!r} is not one of best, last", "Write one of them", "wrong_type")
    if which is not None and start is None:
        add("from_checkpoint", "the stage starts from no other", "Set from, or leave it out", "contradiction")
    if "output_dir" in tree:
        add("output_dir", "a stage has the folder of its name", "Leave it out", "contradiction")
    if start is not None and tree.get("init_from") is not None:
        add("init_from", f"it starts from the stage {start} already", "Keep one of from and init_from", "contradiction")
    own_keys = {key: value for key, value in tree.items() if key not in _OWN}
    prefix = (KEY, name)
    provenances = {
        key_path[2:]: provenance for key_path, provenance in merged.provenances.items() if key_path[:2] == prefix
    }
    return Stage(name, f"{root}/{name}", start, which, own["recipe"], own["config"], own_keys, provenances)
