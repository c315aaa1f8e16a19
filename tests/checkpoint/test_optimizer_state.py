import json
import weakref

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch.distributed.checkpoint.metadata import TensorProperties, TensorStorageMetadata

from torchrecipes.checkpoint.optimizer_state import flatten_optimizer, like_stored, unflatten_optimizer
from torchrecipes.checkpoint.tensor_files import iterate_shards, save_shards
from torchrecipes.distributed.fsdp import clip_grad_norm
from torchrecipes.errors import UserError
from torchrecipes.models import llama
from torchrecipes.optim import adamw, adamw_4bit, adamw_8bit, muon, weight_decay_groups
from torchrecipes.optim.cpu_offload_adamw import OffloadedAdamW


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
    unflatten_optimizer(
        load(save(tensors)).items(), json.loads(json.dumps(description)), other_optimizer, other, "here"
    )


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
    ("make", "name"),
    [
        (lambda model: torch.optim.SGD(model.parameters()), "SGD"),
        (lambda model: torch.optim.AdamW([model.matrix]), "one"),
    ],
)
def test_what_does_not_fit_is_named(make, name):
    model = Model()
    tensors, description = flatten_optimizer(torch.optim.AdamW(model.parameters()), model)
    with pytest.raises(UserError) as error:
        unflatten_optimizer(tensors.items(), description, make(model), model, "here")
    assert error.value.code == "other_optimizer" and name in str(error.value) and "init_from=here" in error.value.hint


def test_another_shape_and_a_new_parameter_are_named():
    model, other = Model(), Model()
    other.matrix = nn.Parameter(torch.zeros(3, 5))
    other.added = nn.Parameter(torch.zeros(2))
    tensors, description = flatten_optimizer(torch.optim.AdamW(model.parameters()), model)
    with pytest.raises(UserError) as error:
        unflatten_optimizer(tensors.items(), description, torch.optim.AdamW(other.parameters()), other, "here")
    assert error.value.code == "other_optimizer"
    assert all(part in str(error.value) for part in ("added", "matrix", "[3, 4]", "[3, 5]"))
    with pytest.raises(ValueError):
        flatten_optimizer(torch.optim.AdamW([other.matrix]), model)


@pytest.mark.parametrize("make", [adamw_8bit, adamw_4bit])
def test_plain_values_are_never_all_in_memory(tmp_path, make):
    """As on a GPU, where the plain values of all parameters need not fit: a part at a time."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    optimizer = make(model)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    tensors, description = flatten_optimizer(optimizer, model)
    save_shards(tensors, tmp_path / "optimizer", None)
    part_bytes, total = 2 * 64 * 64 * 4, sum(tensor.nbytes for tensor in tensors.values())
    alive, largest = [], 0

    def like(key, meta):
        nonlocal largest
        tensor = like_stored(key, meta, model)
        alive.append((weakref.ref(tensor.untyped_storage()), tensor.nbytes))
        largest = max(largest, sum(size for storage, size in alive if storage() is not None))
        return tensor

    other = make(model)
    unflatten_optimizer(iterate_shards(tmp_path / "optimizer", like, part_bytes), description, other, model, "here")
    assert largest < 3 * part_bytes < total
    again, _ = flatten_optimizer(other, model)
    assert again.keys() == tensors.keys() and all(torch.equal(tensors[key], again[key]) for key in tensors)


def offloaded(model):
    settings = {"lr": 1e-3, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.01}
    return OffloadedAdamW(weight_decay_groups(model, 0.01), **settings)


def of_trainable(model):
    return torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])


@pytest.mark.parametrize("make", [adamw, adamw_8bit, adamw_4bit, offloaded, muon, of_trainable])
def test_frozen_parameters_have_no_state_and_are_not_changed(make):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = llama(vocab_size=64, **sizes)
    model.embedding.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = make(model)

    def step(model, optimizer):
        model.head(model(torch.arange(32).view(2, 16))).logsumexp(-1).sum().backward()
        norm = clip_grad_norm(model, 1e-3)
        optimizer.step()
        optimizer.zero_grad()
        return norm

    assert step(model, optimizer) > 0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in frozen), name
    tensors, description = flatten_optimizer(optimizer, model)
    assert not any(key.partition(".")[2] in frozen for key in tensors)
    other = llama(vocab_size=64, **sizes)
    other.load_state_dict(model.state_dict())
    other.embedding.requires_grad_(False)
    other.blocks[0].requires_grad_(False)
    other_optimizer = make(other)
    tensors = load(save(tensors))
    unflatten_optimizer(tensors.items(), json.loads(json.dumps(description)), other_optimizer, other, "here")
    assert step(model, optimizer) == step(other, other_optimizer)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name
    thawed = llama(vocab_size=64, **sizes)
    with pytest.raises(UserError) as error:
        unflatten_optimizer(tensors.items(), description, make(thawed), thawed, "here")
    assert error.value.code == "other_optimizer"


def test_a_restored_state_is_described_by_the_same_bytes():
    model = nn.ParameterDict({"scale": torch.ones(()), "weight": torch.ones(3)})
    optimizer = torch.optim.AdamW(model.parameters())
    (model["scale"] * model["weight"]).sum().backward()
    optimizer.step()
    tensors, description = flatten_optimizer(optimizer, model)
    other = torch.optim.AdamW(model.parameters())
    unflatten_optimizer(reversed(tensors.items()), description, other, model, "there")  # files have their own order
    assert json.dumps(flatten_optimizer(other, model)[1]) == json.dumps(description)


def test_the_step_count_of_a_parameter_with_one_element_is_not_sharded_like_it():
    model = nn.ParameterDict({"one": torch.ones(1, device="meta")})  # in the place of a sharded parameter
    stored = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size([1]), [])
    assert like_stored("exp_avg.one", stored, model, ["step.one"]).device.type == "meta"
    assert like_stored("step.one", stored, model, ["step.one"]).device.type == "cpu"
