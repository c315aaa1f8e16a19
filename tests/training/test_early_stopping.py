"""`EarlyStopping`: an evaluation metric that no longer improves."""

import math

import pytest

from torchrecipes.checkpoint.state import flatten_state
from torchrecipes.errors import UserError
from torchrecipes.training import EarlyStopping


def stops_at(values, **settings):
    """The number of evaluations after which it stops; None: never."""
    stopping = EarlyStopping("m", **settings)
    return next((count for count, value in enumerate(values, 1) if stopping.update(count, {"m": value})), None)


@pytest.mark.parametrize(
    ("values", "settings", "expected"),
    [
        ([1, 2, 3, 2, 2, 2], {"patience": 3}, 6),
        ([1, 2, 3, 2, 2, 4, 3, 3], {"patience": 3}, None),
        ([3, 2, 1, 1, 1], {"patience": 2, "mode": "min"}, 5),
        ([-0.5, -0.4, -0.3, -0.35], {"patience": 1}, 4),  # negative values improve, too
        ([-0.5, -0.6], {"patience": 1}, 2),
        ([-2.0, -3.0, -4.0], {"patience": 1, "mode": "min"}, None),
        ([0.0, 0.05, 0.09, 0.14], {"patience": 2, "min_delta": 0.1}, 3),
        ([0.0, 0.05, 0.2, 0.21], {"patience": 2, "min_delta": 0.1}, None),
        ([math.nan, math.nan], {"patience": 2}, 2),  # no first value
        ([math.nan, -1.0, math.nan, math.nan], {"patience": 2}, 4),
        ([1.0, math.nan, 2.0, math.nan], {"patience": 2}, None),
        ([math.nan, 5.0, 4.0], {"patience": 2, "mode": "min"}, None),
    ],
)
def test_it_stops_after_patience(values, settings, expected):
    assert stops_at(values, **settings) == expected


def test_the_best_value_and_its_step():
    stopping = EarlyStopping("m", patience=2)
    assert (stopping.best, stopping.best_step, stopping.waited) == (None, None, 0)
    for step, value in ((10, -3.0), (20, -1.0), (30, math.nan)):
        stopping.update(step, {"m": value, "other": 1})
    assert (stopping.best, stopping.best_step, stopping.waited) == (-1.0, 20, 1)
    assert not stopping.should_stop


def test_it_resumes():
    values = [0.1, 0.3, 0.2, 0.25]
    straight, first = EarlyStopping("m", patience=2), EarlyStopping("m", patience=2)
    answers = [straight.update(step, {"m": value}) for step, value in enumerate(values)]
    for step, value in enumerate(values[:2]):
        first.update(step, {"m": value})
    state, tensors = flatten_state(first.state_dict())
    assert not tensors
    second = EarlyStopping("m", patience=2)
    second.load_state_dict(state)
    assert [second.update(step, {"m": values[step]}) for step in (2, 3)] == answers[2:] == [False, True]
    assert second.best_step == straight.best_step == 1


def test_a_rollback_forgets_what_came_later():
    stopping = EarlyStopping("m", patience=2)
    for step, value in ((10, 0.5), (20, 0.9), (30, 0.1)):
        stopping.update(step, {"m": value})
    assert not stopping.update(20, {"m": 0.4})  # the same step again: not a second evaluation
    assert (stopping.best, stopping.best_step, stopping.waited) == (0.5, 10, 1)


def test_the_metric_must_be_there():
    with pytest.raises(UserError) as error:
        EarlyStopping("eval/validation/accurracy").update(1, {"eval/validation/accuracy": 1.0})
    assert (error.value.key, error.value.code) == ("metric", "unknown_metric")
    assert "eval/validation/accuracy" in error.value.hint


@pytest.mark.parametrize("settings", [{"patience": 0}, {"mode": "best"}, {"min_delta": -1.0}, {"min_delta": math.nan}])
def test_values_out_of_range(settings):
    with pytest.raises(UserError) as error:
        EarlyStopping("m", **settings)
    assert (error.value.key, error.value.code) == (next(iter(settings)), "out_of_range")
