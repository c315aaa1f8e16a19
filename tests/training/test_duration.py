from types import SimpleNamespace

import pytest

from torchrecipes.errors import UserError
from torchrecipes.training import resolve_max_steps

DATASET = SimpleNamespace(num_rows=1000, tokens_per_row=250.0)


def config(**budget):
    return SimpleNamespace(**({"max_steps": None, "total_tokens": None, "epochs": None} | budget), global_batch_size=16)


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        ({"max_steps": 7}, 7),
        ({"total_tokens": 4000}, 1),
        ({"total_tokens": 4001}, 2),
        ({"epochs": 1}, 63),  # 62.5 steps see every row once
        ({"epochs": 0.5}, 32),
    ],
)
def test_a_budget_is_rounded_up(budget, steps, capsys):
    assert resolve_max_steps(config(**budget), DATASET) == steps
    assert f"{steps} steps of 4,000 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("budget", "key"),
    [
        ({}, "max_steps, total_tokens, epochs"),
        ({"max_steps": 5, "epochs": 1}, "max_steps, total_tokens, epochs"),
        ({"total_tokens": 0}, "total_tokens"),
    ],
)
def test_a_budget_that_is_missing_or_given_twice_is_refused(budget, key):
    with pytest.raises(UserError) as error:
        resolve_max_steps(config(**budget), DATASET)
    assert (error.value.code, error.value.key) == ("budget", key)
