"""The load of experts against counts made by hand, and the bias that evens it out."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from tests import ranks
from torchrecipes.modules import MoE, Routing
from torchrecipes.training.expert_load_balancing import ExpertBalance


class Layers(nn.Module):
    """Two layers of experts on the same tokens."""

    def __init__(self, num_experts=4, bias=True, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(MoE(16, 16, num_experts, 2, router_bias=bias) for _ in range(2))
        for layer in self.layers:
            nn.init.normal_(layer.gate.weight, std=1.0)
        self.routing = None

    def forward(self, x):
        routings = [layer(x)[1] for layer in self.layers]
        self.routing = Routing(*(torch.stack(values) for values in zip(*routings, strict=True)))


def chosen(layer, x):
    """How many of the tokens every expert gets."""
    scores = (x.double() @ layer.gate.weight.double().T).softmax(-1) + layer.gate.e_score_correction_bias.double()
    return torch.bincount(scores.topk(2).indices.flatten(), minlength=layer.num_experts)


def test_the_report_counts_all_micro_batches_since_the_last():
    model, batches = Layers(), [torch.randn(40, 16) for _ in range(4)]
    balance = ExpertBalance(model, update_rate=0.0)
    for step in range(2):
        for x in batches[2 * step : 2 * step + 2]:
            model(x)
            balance.add(model)
        balance.step()
    report = balance.metrics()
    for number, layer in enumerate(model.layers):
        counts = sum(chosen(layer, x) for x in batches).double()
        load = counts / counts.sum()
        assert report[f"moe/{number}/load"] == pytest.approx(load.tolist())
        assert report[f"moe/{number}/max_violation"] == pytest.approx(float(counts.max() / counts.mean() - 1), rel=1e-5)
        assert report[f"moe/{number}/unused"] == 0
        distribution = [(x.double() @ layer.gate.weight.double().T).softmax(-1) for x in batches]
        entropy = sum(-(p * p.log()).sum(-1).mean() for p in distribution) / 4
        assert report[f"moe/{number}/entropy"] == pytest.approx(entropy.item(), rel=1e-5)
    assert report["moe/max_violation"] == max(report[f"moe/{number}/max_violation"] for number in range(2))
    assert balance.metrics() == {}, "it begins anew"


def test_experts_without_tokens_are_counted():
    model = Layers(num_experts=8)
    x = torch.randn(1, 16).expand(30, 16)
    balance = ExpertBalance(model)
    model(x)
    balance.add(model)
    balance.step()
    report = balance.metrics()
    assert report["moe/0/unused"] == 6 and report["moe/unused"] == 12
    assert report["moe/max_violation"] == pytest.approx(3.0)


def test_the_bias_moves_against_the_load_and_its_mean_stays_zero():
    model, x = Layers(), torch.randn(50, 16)
    before = [chosen(layer, x) for layer in model.layers]
    balance = ExpertBalance(model, update_rate=0.01)
    model(x)
    balance.add(model)
    balance.step()
    for layer, counts in zip(model.layers, before, strict=True):
        sign = (counts.float().mean() - counts).sign()
        bias = layer.gate.e_score_correction_bias
        assert torch.allclose(bias, 0.01 * (sign - sign.mean()))
    kept = [layer.gate.e_score_correction_bias.clone() for layer in model.layers]
    model(x)
    balance.add(model)
    balance.step(skipped=torch.ones(()))
    assert all(torch.equal(a, layer.gate.e_score_correction_bias) for a, layer in zip(kept, model.layers, strict=True))


def test_the_bias_evens_out_a_skewed_router():
    model = Layers(num_experts=8)
    for layer in model.layers:
        nn.init.normal_(layer.gate.weight, std=0.1)
    x = torch.randn(256, 16) + torch.randn(16)  # tokens that have something in common, which a few experts get
    balance = ExpertBalance(model, update_rate=0.001)

    def violation():
        model(x)
        balance.add(model)
        balance.step()
        return balance.metrics()["moe/max_violation"]

    first = violation()
    for _ in range(300):
        last = violation()
    assert first > 1 and last < 0.2, (first, last)


def test_a_dense_model_has_nothing_to_balance():
    balance = ExpertBalance(nn.Linear(2, 2))
    balance.add(None)
    balance.step()
    assert balance.metrics() == {}


SCRIPT = f"""
import sys

import torch

sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.training.test_expert_load_balancing import Layers
from torchrecipes.distributed import collectives
from torchrecipes.training.expert_load_balancing import ExpertBalance

torch.distributed.init_process_group("gloo")
model = Layers()
balance = ExpertBalance(model, update_rate=0.01)
x = torch.randn(3, 60, 16, generator=torch.Generator().manual_seed(1))
for step in range(3):
    model(x[step].chunk(collectives.world_size())[collectives.rank()])
    balance.add(model)
    balance.step()
print([layer.gate.e_score_correction_bias.tolist() for layer in model.layers], balance.metrics()["moe/0/load"])
torch.distributed.destroy_process_group()
"""


def test_the_biases_do_not_depend_on_the_number_of_ranks(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    alone, pair = (ranks.run(tmp_path / "script.py", world_size) for world_size in (1, 2))
    assert alone[0] == pair[0] == pair[1]


def test_entropy_of_a_router_that_knows_nothing_is_log_e():
    model = Layers()
    for layer in model.layers:
        nn.init.zeros_(layer.gate.weight)
    model(torch.randn(5, 16))
    assert model.routing.entropy.tolist() == pytest.approx([math.log(4)] * 2)
