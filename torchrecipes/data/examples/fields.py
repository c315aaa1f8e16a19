"""Makes an example of the fields of a record, or says why it is none."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torchrecipes.data.examples.example import Example
from torchrecipes.data.examples.labels import LARGEST
from torchrecipes.data.sources.records import BadRecord
from torchrecipes.data.sources.text_column import checked_text, kind_of

NO_LABEL, NOT_A_SCORE, OUT_OF_RANGE = "no label", "the score is not a finite number", "a score outside low..high"


class Unusable(Exception):
    """A reason and a detail, as of a `BadRecord`."""


@dataclass(frozen=True)
class PairFields:
    """Makes an example of a query, a positive and negatives.

    Attributes:
        names: the columns, in the order of the values.
        query, positive, negatives, scores, label: the columns of each.
    """

    names: tuple[str, ...]
    query: str
    positive: str
    negatives: tuple[str, ...] = ()
    scores: tuple[str, ...] = ()
    label: str | None = None

    def __call__(self, values: Sequence[Any], source: str) -> Example | BadRecord:
        """Return the example, or the reason why the values give none."""
        fields = dict(zip(self.names, values, strict=True))
        try:
            texts = [_text(fields[name], name) for name in (self.query, self.positive)]
            kept = [True]  # of the passages, the positive first: those that are there
            for name in self.negatives:
                for value in _items(fields[name]):
                    kept.append(value is not None and value != "")
                    if kept[-1]:
                        texts.append(_text(value, name))
            scores = [item for name in self.scores for item in _items(fields[name])]
            if self.scores and len(scores) not in (len(kept), len(texts) - 1):
                detail = f"{len(scores)} for {len(texts) - 1} (the positive and the negatives)"
                raise Unusable("another number of scores than of passages", detail)
            if len(scores) == len(kept):
                scores = [score for score, is_kept in zip(scores, kept, strict=True) if is_kept]
            numbers = tuple(_number(score, self.scores[0]) for score in scores)
            label = None if self.label is None else _label(fields[self.label], self.label)
        except Unusable as error:
            return BadRecord(source, *error.args)
        return Example(tuple(texts), numbers, label, source)


@dataclass(frozen=True)
class ScoredFields:
    """Makes an example of two sentences and a score, scaled to [0, 1] where `low` and `high` are given."""

    names: tuple[str, ...]
    sentence1: str
    sentence2: str
    score: str
    low: float | None = None
    high: float | None = None

    def __call__(self, values: Sequence[Any], source: str) -> Example | BadRecord:
        """Return the example, or the reason why the values give none."""
        fields = dict(zip(self.names, values, strict=True))
        try:
            texts = _text(fields[self.sentence1], self.sentence1), _text(fields[self.sentence2], self.sentence2)
            score = _number(fields[self.score], self.score)
            if self.low is not None and self.high is not None:
                if not self.low <= score <= self.high:
                    raise Unusable(OUT_OF_RANGE, f"{score:g} is not in {self.low:g}..{self.high:g}")
                score = (score - self.low) / (self.high - self.low)
        except Unusable as error:
            return BadRecord(source, *error.args)
        return Example(texts, (score,), None, source)


@dataclass(frozen=True)
class LabeledFields:
    """Makes an example of one or two texts and a label.

    Attributes:
        names: the columns, in the order of the values.
        texts: those of the texts.
        labels: that of the label; several are classes that an example has (1) or has not (0).
        delimiter: what stands between the labels in one column.
    """

    names: tuple[str, ...]
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    delimiter: str | None = None
    is_class: bool = False

    def __call__(self, values: Sequence[Any], source: str) -> Example | BadRecord:
        """Return the example, or the reason why the values give none."""
        fields = dict(zip(self.names, values, strict=True))
        try:
            texts = tuple(_text(fields[name], name) for name in self.texts)
            if self.is_class:
                label = [name for name in self.labels if _is_set(fields[name], name)]
            else:
                label = _label(fields[self.labels[0]], self.labels[0], self.delimiter)
        except Unusable as error:
            return BadRecord(source, *error.args)
        return Example(texts, (), label, source)


@dataclass(frozen=True)
class TextField:
    """Makes an example of one text."""

    name: str

    def __call__(self, values: Sequence[Any], source: str) -> Example | BadRecord:
        """Return the example, or the reason why the value gives none."""
        try:
            return Example((_text(values[0], self.name),), source=source)
        except Unusable as error:
            return BadRecord(source, *error.args)


def _text(value: Any, name: str) -> str:
    text = checked_text(value, "")
    if isinstance(text, BadRecord):
        raise Unusable(text.reason, f"column '{name}'" + (f": {text.detail}" if text.detail else ""))
    return text


def _items(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else (value,)


def _number(value: Any, name: str) -> float:
    try:
        number = math.nan if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= LARGEST:
        raise Unusable(NOT_A_SCORE, f"column '{name}': {_shown(value)}")
    return number


def _label(value: Any, name: str, delimiter: str | None = None) -> Any:
    if delimiter is not None and isinstance(value, str):
        return [part.strip() for part in value.split(delimiter) if part.strip()]
    if isinstance(value, list):
        return [_label(item, name) for item in value]
    if isinstance(value, bytes):
        raise Unusable("not UTF-8", f"column '{name}'")
    value = value.strip() if isinstance(value, str) else value
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        raise Unusable(NO_LABEL, f"column '{name}': {_shown(value)}")
    if isinstance(value, dict):
        raise Unusable("the label is an object", f"column '{name}'")
    return value


def _is_set(value: Any, name: str) -> bool:
    value = value.strip().lower() if isinstance(value, str) else value
    for answer, written in ((True, (1, "1", "1.0", "true")), (False, (0, "0", "0.0", "false"))):
        if value in written:
            return answer
    raise Unusable("the label is neither 0 nor 1", f"column '{name}': {_shown(value)}")


def _shown(value: Any) -> str:
    if value is None or isinstance(value, list | dict):
        return kind_of(value)
    return repr(value[:40] if isinstance(value, str) else value)
