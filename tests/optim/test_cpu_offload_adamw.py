import copy

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from tests import ranks
from torchrecipes.errors import UserError
from torchrecipes.optim import adamw, adamw_cpu_offload, linear
from torchrecipes.optim.adamw_variants import adamw_groups
from torchrecipes.optim.cpu_offload_adamw import OffloadedAdamW

SETTINGS = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(16, 32), nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 16))


def offloaded(net):
    return OffloadedAdamW(adamw_groups(net, **SETTINGS), **SETTINGS)


def train(net, optimizer, steps, first=1):
    scheduler = linear(optimizer, 10, warmup_steps=2)
    scheduler.load_state_dict({"last_epoch": first - 1})
    for step in range(first, first + steps):
        torch.manual_seed(step)
        tokens = torch.randint(16, (8,))
        for half in tokens.chunk(2):  # micro-batches
            nn.functional.cross_entropy(net(half), half.flip(0)).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return list(net.parameters())


def test_steps_are_bit_equal_to_fused_adamw_with_clipping_and_accumulation():
    net, expected = model(), model()
    ours = train(net, offloaded(net), 5)
    for parameter, other in zip(ours, train(expected, adamw(expected, **SETTINGS), 5), strict=True):
        assert torch.equal(parameter, other)


def test_weights_that_are_loaded_later_are_the_ones_that_are_trained():
    net, source = model(), model()
    optimizer = offloaded(net)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(2)
    net.load_state_dict(source.state_dict())
    for parameter, other in zip(train(net, optimizer, 1), train(source, adamw(source, **SETTINGS), 1), strict=True):
        assert torch.equal(parameter, other)


def test_a_state_goes_on_where_it_was():
    whole = model()
    expected = train(whole, offloaded(whole), 6)
    first = model()
    optimizer = offloaded(first)
    train(first, optimizer, 3)
    state = copy.deepcopy(optimizer.state_dict())
    second = model()
    second.load_state_dict(first.state_dict())
    resumed = offloaded(second)
    resumed.load_state_dict(state)
    for parameter, other in zip(train(second, resumed, 3, first=4), expected, strict=True):
        assert torch.equal(parameter, other)


def test_parameters_without_a_gradient_stay():
    net = nn.Linear(2, 2)
    before = copy.deepcopy(net.state_dict())
    optimizer = offloaded(net)
    optimizer.step()
    assert not optimizer.state
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_without_a_gpu_the_message_says_what_to_use():
    with pytest.raises(UserError) as error:
        adamw_cpu_offload(nn.Linear(2, 2))
    assert error.value.code == "not_on_cuda"


@pytest.mark.gpu
def test_on_a_gpu_the_averages_are_on_the_cpu_and_stay_there():
    net, expected = model().cuda(), model()
    optimizer = adamw_cpu_offload(net, **SETTINGS)
    reference = adamw(expected, **SETTINGS)
    for step in range(3):
        torch.manual_seed(step)
        for parameter, other in zip(net.parameters(), expected.parameters(), strict=True):
            other.grad = torch.randn_like(other)
            parameter.grad = other.grad.cuda()
        optimizer.step()
        reference.step()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter, other in zip(net.parameters(), expected.parameters(), strict=True):
        assert torch.equal(parameter.cpu(), other)
        assert {value.device.type for value in optimizer.state[parameter].values()} == {"cpu"}


def two_ranks():
    net, expected = model(), model()
    fully_shard(net)
    optimizer, reference = offloaded(net), adamw(expected, **SETTINGS)
    same = True
    for _ in range(3):
        for parameter, other in zip(net.parameters(), expected.parameters(), strict=True):
            other.grad = torch.randn_like(other)
            parameter.grad = distribute_tensor(other.grad, parameter.device_mesh, parameter.placements)
        optimizer.step()
        reference.step()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter, other in zip(net.parameters(), expected.parameters(), strict=True):
        same = same and torch.equal(parameter.full_tensor(), other)
        ours, theirs = optimizer.state[parameter]["exp_avg"], reference.state[other]["exp_avg"]
        same = same and ours.placements == parameter.placements and torch.equal(ours.full_tensor(), theirs)
    return same


def test_sharded_weights():
    assert ranks.call(two_ranks) == [True, True]
