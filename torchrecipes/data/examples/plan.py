"""Reads a source once before it is tokenized: the names of its classes, and which examples are held out.

An example is held out where the hash of its texts is low: below a limit of its own for every label, chosen so that
the share is exact for each. Equal texts are on the same side, and the split is the same on any machine.
"""

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import xxhash

from torchrecipes.config.suggest import did_you_mean
from torchrecipes.data.examples.encode import hash_of
from torchrecipes.data.examples.example import Example, ExampleSource
from torchrecipes.data.examples.labels import Labels, label_name, sort_names
from torchrecipes.data.progress import Progress
from torchrecipes.data.sources.records import BadRecord
from torchrecipes.errors import UserError

UNKNOWN_LABEL, NOT_A_NUMBER = "unknown label", "the label is not a finite number"
MANY_CLASSES = 50  # and half as many as there are examples: the column holds something else


@dataclass
class Plan:
    """What is known before the texts are tokenized.

    Attributes:
        labels: turns labels into numbers; None where examples have none.
        split_column: the number of the text whose hash decides; None: all of them.
        limits: by label, the largest hash that is held out.
    """

    labels: Labels | None
    split_column: int | None = None
    limits: dict[str, int] = field(default_factory=dict)

    def is_held_out(self, example: Example) -> bool:
        """Whether an example is for validation."""
        if not self.limits:
            return False
        limit = self.limits.get(stratum(self.labels, example.label))
        return limit is not None and example_hash(example, self.split_column) <= limit


def make_plan(
    source: ExampleSource, task: str, label_names: Sequence[str] | None, fraction: float, split_by: str | None
) -> Plan:
    """Reads the source, where labels or a split need it. Arguments: see `prepare_examples`.

    Raises:
        UserError: see `prepare_examples`.
    """
    split_column = None if split_by is None else _split_column(source, split_by)
    stated = label_names if label_names is not None else source.label_names
    labels = (
        Labels(task, [] if stated is None else [label_name(name) for name in stated]) if source.has_labels else None
    )
    if labels is None and not fraction:
        return Plan(None, split_column)
    is_named = labels is not None and (task == "regression" or stated is not None)
    strata: dict[str, int] = {}
    names: dict[str, int] = {}  # of classes, with the number of their examples
    unknown: dict[str, list[str]] = {}
    hashes, groups = array("Q"), array("L")
    progress = Progress("reading", source.num_bytes, "examples")
    try:
        for example in source:
            progress.add(1, len(example.text))
            if labels is not None:
                _check_task(example, task)
                if is_named:
                    try:
                        labels.encode(example.label)
                    except LookupError as error:
                        unknown.setdefault(str(error.args[0]), []).append(example.source)
                        continue
                if task != "regression":
                    for name in _names_of(example.label):
                        names[name] = names.get(name, 0) + 1
            if fraction:
                hashes.append(example_hash(example, split_column))
                groups.append(strata.setdefault(stratum(labels, example.label), len(strata)))
            else:
                hashes.append(0)
    finally:
        progress.close()
    if unknown and source.on_bad_record == "stop":
        raise _unknown_labels(labels, unknown, label_names is not None)
    _require_examples(source, len(hashes), unknown)
    if labels is not None and not is_named:
        _check_names(names, len(hashes), task)
        labels = Labels(task, sort_names(names))
    if not fraction:
        return Plan(labels, split_column)
    if len(hashes) == 1:
        raise _one_example()
    limits = _limits(np.asarray(hashes, np.uint64), np.asarray(groups, np.int64), list(strata), fraction)
    if not limits:
        raise _one_example()
    return Plan(labels, split_column, limits)


def encode_label(plan: Plan, example: Example) -> Any:
    """Return the number of an example's label, or a `BadRecord`."""
    try:
        return plan.labels.encode(example.label)
    except LookupError as error:
        reason = NOT_A_NUMBER if plan.labels.task == "regression" else UNKNOWN_LABEL
        return BadRecord(example.source, reason, repr(error.args[0]))


def check_label(plan: Plan, source: ExampleSource, example: Example) -> Any:
    """Return the number of the label of an example that no plan has seen, or a `BadRecord`.

    Raises:
        UserError: it is unknown and the source's `on_bad_record` is "stop" (code `unknown_label` or `bad_label`), or a
            list in a task of one label (`wrong_task`).
    """
    _check_task(example, plan.labels.task)
    try:
        return plan.labels.encode(example.label)
    except LookupError as error:
        if source.on_bad_record == "stop":
            unknown = {str(error.args[0]): [example.source]}
            raise _unknown_labels(plan.labels, unknown, are_given=True) from None
    return encode_label(plan, example)


def example_hash(example: Example, column: int | None = None) -> int:
    """Return a 64-bit hash of the texts of an example, or of one of them."""
    if column is not None:
        return xxhash.xxh3_64_intdigest(example.texts[column].encode())
    return hash_of([xxhash.xxh3_64_intdigest(text.encode()) for text in example.texts])


