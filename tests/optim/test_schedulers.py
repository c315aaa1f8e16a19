import math

import pytest
import torch
from torch import nn

from torchrecipes.errors import UserError
from torchrecipes.optim import constant, cosine, linear, warmup_stable_decay


def test_cosine_closed_form():
    schedule = cosine(100, warmup_steps=20, min_lr_ratio=0.1)
    assert schedule.at(1) == 1 / 20
    assert schedule.at(10) == 0.5
    assert schedule.at(20) == 1
    assert schedule.at(21) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 80)) / 2)
    assert schedule.at(40) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert schedule.at(60) == pytest.approx(0.55)
    assert schedule.at(100) == 0.1
    assert schedule.at(10_000) == 0.1


def test_linear_closed_form():
    schedule = linear(10, warmup_steps=2, min_lr_ratio=0.0)
    assert [schedule.at(step) for step in range(1, 11)] == pytest.approx(
        [0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0]
    )


def test_constant_closed_form():
    schedule = constant(10, warmup_steps=4)
    assert [schedule.at(step) for step in range(1, 11)] == [0.25, 0.5, 0.75, *[1] * 7]


@pytest.mark.parametrize("decay, middle", [("linear", 0.5), ("sqrt", 1 - 0.5**0.5), ("cosine", 0.5)])
def test_warmup_stable_decay_closed_form(decay, middle):
    schedule = warmup_stable_decay(100, warmup_steps=10, decay_steps=20, decay=decay, min_lr_ratio=0.2)
    assert [schedule.at(step) for step in (1, 5, 10, 11, 50, 80)] == [0.1, 0.5, 1, 1, 1, 1]
    assert schedule.at(90) == pytest.approx(0.2 + 0.8 * middle)
    assert schedule.at(100) == 0.2
    assert schedule.at(81) < 1


def test_ratios_are_shares_of_max_steps():
    assert cosine(200, warmup_ratio=0.05) == cosine(200, warmup_steps=10)
    assert linear(30, warmup_ratio=0.1) == linear(30, warmup_steps=3)
    assert constant(200) == constant(200, warmup_steps=10)
    by_ratio = warmup_stable_decay(1000, warmup_ratio=0.01, decay_ratio=0.2)
    assert by_ratio == warmup_stable_decay(1000, warmup_steps=10, decay_steps=200)
    assert warmup_stable_decay(1000) == warmup_stable_decay(1000, warmup_ratio=0.05, decay_ratio=0.1)


SCHEDULES = [
    cosine(57, 7),
    cosine(57, 0),
    cosine(57, 57),
    cosine(1),
    linear(57, 7, min_lr_ratio=0.0),
    linear(57, warmup_ratio=1.0),
    constant(57, 7),
    constant(57),
    warmup_stable_decay(57, 7),
    warmup_stable_decay(57, 7, decay_steps=50, decay="linear", min_lr_ratio=0.0),
    warmup_stable_decay(57, 7, decay_steps=0),
    warmup_stable_decay(57, 0, decay_ratio=1.0, decay="cosine"),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_rises_then_falls_between_its_ends(schedule):
    values = [schedule.at(step) for step in range(1, schedule.max_steps + 1)]
    warmup = schedule.warmup_steps
    assert values[:warmup] == sorted(set(values[:warmup]))
    assert values[max(0, warmup - 1) :] == sorted(values[max(0, warmup - 1) :], reverse=True)
    assert all(0 <= value <= 1 for value in values)
    if warmup:
        assert values[0] == 1 / warmup and values[warmup - 1] == 1
    assert values[-1] == (schedule.min_lr_ratio if schedule.decay_steps else 1)


def test_steps_are_counted_from_1():
    with pytest.raises(ValueError, match="counted from 1, not 0"):
        cosine(10).at(0)


def test_apply_keeps_every_groups_own_ratio():
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    optimizer = torch.optim.SGD([{"params": [p], "lr": lr} for p, lr in zip(parameters, (1.0, 0.3, 0.05), strict=True)])
    schedule = cosine(10, warmup_steps=2)
    for step in (1, 2, 7, 10, 3):  # any order: there is no state
        schedule.apply(optimizer, step)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([schedule.at(step) * lr for lr in (1.0, 0.3, 0.05)])


def test_apply_after_a_state_dict_was_loaded():
    schedule, parameter = linear(10, min_lr_ratio=0.0), nn.Parameter(torch.zeros(1))
    first = torch.optim.SGD([parameter], lr=0.5)
    schedule.apply(first, 8)
    second = torch.optim.SGD([parameter], lr=0.5)
    second.load_state_dict(first.state_dict())
    schedule.apply(second, 9)
    assert second.param_groups[0]["lr"] == pytest.approx(0.05)


def test_apply_writes_a_tensor_in_place():
    parameter, lr = nn.Parameter(torch.zeros(1)), torch.tensor(0.5)
    optimizer = torch.optim.Adam([parameter], lr=lr, capturable=False, foreach=False)
    held = optimizer.param_groups[0]["lr"]
    for step, expected in ((1, 0.25), (2, 0.5), (10, 0.05)):
        cosine(10, warmup_steps=2).apply(optimizer, step)
        assert optimizer.param_groups[0]["lr"] is held
        assert held.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: cosine(0), r"max_steps: 0 is not 1 or more"),
        (lambda: cosine(10, warmup_steps=11), r"warmup_steps: 11 is not between 0 and max_steps = 10\. Use .*ratio"),
        (lambda: linear(10, warmup_steps=-1), r"warmup_steps: -1 is not between"),
        (lambda: constant(10, warmup_ratio=1.5), r"warmup_ratio: 1\.5 is not between 0 and 1.*use warmup_steps"),
        (lambda: linear(10, warmup_ratio=100), r"warmup_ratio: 100 is not between 0 and 1"),
        (lambda: cosine(10, warmup_steps=1, warmup_ratio=0.1), r"warmup_steps = 1 and warmup_ratio = 0\.1.*Remove one"),
        (lambda: warmup_stable_decay(10, decay_steps=1, decay_ratio=0.1), r"decay_steps = 1 and decay_ratio.*Remove"),
        (lambda: cosine(10, min_lr_ratio=-0.1), r"min_lr_ratio: -0\.1 is not between 0 and 1"),
        (lambda: linear(10, min_lr_ratio=1.1), r"min_lr_ratio: 1\.1 is not between"),
        (lambda: warmup_stable_decay(10, decay="square"), r"decay: 'square' is not known\. Use cosine, linear, sqrt"),
        (lambda: warmup_stable_decay(10, 6, decay_steps=5), r"6 steps of warm-up and 5 of decay are more than .* = 10"),
        (lambda: cosine(10, warmup_ratio=math.nan), r"warmup_ratio: nan is not between"),
    ],
)
def test_wrong_values_name_the_key_and_the_remedy(make, message):
    with pytest.raises(UserError, match=message):
        make()
