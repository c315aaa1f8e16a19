from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from torchrecipes.models import bert, gpt2, llama, neobert, qwen3, transformer
from torchrecipes.models.param_count import active_parameters
from torchrecipes.modules import AttentionBackend, MoE
from torchrecipes.planning.flops import causal_flops_per_token, mlm_flops_per_token, peak_flops

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 192,
}


@pytest.mark.parametrize("kind", [neobert, bert])
def test_the_formula_counts_what_a_step_does(kind):
    """Against PyTorch's own count of a dense step; norms and activations are not matrix products and are left out."""
    model = kind(**SIZES)
    rows, row_len, masked = 2, 128, 0.25
    # Of attention only the plain form is counted by PyTorch.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        hidden = model(torch.randint(0, 512, (rows, row_len)))
        chosen = hidden.flatten(0, 1)[: int(masked * rows * row_len)]
        model.head(chosen).sum().backward()
    counted = counter.get_total_flops() / (rows * row_len)
    assert mlm_flops_per_token(model, row_len, masked) == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("kind", [gpt2, llama, qwen3])
def test_the_formula_of_decoders_counts_what_a_step_does(kind):
    """Against PyTorch's own count of a dense step, whose plain attention computes the whole square of scores."""
    model = kind(**SIZES)
    rows, row_len = 2, 128
    # Both forms of attention that PyTorch does not count are replaced: by the plain one, without a mask.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, plain_attention():
        hidden = model(torch.randint(0, 512, (rows, row_len)))
        model.head(hidden).sum().backward()
    counted = counter.get_total_flops() / (rows * row_len)
    assert causal_flops_per_token(model, row_len) == pytest.approx(counted, rel=0.05)


def test_of_a_mixture_of_experts_the_chosen_count():
    blocks = nn.ModuleList([nn.Linear(8, 8, bias=False), MoE(16, 24, num_experts=8, num_experts_per_tok=2)])
    assert active_parameters(blocks) == 64 + 8 * 16 + 2 * 3 * 16 * 24


@contextmanager
def plain_attention():
    def backend(*_args, **_settings):
        return AttentionBackend("sdpa")

    with mock.patch.object(transformer, "choose_attention_backend", backend):
        yield


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
