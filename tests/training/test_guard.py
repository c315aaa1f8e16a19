import pytest

from torchrecipes.errors import UserError
from torchrecipes.training.guard import check_finite


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_stops_the_run(name, value):
    line = {"step": 12, "loss": 1.0, "grad_norm": 1.0} | {name: value}
    with pytest.raises(UserError, match=rf"step 12: {name} is (nan|inf).*runs/x/checkpoints"):
        check_finite(line, "runs/x/checkpoints")


def test_finite_and_absent_numbers_pass():
    check_finite({"step": 1, "loss": 3.0, "grad_norm": None}, "c")
