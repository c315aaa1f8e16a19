import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests import ranks
from torchrecipes.checkpoint.quantized_state import from_plain, to_plain
from torchrecipes.optim import adamw, adamw_4bit, adamw_8bit

BOTH = pytest.mark.parametrize("make", [adamw_8bit, adamw_4bit])


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.Linear(128, 64))


def train(net, optimizer, first, steps):
    for step in range(first, first + steps):
        torch.manual_seed(step)
        x = torch.randn(8, 64)
        (net(x) - x.roll(1, -1)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def local(x):
    return x.to_local() if isinstance(x, DTensor) else x


def parts(state):
    state = local(state)
    return [state.codes, state.scale, state.qmap] if hasattr(state, "qmap") else [state]


def equal(state, other):
    pairs = zip(parts(state), parts(other), strict=True)
    return type(local(state)) is type(local(other)) and all(torch.equal(a, b) for a, b in pairs)


def plain_states(optimizer):
    return {p: {kind: to_plain(value) for kind, value in state.items()} for p, state in optimizer.state.items()}


def restored(make, net, plain, source):
    """An optimizer of `net` with the plain states of another model's parameters."""
    optimizer = make(net)
    for parameter, other in zip(net.parameters(), source.parameters(), strict=True):
        states = plain[other].items()
        optimizer.state[parameter] = {kind: from_plain(optimizer, parameter, kind, x.clone()) for kind, x in states}
    return optimizer


@BOTH
@pytest.mark.parametrize("kind", ["exp_avg", "exp_avg_sq"])
def test_what_was_read_is_written_as_it_was(make, kind):
    """Blocks of all magnitudes, dense and sparse, some smaller than the least scale."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.zeros(512, 256))
    optimizer = make(nn.ParameterList([parameter]))
    for power in range(-36, 33, 4):
        values = torch.randn(512, 256) * 10.0 ** (power + 4 * torch.rand(512, 1) - 6 * torch.rand(512, 256))
        values = torch.where(torch.rand(512, 1) < torch.rand(512, 256), values, 0)
        state = from_plain(optimizer, parameter, kind, values if kind == "exp_avg" else values.abs())
        assert equal(from_plain(optimizer, parameter, kind, to_plain(state)), state)


@BOTH
def test_a_resumed_run_is_bit_equal(make):
    whole = network()
    optimizer = make(whole)
    train(whole, optimizer, 0, 6)
    first, second = network(), network()
    begun = make(first)
    train(first, begun, 0, 3)
    second.load_state_dict(first.state_dict())
    plain = plain_states(begun)
    assert {x.dtype for state in plain.values() for x in state.values()} == {torch.float32}
    assert {type(x) for state in plain.values() for x in state.values()} == {torch.Tensor}
    resumed = restored(make, second, plain, first)
    assert all(
        equal(resumed.state[q][kind], begun.state[p][kind])
        for p, q in zip(first.parameters(), second.parameters(), strict=True)
        for kind in ("step", "exp_avg", "exp_avg_sq")
    )
    train(second, resumed, 3, 3)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), second.parameters(), strict=True))
    assert sum(hasattr(x, "qmap") for state in resumed.state.values() for x in state.values()) == 4


def test_other_optimizers_keep_their_state():
    net = network()
    optimizer = adamw(net)
    train(net, optimizer, 0, 1)
    for parameter, state in optimizer.state.items():
        for kind, value in state.items():
            assert to_plain(value) is value
            assert from_plain(optimizer, parameter, kind, value) is value


def two_ranks():
    found = []
    for make in (adamw_8bit, adamw_4bit):
        nets = [network() for _ in range(2)]
        for net in nets:
            fully_shard(net)
        train(nets[0], optimizer := make(nets[0]), 0, 3)
        nets[1].load_state_dict(nets[0].state_dict())
        plain = plain_states(optimizer)
        resumed = restored(make, nets[1], plain, nets[0])
        same = all(
            equal(resumed.state[q][kind], optimizer.state[p][kind])
            for p, q in zip(*(net.parameters() for net in nets), strict=True)
            for kind in ("step", "exp_avg", "exp_avg_sq")
        )
        train(nets[0], optimizer, 3, 2)
        train(nets[1], resumed, 3, 2)
        for p, q in zip(*(net.parameters() for net in nets), strict=True):
            same = same and torch.equal(local(p), local(q))
        # The same state on one process: the blocks of a half are blocks of the whole here, so nothing is lost.
        alone = network()
        whole = [
            {kind: x.full_tensor() if isinstance(x, DTensor) else x for kind, x in plain[p].items()}
            for p in nets[0].parameters()
        ]
        optimizer = restored(make, alone, dict(zip(alone.parameters(), whole, strict=True)), alone)
        for p, state in zip(alone.parameters(), whole, strict=True):
            same = same and all(torch.equal(to_plain(optimizer.state[p][kind]), x) for kind, x in state.items())
            same = same and (p.dim() < 2 or hasattr(optimizer.state[p]["exp_avg"], "qmap"))
        found.append(same)
    return found


def test_on_two_ranks_and_from_there_on_one():
    assert ranks.call(two_ranks) == [[True, True], [True, True]]
