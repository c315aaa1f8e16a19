import os

import pytest
import torch

from torchrecipes.errors import UserError
from torchrecipes.models import neobert
from torchrecipes.training.precision import autocast, resolve_dtype, set_deterministic

CPU = torch.device("cpu")


def test_named_precisions():
    assert resolve_dtype("bf16", CPU) == torch.bfloat16
    assert resolve_dtype("fp16", CPU) == torch.float16
    assert resolve_dtype("fp32", CPU) == torch.float32


@pytest.mark.parametrize("feature", ["amx_bf16", "avx512_bf16"])
def test_auto_is_bf16_only_where_the_cpu_multiplies_it(monkeypatch, feature):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {feature: True}, raising=False)
    assert resolve_dtype("auto", CPU) == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {feature: False}, raising=False)
    assert resolve_dtype("auto", CPU) == torch.float32


def test_unknown_precision_names_the_choices():
    with pytest.raises(UserError) as error:
        resolve_dtype("half", CPU)
    assert error.value.code == "unknown_name" and "auto, bf16, fp16, fp32, float8" in str(error.value)


@pytest.mark.parametrize(
    "capability, dtype",
    [((6, 1), torch.float32), ((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16)],
)
def test_auto_is_fp16_on_gpus_with_tensor_cores_for_it_alone(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_dtype("auto", torch.device("cuda")) == dtype


def test_autocast_computes_in_the_format_that_was_chosen():
    a = torch.ones(2, 2)
    with autocast(CPU, torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
    with autocast(CPU, torch.float16):
        assert (a @ a).dtype == torch.float16
    with autocast(CPU, torch.float32):
        assert (a @ a).dtype == torch.float32


@pytest.fixture
def nondeterministic_afterwards(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nondeterministic_afterwards")
def test_deterministic_refuses_what_depends_on_the_order_of_threads():
    order, values = torch.tensor([0, 0]), torch.tensor([1.0, 2.0])
    torch.zeros(2).put_(order, values)  # the last one wins, whichever that is
    for _ in range(2):
        set_deterministic()
        with pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"):
            torch.zeros(2).put_(order, values)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert not torch.backends.cudnn.benchmark


@pytest.mark.usefixtures("nondeterministic_afterwards")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_trains_deterministically(dtype):
    set_deterministic()
    model = neobert("tiny", vocab_size=64).train()
    documents = torch.tensor([0, 10, 32, 64], dtype=torch.int32)
    with autocast(CPU, dtype):
        hidden = model(torch.arange(64).view(2, 32), cu_seqlens=documents, max_seqlen=32)
    hidden.float().pow(2).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
