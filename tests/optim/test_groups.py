import copy

import pytest
import torch
from torch import nn

from torchrecipes.errors import UserError
from torchrecipes.optim import adamw, describe_param_groups, linear, weight_decay_groups


class TinyNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 4))  # one row per head: a matrix by shape only


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(3, 4, 8))
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(3, 8))


class TokenEmbeddings(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(10, 4))
        self.project = nn.Linear(4, 4)


class Model(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.position_embedding = nn.Parameter(torch.zeros(6, 4))
        self.tokens = TokenEmbeddings()
        self.blocks = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(4, 4), "norm": TinyNorm()}) for _ in range(12))
        self.experts = Experts()
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 10)
        if tied:
            self.head.weight = self.embedding.weight


def names(groups):
    return [{name for name, _ in group["params"]} for group in groups]


def test_only_matrices_are_decayed():
    groups = weight_decay_groups(Model(tied=False), 0.1)
    decayed, others = names(groups)
    assert decayed == {
        *(f"blocks.{i}.proj.weight" for i in range(12)),
        "tokens.project.weight",
        "experts.gate_up_proj",
        "head.weight",
    }
    assert others == {name for name, _ in Model(tied=False).named_parameters()} - decayed
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def test_tied_head_is_an_embedding_whichever_comes_first():
    model = Model(tied=True)
    assert "embedding.weight" in names(weight_decay_groups(model, 0.1))[1]
    assert not any("head.weight" in group for group in names(weight_decay_groups(model, 0.1)))
    head_first = nn.ModuleDict({"a_head": nn.Linear(4, 10, bias=False), "embedding": nn.Embedding(10, 4)})
    head_first["embedding"].weight = head_first["a_head"].weight
    (group,) = weight_decay_groups(head_first, 0.1)
    assert group["weight_decay"] == 0 and names([group]) == [{"a_head.weight"}]


def test_frozen_parameters_are_left_out():
    model = Model(tied=False)
    model.blocks.requires_grad_(False)
    kept = set().union(*names(weight_decay_groups(model, 0.1)))
    assert kept == {name for name, p in model.named_parameters() if not name.startswith("blocks.")}


def test_every_parameter_is_in_one_group_of_a_transformers_model():
    from transformers import BertConfig, BertForMaskedLM

    model = BertForMaskedLM(
        BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    )
    decayed, others = names(weight_decay_groups(model, 0.1))
    assert decayed | others == {name for name, _ in model.named_parameters()} and not decayed & others
    assert all(name.endswith("weight") and ("dense" in name or "self" in name) for name in decayed)
    assert len(decayed) == 2 * 6 + 1


def test_table():
    model = nn.Sequential(nn.Embedding(1000, 4), *(nn.Linear(4, 4) for _ in range(11)), nn.LayerNorm(4))
    model[1].weight.requires_grad_(False)
    assert describe_param_groups(adamw(model, lr=3e-4, weight_decay=0.1)) == (
        "group 1: lr 0.0003, weight_decay 0.1, 10 tensors, 160 parameters\n"
        "    *.weight  [4, 4]   10 x 16\n"
        "group 2: lr 0.0003, weight_decay 0, 14 tensors, 4,052 parameters\n"
        "    *.weight  [1000, 4]    1 x 4,000\n"
        "    *.bias    [4]         12 x 4\n"
        "    *.weight  [4]          1 x 4"
    )


def test_table_of_an_optimizer_without_names():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2, 3))], lr=0.1)
    assert describe_param_groups(optimizer).splitlines()[1].split() == ["(no", "name)", "[2,", "3]", "1", "x", "6"]


class Classifier(nn.Module):
    """A BERT's names: an embedding with a norm, three blocks, a final norm, a head with numbered layers."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.embeddings = nn.ModuleDict({"words": nn.Embedding(10, 4), "norm": nn.LayerNorm(4)})
        self.encoder.layer = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(4, 4)}) for _ in range(3))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def test_learning_rates_by_layer():
    """lr * decay^depth, closed form: the head 0, blocks from the last one 1, 2, 3, the embeddings 4."""
    optimizer = adamw(Classifier(), lr=0.1, weight_decay=0.3, layer_lr_decay=0.5)
    rates, decays = {}, {}
    for group in optimizer.param_groups:
        for name in group["param_names"]:
            rates[name], decays[name] = group["lr"], group["weight_decay"]
    depths = {"norm": 0, "head.0": 0, "head.2": 0, "encoder.layer.2": 1, "encoder.layer.1": 2, "encoder.layer.0": 3}
    depths["encoder.embeddings"] = 4
    for name, rate in rates.items():
        (depth,) = [depth for start, depth in depths.items() if name.startswith(f"{start}.")]
        assert rate == 0.1 * 0.5**depth, name
        matrix = name.endswith("weight") and "norm" not in name and "words" not in name
        assert decays[name] == (0.3 if matrix else 0.0), name
    assert len(rates) == len(list(Classifier().named_parameters()))
    assert optimizer.param_groups[0]["lr"] == 0.1  # what is logged
    text = describe_param_groups(optimizer)
    assert "embedding, lr 0.00625" in text and "block 2, lr 0.05" in text


def test_learning_rates_by_layer_follow_a_schedule_and_are_resumed():
    def training():
        torch.manual_seed(0)
        model = Classifier()
        optimizer = adamw(model, lr=0.1, layer_lr_decay=0.5)
        return model, optimizer, linear(optimizer, max_steps=10, warmup_steps=2, min_lr_ratio=0.0)

    def step(model, optimizer, schedule):
        model.head(model.encoder.layer[2]["proj"](model.encoder.embeddings["words"].weight)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    run = training()
    for number in range(1, 7):
        share = min(number / 2, (10 - number) / 8)
        assert [group["lr"] for group in run[1].param_groups] == [
            group["initial_lr"] * share for group in run[1].param_groups
        ]
        step(*run)
        if number == 3:
            saved = copy.deepcopy([obj.state_dict() for obj in run])
    again = training()
    for obj, state in zip(again, saved, strict=True):
        obj.load_state_dict(state)
    for _ in range(3):
        step(*again)
    assert all(torch.equal(a, b) for a, b in zip(run[0].parameters(), again[0].parameters(), strict=True))


@pytest.mark.parametrize("decay", [0.0, 1.1, float("nan")])
def test_a_decay_of_learning_rates_that_is_out_of_range(decay):
    with pytest.raises(UserError) as error:
        adamw(Classifier(), layer_lr_decay=decay)
    assert error.value.key == "layer_lr_decay" and error.value.code == "out_of_range"
