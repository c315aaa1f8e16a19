import pytest
import torch
from torch import nn

from torchrecipes.modules.blocks import transformer_blocks
from torchrecipes.training.activation_checkpointing import apply_activation_checkpointing


class Block(nn.Module):
    def __init__(self, width, experts=0):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(experts))

    def forward(self, *, hidden):
        hidden = self.linear(hidden).relu()
        for expert in self.experts:
            hidden = hidden + expert(hidden)
        return hidden


class Foreign(nn.Module):
    """As `transformers` builds it: an inner model with a list of layers, whose names are its own."""

    def __init__(self, depth=3):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Block(4, experts=5) for _ in range(depth))
        self.adapters = nn.ModuleList([nn.Linear(100, 100), nn.ReLU()])
        self.lm_head = nn.Linear(4, 7)

    def forward(self, hidden):
        for layer in self.model.layers:
            hidden = layer(hidden=hidden)
        return self.lm_head(hidden)


def test_blocks_by_that_name_come_first():
    model = Foreign()
    model.blocks = nn.ModuleList([nn.Linear(1, 1), nn.ReLU()])
    assert transformer_blocks(model) is model.blocks


@pytest.mark.parametrize("depth", [1, 3])
def test_else_the_largest_list_of_one_class(depth):
    model = Foreign(depth)
    assert transformer_blocks(model) is model.model.layers


def test_else_the_model_itself():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    assert list(transformer_blocks(model)) == [model]


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("make", [Foreign, lambda: nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 7))])
def test_any_module_is_checkpointed(make, mode):
    torch.manual_seed(0)
    model = make()
    inputs = torch.randn(2, 4)
    gradients = []
    for changed in (False, True):
        if changed:
            apply_activation_checkpointing(model, mode)
        model.zero_grad()
        model(inputs).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
