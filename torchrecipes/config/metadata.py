"""Metadata of config fields: range, unit, and whether a resumed run may change them.

Written as annotations in a recipe's `Config`, and read by the config check, by the comparison with a run that is being
resumed, and by the config schema page:

    max_steps: Steps | None = None
    save_every: MayChange[Steps | None] = 500
    label_smoothing: Annotated[float, Range(0, 1, closed_above=False)] = 0.0
"""

import math
from dataclasses import dataclass
from typing import Annotated, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; None is unbounded. A bound belongs to the range where `closed_*` is true."""

    low: float | None = None
    high: float | None = None
    closed_below: bool = True
    closed_above: bool = True

    def __contains__(self, value: float) -> bool:
        above = self.low is None or (value >= self.low if self.closed_below else value > self.low)
        below = self.high is None or (value <= self.high if self.closed_above else value < self.high)
        return above and below

    def __str__(self) -> str:
        low = "" if self.low is None else f"{'at least' if self.closed_below else 'above'} {self.low:g}"
        high = "" if self.high is None else f"{'at most' if self.closed_above else 'below'} {self.high:g}"
        high = "finite" if high == "below inf" else high
        return " and ".join(part for part in (low, high) if part)


@dataclass(frozen=True)
class Unit:
    """What a number counts."""

    name: str


@dataclass(frozen=True)
class Formerly:
    """Values of earlier versions that are refused, each with the one to write instead: ((old, new), ...)."""

    values: tuple[tuple[bool | int | float | str, str], ...]


class _MayChange:
    """Marks a key that a resumed run may change: it affects how a run is watched, stored or distributed."""

    def __repr__(self) -> str:
        return "MAY_CHANGE"


MAY_CHANGE = _MayChange()
MayChange = Annotated[T, MAY_CHANGE]

Steps = Annotated[int, Range(1), Unit("optimizer steps")]
Evaluations = Annotated[int, Range(1), Unit("evaluations")]
Rows = Annotated[int, Range(1), Unit("rows")]
Documents = Annotated[int, Range(1), Unit("documents")]
Tokens = Annotated[int, Range(1), Unit("tokens")]
Count = Annotated[int, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
Positive = Annotated[float, Range(0, math.inf, closed_below=False, closed_above=False)]
NonNegative = Annotated[float, Range(0)]
