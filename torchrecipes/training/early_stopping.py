"""Ends training when an evaluation metric has stopped improving."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from torchrecipes.config.suggest import did_you_mean
from torchrecipes.errors import UserError


class EarlyStopping:
    """Says when to stop: after `patience` evaluations in a row without a better value of a metric.

        if early_stopping.update(step, results):
            ...  # save and leave the loop

    The first value always is the best so far, whatever its sign; NaN never is. Every decision follows from numbers that
    are equal on all ranks.

    Args:
        metric: its name as in metrics.jsonl, such as `eval/validation/matthews`.
        patience: evaluations in a row that may fail to improve it before training stops.
        mode: `max` if a higher value is better, `min` if a lower one is.
        min_delta: how much better than the best a value must be to count.

    Attributes:
        best: the best value so far; None before the first one.
        best_step: the step that it belongs to.
        waited: evaluations since then.

    Raises:
        UserError: a value is out of range.
    """

    def __init__(self, metric: str, patience: int = 3, mode: Literal["min", "max"] = "max", min_delta: float = 0.0):
        if patience < 1:
            raise UserError(f"{patience} is not 1 or more", key="patience", code="out_of_range")
        if mode not in ("min", "max"):
            raise UserError(f"{mode!r} is not one of min, max", key="mode", code="out_of_range")
        if not min_delta >= 0:
            raise UserError(f"{min_delta} is not 0 or more", key="min_delta", code="out_of_range")
        self.metric, self.patience, self.mode, self.min_delta = metric, patience, mode, min_delta
        self.history: list[tuple[int, float]] = []

    def update(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Takes the results of an evaluation, and returns whether training should stop.

        Evaluations at this step and after it, which a rollback has undone or which are repeated, are forgotten first.

        Args:
            step: the step that was evaluated.
            metrics: results of that evaluation by name.

        Raises:
            UserError: the metric is not among them (code `unknown_metric`).
        """
        if self.metric not in metrics:
            hint = did_you_mean(self.metric, metrics, "The evaluation gives")
            raise UserError(f"no evaluation gives '{self.metric}'", key="metric", hint=hint, code="unknown_metric")
        self.history = [entry for entry in self.history if entry[0] < step] + [(step, float(metrics[self.metric]))]
        return self.should_stop

    @property
    def should_stop(self) -> bool:
        """Whether the last `patience` evaluations have not improved the metric."""
        return self.waited >= self.patience

    @property
    def best(self) -> float | None:  # noqa: D102, see Attributes
        index = self._best_index()
        return None if index is None else self.history[index][1]

    @property
    def best_step(self) -> int | None:  # noqa: D102
        index = self._best_index()
        return None if index is None else self.history[index][0]

    @property
    def waited(self) -> int:  # noqa: D102
        index = self._best_index()
        return len(self.history) if index is None else len(self.history) - 1 - index

    def _best_index(self) -> int | None:
        sign, found, best = (1 if self.mode == "max" else -1), None, math.nan
        for index, (_, value) in enumerate(self.history):
            if not math.isnan(value) and (found is None or sign * (value - best) > self.min_delta):
                found, best = index, value
        return found

    def state_dict(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        return {"history": [list(entry) for entry in self.history]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.history = [(int(step), float(value)) for step, value in state["history"]]