def stratum(labels: Labels | None, label: Any) -> str:
    """Return what examples have in common of which a share is held out: their label, or combination of labels."""
    if labels is None or labels.task == "regression":
        return ""
    return json.dumps(sorted(_names_of(label)), ensure_ascii=False)


def _names_of(label: Any) -> Iterator[str]:
    return map(label_name, label if isinstance(label, list) else [label])


def _limits(hashes: np.ndarray, groups: np.ndarray, strata: list[str], fraction: float) -> dict[str, int]:
    limits = {}
    order = np.lexsort((hashes, groups))
    hashes = hashes[order]
    ends = np.cumsum(np.bincount(groups, minlength=len(strata)))
    for name, end, begin in zip(strata, ends, [0, *ends[:-1]], strict=True):
        own = hashes[begin:end]
        if len(own) < 2:
            continue
        count = min(max(1, round(fraction * len(own))), len(own) - 1)
        limit = own[count - 1]
        if limit == own[-1]:  # equal texts up to the last one: hold out those below them
            count = int(own.searchsorted(limit))
            if not count:
                continue
            limit = own[count - 1]
        limits[name] = int(limit)
    return limits


def _split_column(source: ExampleSource, split_by: str) -> int:
    if split_by not in source.columns[:2]:
        hint = did_you_mean(split_by, source.columns[:2], "Set one of")
        raise UserError(f"examples have no '{split_by}'", key="split_by", hint=hint, code="invalid_value")
    return source.columns.index(split_by)


def _check_task(example: Example, task: str) -> None:
    if task != "multi_label" and isinstance(example.label, list):
        problem, hint = f"{example.source} has a list of labels", "Set task=multi_label."
        raise UserError(problem, key="task", hint=hint, code="wrong_task")


def _check_names(names: dict[str, int], num_examples: int, task: str) -> None:
    if task == "single_label" and len(names) == 1:
        hint = "There is nothing to learn: give data with another class, or check which column is the label."
        raise UserError(f"all examples have the label '{next(iter(names))}'", key="label", hint=hint, code="one_class")
    if not names:
        raise UserError("no example has a label", key="label", hint="Name the column of the label.", code="one_class")
    is_number = [_is_fraction(name) for name in names]
    if task == "single_label" and None not in is_number and any(is_number):
        problem = f"the labels are numbers ({', '.join(list(names)[:3])}, ...), not classes"
        raise UserError(problem, key="task", hint="Set task=regression.", code="wrong_task")
    if len(names) > max(MANY_CLASSES, num_examples / 2):
        problem = f"{num_examples:,} examples have {len(names):,} different labels"
        hint = "Check which column is the label; for a number, set task=regression."
        raise UserError(problem, key="label", hint=hint, code="many_classes")


def _is_fraction(name: str) -> bool | None:
    """Whether a name is a number that is no integer; None: it is no number."""
    try:
        return not float(name).is_integer()
    except (ValueError, OverflowError):
        return None


def _unknown_labels(labels: Labels, unknown: dict[str, list[str]], are_given: bool) -> UserError:
    lines = []
    for name, sources in sorted(unknown.items(), key=lambda item: -len(item[1]))[:10]:
        where = ", ".join(islice(sources, 3)) + (f" and {len(sources) - 3:,} more" if len(sources) > 3 else "")
        lines.append(f"  '{name}': {where}")
    if len(unknown) > 10:
        lines.append(f"  and {len(unknown) - 10:,} more")
    skip = "or count and skip such records with on_bad_record=skip."
    if labels.task == "regression":
        problem = "labels that are no finite numbers:"
        return UserError("\n".join([problem, *lines]), key="label", hint=f"Repair the data, {skip}", code="bad_label")
    shown = ", ".join(labels.names[:20]) + (", ..." if len(labels.names) > 20 else "")
    near = did_you_mean(next(iter(unknown)), labels.names, "")
    near = f"{near} " if near.startswith("Did") else ""
    what = "label_names" if are_given else "the names of the dataset"
    problem = f"unknown labels; {what} are {shown}:"
    hint = f"{near}Repair the data, add the label to label_names, {skip}"
    return UserError("\n".join([problem, *lines]), key="label", hint=hint, code="unknown_label")


def _require_examples(source: ExampleSource, count: int, unknown: dict[str, list[str]]) -> None:
    if not count:
        skipped = source.report.lines()[1:] or ["it is empty, or holds blank lines only"]
        skipped += [f"skipped {len(sources):,}: {UNKNOWN_LABEL} '{name}'" for name, sources in unknown.items()]
        raise UserError("\n  ".join([f"no examples in {source.name}", *skipped]), code="no_examples")


def _one_example() -> UserError:
    return UserError(
        "there are no two different examples of one label, so none can be held out for validation",
        key="data.validation_fraction",
        hint="Give validation data of its own, or train without: data.validation_fraction=0 eval_every=null.",
        code="one_example",
    )
