import json

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from torchrecipes.checkpoint.optimizer_state import flatten_optimizer, unflatten_optimizer
from torchrecipes.errors import UserError


class Model(nn.Module):
    """Parameters of every awkward shape: none, one element, and one that gets no gradient."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(3, 4))
        self.one = nn.Parameter(torch.randn(1))
        self.gate = nn.Parameter(torch.randn(()))
        self.unused = nn.Parameter(torch.randn(2))

    def loss(self):
        return (self.matrix.tanh().sum() * self.gate + self.one.sum()).tanh()


MAKERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "plain": lambda p: torch.optim.SGD(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1)),
}


def train(model, optimizer, steps):
    for _ in range(steps):
        model.loss().backward()
        optimizer.step()
        optimizer.zero_grad()


def copied(model, optimizer, other, other_optimizer):
    """Through what safetensors and JSON keep."""
    tensors, description = flatten_optimizer(optimizer, model)
    assert all(tensor.dim() for tensor in tensors.values())
    unflatten_optimizer(load(save(tensors)), json.loads(json.dumps(description)), other_optimizer, other, "here")


@pytest.mark.parametrize("name", MAKERS)
def test_every_value_comes_back_and_training_goes_on_to_the_last_bit(name):
    make = MAKERS[name]
    model = Model()
    optimizer = make(model.parameters())
    train(model, optimizer, 3)
    other = Model()
    other.load_state_dict(model.state_dict())
    other_optimizer = make(other.parameters())
    copied(model, optimizer, other, other_optimizer)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        state, same = optimizer.state.get(ours, {}), other_optimizer.state.get(theirs, {})
        assert state.keys() == same.keys()
        for kind, value in state.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == same[kind].dtype and torch.equal(value, same[kind]), kind
            else:
                assert value == same[kind] and type(value) is type(same[kind]), kind
    train(model, optimizer, 2)
    train(other, other_optimizer, 2)
    assert not torch.equal(model.matrix, Model().matrix)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_order_of_parameters_and_the_groups_may_change():
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 2)
    groups = [{"params": [model.gate, model.unused]}, {"params": [model.one, model.matrix], "lr": 0.5, "eps": 1e-5}]
    other_optimizer = torch.optim.AdamW(groups)
    copied(model, optimizer, model, other_optimizer)
    for parameter in (model.matrix, model.one, model.gate):
        for kind, value in optimizer.state[parameter].items():
            assert torch.equal(value, other_optimizer.state[parameter][kind])
    assert other_optimizer.param_groups[1]["lr"] == 1e-3  # what a scheduler had set
    assert other_optimizer.param_groups[1]["eps"] == 1e-5


def test_a_state_in_another_dtype_than_its_parameter_keeps_it():
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    train(model, optimizer, 1)
    optimizer.state[model.matrix]["momentum_buffer"] = torch.randn(3, 4).bfloat16()
    optimizer.state[model.one]["count"] = 7
    other = torch.optim.SGD(model.parameters(), momentum=0.9)
    copied(model, optimizer, model, other)
    buffer = other.state[model.matrix]["momentum_buffer"]
    assert buffer.dtype == torch.bfloat16
    assert torch.equal(buffer, optimizer.state[model.matrix]["momentum_buffer"])
    assert other.state[model.one]["count"] == 7


def test_settings_are_described_and_stay_those_of_the_run():
    model = Model()
    optimizer = torch.optim.AdamW([{"params": [model.matrix], "weight_decay": 0.5}, {"params": [model.one]}], lr=0.25)
    _, description = flatten_optimizer(optimizer, model)
    first, second = description["groups"]
    assert (first["weight_decay"], first["lr"], first["betas"]) == (0.5, 0.25, [0.9, 0.999])
    assert first["parameters"] == {"matrix": [3, 4]} and second["parameters"] == {"one": [1]}
    assert description["class"] == "AdamW"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: torch.optim.SGD(model.parameters()), r"it is of AdamW, this run's optimizer is SGD"),
        (lambda model: torch.optim.AdamW([model.matrix]), r"one was trained there and is not here.*init_from=here"),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    model = Model()
    tensors, description = flatten_optimizer(torch.optim.AdamW(model.parameters()), model)
    with pytest.raises(UserError, match=message):
        unflatten_optimizer(tensors, description, make(model), model, "here")


def test_another_shape_and_a_new_parameter_are_named():
    model, other = Model(), Model()
    other.matrix = nn.Parameter(torch.zeros(3, 5))
    other.added = nn.Parameter(torch.zeros(2))
    tensors, description = flatten_optimizer(torch.optim.AdamW(model.parameters()), model)
    expected = r"added is trained here and was not there; matrix is \[3, 4\] there and \[3, 5\] here"
    with pytest.raises(UserError, match=expected):
        unflatten_optimizer(tensors, description, torch.optim.AdamW(other.parameters()), other, "here")
    with pytest.raises(ValueError, match=r"a parameter \[3, 5\] that the model does not have"):
        flatten_optimizer(torch.optim.AdamW([other.matrix]), model)
