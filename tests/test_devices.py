from types import SimpleNamespace

import pytest
import torch

from torchrecipes import devices
from torchrecipes.errors import UserError
from torchrecipes.modules.attention_backend import choose_attention_backend
from torchrecipes.training import guard as guard_module
from torchrecipes.training import run as run_module
from torchrecipes.training.activation_checkpointing import oom_hint
from torchrecipes.training.run import ComputeConfig


@pytest.fixture
def machine(monkeypatch):
    """machine(cuda, mps, version): pretends that this machine has them."""

    def pretend(cuda, mps, version="2.13.1"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch, "__version__", version)
        monkeypatch.setattr(torch, "empty", lambda *_, device: None)

    return pretend


@pytest.mark.parametrize(
    "cuda, mps, version, chosen",
    [
        (True, False, "2.13.1", "cuda"),
        (True, True, "2.13.1", "cuda"),
        (False, True, "2.13.1", "mps"),
        (False, True, "2.12.0", "cpu"),
        (False, False, "2.13.1", "cpu"),
    ],
)
def test_auto_is_a_gpu_where_there_is_one(machine, cuda, mps, version, chosen):
    machine(cuda, mps, version)
    assert devices.choose_device("auto").type == chosen
    assert devices.choose_device("cpu").type == "cpu"


def test_the_process_has_the_gpu_of_its_number_unless_the_name_has_one(machine):
    machine(True, False)
    assert devices.choose_device("cuda", 3) == torch.device("cuda", 3)
    assert devices.choose_device("cuda:1", 3) == torch.device("cuda", 1)


def test_a_device_that_is_not_there_or_whose_torch_is_too_old_is_refused(machine):
    with pytest.raises(UserError) as error:
        devices.choose_device("mps")
    assert error.value.code == "no_device"
    machine(False, True, "2.12.0")
    with pytest.raises(UserError) as error:
        devices.choose_device("mps")
    assert error.value.code == "old_torch"


@pytest.mark.parametrize(
    "compute, world_size, key, code",
    [
        (ComputeConfig(device="mps"), 2, "compute.device", "one_process"),
        (ComputeConfig(device="mps", compile=True), 1, "compute.compile", "no_compile"),
        (ComputeConfig(device="cuda"), 1, "compute.device", "no_device"),
    ],
)
def test_a_run_refuses_what_its_device_cannot_do(monkeypatch, compute, world_size, key, code):
    if code != "no_device":
        monkeypatch.setattr(run_module, "choose_device", lambda name, _: torch.device(name))
    with pytest.raises(UserError) as error:
        run_module._device(compute, 0, world_size)
    assert (error.value.key, error.value.code) == (key, code)


def test_a_run_stays_on_the_cpu_where_it_is_told_to(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert run_module._device(ComputeConfig(device="cpu"), 0, 1) == torch.device("cpu")


def test_sums_in_float64_are_on_the_cpu_where_the_device_has_none(monkeypatch):
    assert devices.to_float64(torch.ones(2)).dtype == torch.float64
    mps = torch.device("mps")
    found = [devices.float64_device(torch.device(kind)).type for kind in ("mps", "cuda", "cpu")]
    assert found == ["cpu", "cuda", "cpu"]
    asked = []
    x = SimpleNamespace(device=mps, cpu=lambda: asked.append("cpu") or torch.ones(1))
    assert devices.to_float64(x).dtype == torch.float64 and asked == ["cpu"]


def test_attention_on_mps_is_products_and_a_mask():
    device = torch.device("meta")  # neither a CPU nor CUDA
    documents = torch.zeros(2, 8, dtype=torch.int32, device=device)
    options = {"device": device, "dtype": torch.float32}
    assert choose_attention_backend((2, 8), **options)[:4] == ("math", False, 0.0, None)
    for arguments in ({"document_ids": documents}, {"causal": True}, {"window": 2}):
        backend = choose_attention_backend((2, 8), **arguments, **options)
        assert backend.name == "math" and backend.mask.shape[-2:] == (8, 8)


def test_on_mps_the_host_decides_whether_a_step_is_skipped(monkeypatch):
    """The device's fused AdamW ignores `found_inf`."""
    weight = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], fused=True)
    weight.grad = torch.ones(3)
    monkeypatch.setattr(guard_module, "preset", lambda _: devices.PRESETS["mps"])
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: pytest.fail("stepped"))
    guard = guard_module.Guard()
    assert guard.step(optimizer, torch.tensor(1.0), torch.tensor(float("inf"))) == 1


def test_out_of_memory_on_mps_names_the_setting_to_lower():
    with pytest.raises(UserError) as error, oom_hint(8):
        raise RuntimeError("MPS backend out of memory (MPS allocated: 9.0 GiB)")
    assert error.value.code == "out_of_memory" and "micro_batch_size=4" in error.value.hint
    with pytest.raises(RuntimeError, match="another"), oom_hint(8):
        raise RuntimeError("another")


def test_generators_are_as_they_were():
    before = torch.get_rng_state()
    with devices.fork_rng():
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert devices.rng_state(torch.device("cpu")) is None
