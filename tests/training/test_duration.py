from types import SimpleNamespace

import pytest

from torchrecipes.errors import UserError
from torchrecipes.training.duration import resolve_max_steps

CORPUS = {"rows": SimpleNamespace(num_rows=1000, tokens_per_row=250.0), "global_batch_size": 16}


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
def test_budget_rounds_up(budget, steps):
    none = {"max_steps": None, "total_tokens": None, "epochs": None}
    assert resolve_max_steps(**(none | budget), **CORPUS) == steps


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "none of them is set"),
        ({"max_steps": 5, "epochs": 1}, "max_steps and epochs are set"),
        ({"total_tokens": 0}, "total_tokens: 0 trains nothing"),
    ],
)
def test_budget_that_says_nothing_or_too_much_is_refused(budget, message):
    none = {"max_steps": None, "total_tokens": None, "epochs": None}
    with pytest.raises(UserError, match=message):
        resolve_max_steps(**(none | budget), **CORPUS)
