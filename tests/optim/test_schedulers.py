import json
import math
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from torchrecipes.errors import UserError
from torchrecipes.optim import adamw, adamw_8bit, constant, cosine, linear, warmup_stable_decay


def sgd(*rates):
    rates = rates or (1.0,)
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in rates])


def rates_of(make, steps):
    """The learning rates of steps 1 to `steps`, of an optimizer whose peak is 1."""
    optimizer = sgd()
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_cosine_closed_form():
    rates = rates_of(partial(cosine, max_steps=100, warmup_steps=20, min_lr_ratio=0.1), 300)
    at = dict(enumerate(rates, start=1))
    assert (at[1], at[10], at[20], at[100], at[300]) == (1 / 20, 0.5, 1, 0.1, 0.1)
    assert at[21] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 80)) / 2)
    assert at[40] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert at[60] == pytest.approx(0.55)


def test_linear_closed_form():
    rates = rates_of(partial(linear, max_steps=10, warmup_steps=2, min_lr_ratio=0.0), 10)
    assert rates == pytest.approx([0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0])


def test_constant_closed_form():
    assert rates_of(partial(constant, max_steps=10, warmup_steps=4), 10) == [0.25, 0.5, 0.75, *[1] * 7]


@pytest.mark.parametrize("decay, middle", [("linear", 0.5), ("sqrt", 1 - 0.5**0.5), ("cosine", 0.5)])
def test_warmup_stable_decay_closed_form(decay, middle):
    make = partial(warmup_stable_decay, max_steps=100, warmup_steps=10, decay_steps=20, decay=decay, min_lr_ratio=0.2)
    at = dict(enumerate(rates_of(make, 100), start=1))
    assert [at[step] for step in (1, 5, 10, 11, 50, 80)] == [0.1, 0.5, 1, 1, 1, 1]
    assert at[90] == pytest.approx(0.2 + 0.8 * middle)
    assert at[100] == 0.2 and at[81] < 1


@pytest.mark.parametrize(
    ("make", "by_steps", "by_ratio", "steps"),
    [
        (cosine, {"warmup_steps": 10}, {"warmup_ratio": 0.05}, 200),
        (linear, {"warmup_steps": 3}, {"warmup_ratio": 0.1}, 30),
        (constant, {"warmup_steps": 10}, {}, 200),
        (
            warmup_stable_decay,
            {"warmup_steps": 10, "decay_steps": 200},
            {"warmup_ratio": 0.01, "decay_ratio": 0.2},
            1000,
        ),
        (warmup_stable_decay, {"warmup_ratio": 0.05, "decay_ratio": 0.1}, {}, 1000),
    ],
)
def test_ratios_are_shares_of_max_steps(make, by_steps, by_ratio, steps):
    first, second = (rates_of(partial(make, max_steps=steps, **given), steps) for given in (by_steps, by_ratio))
    assert first == second


@pytest.mark.parametrize("warmup", [0.5, 0.25, 0.3, 0.1, 1 / 3, 0.07])
def test_ratios_that_sum_to_1_fit_any_number_of_steps(warmup):
    for steps in range(1, 40):
        make = partial(warmup_stable_decay, max_steps=steps, warmup_ratio=warmup, decay_ratio=1 - warmup)
        assert rates_of(make, steps)[-1] in (0.1, 1.0)  # 1.0: the warm-up takes all the steps that there are


SCHEDULES = [
    (cosine, 57, {"warmup_steps": 7}, 7, 0.1),
    (cosine, 57, {"warmup_steps": 0}, 0, 0.1),
    (cosine, 57, {"warmup_steps": 57}, 57, 1),
    (cosine, 1, {}, 0, 0.1),
    (linear, 57, {"warmup_steps": 7, "min_lr_ratio": 0.0}, 7, 0),
    (linear, 57, {"warmup_ratio": 1.0}, 57, 1),
    (constant, 57, {"warmup_steps": 7}, 7, 1),
    (warmup_stable_decay, 57, {"warmup_steps": 7}, 7, 0.1),
    (
        warmup_stable_decay,
        57,
        {"warmup_steps": 7, "decay_steps": 50, "decay": "linear", "min_lr_ratio": 0.0},
        7,
        0,
    ),
    (warmup_stable_decay, 57, {"warmup_steps": 7, "decay_steps": 0}, 7, 1),
    (warmup_stable_decay, 57, {"warmup_steps": 0, "decay_ratio": 1.0, "decay": "cosine"}, 0, 0.1),
]


