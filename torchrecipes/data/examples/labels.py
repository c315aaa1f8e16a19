"""`Labels`: class numbers, or numbers, of labels as the data have them.

1. The names of the classes are given, or those of the source, or those that occur, sorted: as numbers where all are
   integers, else by their characters. So they are the same on any machine.
2. A label that is an integer below the number of classes is the number of a class where it is not a name itself.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from torchrecipes.errors import UserError

LARGEST = float(np.finfo(np.float32).max)  # numbers are stored in fp32
TASKS = ("single_label", "multi_label", "regression")


class Labels:
    """Turns labels into numbers.

    Args:
        task: `single_label`, `multi_label` or `regression`.
        names: the names of the classes in their order; none for regression.

    Attributes:
        dtype: of an array of labels: int64, or float32 for the other tasks.
    """

    def __init__(self, task: str, names: Sequence[str] = ()):
        self.task, self.names = task, list(names)
        self.numbers = {name: number for number, name in enumerate(self.names)}
        self.dtype = np.dtype(np.int64 if task == "single_label" else np.float32)

    def encode(self, label: Any) -> int | float | list[float]:
        """Return the number of a label, or its row of 0 and 1.

        Raises:
            LookupError: it is none of the names, or no number; the exception's argument is its name.
        """
        if self.task == "regression":
            return as_number(label)
        if self.task == "single_label":
            return self._number(label)
        row = [0.0] * len(self.names)
        for item in label if isinstance(label, list) else [label]:
            row[self._number(item)] = 1.0
        return row

    def _number(self, label: Any) -> int:
        name = label_name(label)
        if name in self.numbers:
            return self.numbers[name]
        if name.isdecimal() and name.isascii() and int(name) < len(self.names) and not self._has_integers():
            return int(name)
        raise LookupError(name)

    def _has_integers(self) -> bool:
        return all(map(_is_integer, self.names))


def label_name(label: Any) -> str:
    """Return the name of a class: 1, 1.0 and "1" are one class."""
    if isinstance(label, bool):
        return "true" if label else "false"
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    if isinstance(label, list):  # of a multi-label task
        return ", ".join(map(label_name, label))
    return str(label)


def as_number(label: Any) -> float:
    """Return the number that a label of a regression is.

    Raises:
        LookupError: it is no finite number.
    """
    try:
        number = float(label)
    except (TypeError, ValueError):
        number = math.nan
    if not abs(number) <= LARGEST:
        raise LookupError(label_name(label))
    return number


def sort_names(names: Iterable[str]) -> list[str]:
    """Return names of classes in their order."""
    names = list(names)
    return sorted(names, key=int) if all(map(_is_integer, names)) else sorted(names)


def check_task(task: str | None, label_names: Sequence[str] | None) -> None:
    """Check the arguments of `prepare_examples`.

    Raises:
        UserError: an unknown task, or names that are not distinct (code `invalid_value`).
    """
    if task not in TASKS:
        hint = f"Set one of {', '.join(TASKS)}."
        raise UserError(f"'{task}' is not a valid value", key="task", hint=hint, code="invalid_value")
    if label_names is None or (task == "regression" and not label_names):
        return
    if task == "regression":
        problem, hint = "a regression has no classes", "Leave label_names out."
        raise UserError(problem, key="label_names", hint=hint, code="invalid_value")
    if len(set(label_names)) < len(label_names) or not label_names:
        problem = "a name is there twice" if label_names else "no name"
        raise UserError(problem, key="label_names", hint="Name every class once.", code="invalid_value")


def _is_integer(name: str) -> bool:
    digits = name.removeprefix("-")
    return digits.isdecimal() and digits.isascii() and len(digits) < 4000
