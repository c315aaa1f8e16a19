import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from torchrecipes.models import bert, neobert
from torchrecipes.training.flops import mlm_flops_per_token, peak_flops


@pytest.mark.parametrize("kind", [neobert, bert])
def test_the_formula_counts_what_a_step_does(kind):
    """Against PyTorch's own count of a dense step; norms and activations are not matrix products and are left out."""
    model = kind(512, 64, 3, 4, 192)
    rows, row_len, masked = 2, 128, 0.25
    # Of attention only the plain form is counted by PyTorch.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        hidden = model(torch.randint(0, 512, (rows, row_len)))
        chosen = hidden.flatten(0, 1)[: int(masked * rows * row_len)]
        model.head(chosen).sum().backward()
    counted = counter.get_total_flops() / (rows * row_len)
    assert mlm_flops_per_token(model, row_len, masked) == pytest.approx(counted, rel=0.05)


def test_peaks_of_known_gpus_and_of_this_cpu(monkeypatch):
    known = {
        "NVIDIA H200": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA L40": 181e12,
        "NVIDIA L4": 121e12,
        "NVIDIA RTX A1000": None,  # not an A100
        "Something new": None,
    }
    for name, peak in known.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_flops(torch.device("cuda", 0), torch.bfloat16) == peak
    assert peak_flops(torch.device("cuda", 0), torch.float32) is None
    assert peak_flops(torch.device("cpu"), torch.float32) > 1e8
    assert peak_flops(torch.device("cpu"), torch.float32) == peak_flops(torch.device("cpu"), torch.float32)