@pytest.mark.parametrize(("make", "steps", "given", "warmup", "last"), SCHEDULES)
def test_rises_then_falls_to_its_end(make, steps, given, warmup, last):
    rates = rates_of(partial(make, max_steps=steps, **given), steps)
    assert rates[:warmup] == sorted(set(rates[:warmup]))
    assert rates[max(0, warmup - 1) :] == sorted(rates[max(0, warmup - 1) :], reverse=True)
    assert all(0 <= rate <= 1 for rate in rates)
    if warmup:
        assert rates[0] == 1 / warmup and rates[warmup - 1] == 1
    assert rates[-1] == last


def test_every_group_keeps_its_own_peak():
    optimizer = sgd(1.0, 0.3, 0.05)
    scheduler = cosine(optimizer, 10, warmup_steps=2)
    for expected in rates_of(partial(cosine, max_steps=10, warmup_steps=2), 10):
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
            [expected * peak for peak in (1.0, 0.3, 0.05)]
        )
        optimizer.step()
        scheduler.step()


def test_it_is_a_scheduler_of_torch_that_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = sgd()
        scheduler = linear(optimizer, 10)
        assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
        for _ in range(12):
            optimizer.step()
            scheduler.step()


@pytest.mark.parametrize("make", [adamw, adamw_8bit], ids=["float", "tensor"])
def test_resuming_gives_the_same_rates_bit_for_bit(make):
    model = nn.Linear(2, 2)
    optimizer = make(model, lr=1e-3)
    scheduler = cosine(optimizer, 40, warmup_steps=5)
    rates = []
    for step in range(30):
        if step == 17:
            state = json.loads(json.dumps(scheduler.state_dict()))
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    other = make(model, lr=1e-3)
    held = [group["lr"] for group in other.param_groups]
    resumed = cosine(other, 40, warmup_steps=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(state)
        for step in range(17, 30):
            assert [float(group["lr"]) for group in other.param_groups] == rates[step]
            assert [float(lr) for lr in resumed.get_last_lr()] == rates[step]
            resumed.step()
    if make is adamw_8bit:  # written in place, so that nothing is compiled anew
        assert all(group["lr"] is lr for group, lr in zip(other.param_groups, held, strict=True))


def test_a_resumed_run_may_be_longer():
    optimizer = sgd()
    scheduler = warmup_stable_decay(optimizer, 50, warmup_steps=5, decay_steps=10)
    for _ in range(20):
        optimizer.step()
        scheduler.step()
    resumed = warmup_stable_decay(optimizer, 100, warmup_steps=5, decay_steps=10)
    resumed.load_state_dict(scheduler.state_dict())
    for _ in range(45):
        optimizer.step()
        resumed.step()
    assert optimizer.param_groups[0]["lr"] == 1


@pytest.mark.parametrize(
    ("make", "key", "code"),
    [
        (partial(cosine, max_steps=0), "max_steps", "out_of_range"),
        (partial(cosine, max_steps=10, warmup_steps=11), "warmup_steps", "out_of_range"),
        (partial(linear, max_steps=10, warmup_steps=-1), "warmup_steps", "out_of_range"),
        (partial(constant, max_steps=10, warmup_ratio=1.5), "warmup_ratio", "out_of_range"),
        (partial(linear, max_steps=10, warmup_ratio=100), "warmup_ratio", "out_of_range"),
        (partial(cosine, max_steps=10, warmup_ratio=math.nan), "warmup_ratio", "out_of_range"),
        (partial(cosine, max_steps=10, warmup_steps=1, warmup_ratio=0.1), "warmup_steps", "conflicting_keys"),
        (partial(warmup_stable_decay, max_steps=10, decay_steps=1, decay_ratio=0.1), "decay_steps", "conflicting_keys"),
        (partial(cosine, max_steps=10, min_lr_ratio=-0.1), "min_lr_ratio", "out_of_range"),
        (partial(linear, max_steps=10, min_lr_ratio=1.1), "min_lr_ratio", "out_of_range"),
        (partial(warmup_stable_decay, max_steps=10, decay="square"), "decay", "unknown_name"),
        (partial(warmup_stable_decay, max_steps=10, warmup_steps=6, decay_steps=5), "decay_steps", "schedule_too_long"),
        (
            partial(warmup_stable_decay, max_steps=10, warmup_ratio=0.6, decay_ratio=0.41),
            "decay_ratio",
            "schedule_too_long",
        ),
    ],
)
def test_wrong_values_name_the_key(make, key, code):
    with pytest.raises(UserError) as error:
        make(sgd())
    assert (error.value.key, error.value.code) == (key, code)
