import pytest
import torch

from torchrecipes.errors import UserError
from torchrecipes.training.precision import autocast, choose_precision

CPU = torch.device("cpu")


def test_named_precisions():
    assert choose_precision("bf16", CPU) == torch.bfloat16
    assert choose_precision("fp32", CPU) == torch.float32


@pytest.mark.parametrize("feature", ["amx_bf16", "avx512_bf16"])
def test_auto_is_bf16_only_where_the_cpu_multiplies_it(monkeypatch, feature):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {feature: True}, raising=False)
    assert choose_precision("auto", CPU) == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {feature: False}, raising=False)
    assert choose_precision("auto", CPU) == torch.float32


def test_unknown_precision_names_the_choices():
    with pytest.raises(UserError, match="auto, bf16 or fp32"):
        choose_precision("fp16", CPU)


def test_autocast_computes_in_the_format_that_was_chosen():
    a = torch.ones(2, 2)
    with autocast(CPU, torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
    with autocast(CPU, torch.float32):
        assert (a @ a).dtype == torch.float32
