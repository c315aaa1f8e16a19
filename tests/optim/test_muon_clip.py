import copy
import json

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from tests import ranks
from torchrecipes.errors import UserError
from torchrecipes.models import llama, qwen3
from torchrecipes.modules import SelfAttention, choose_attention_backend
from torchrecipes.optim import muon
from torchrecipes.training.activation_checkpointing import apply_activation_checkpointing

TAU = 5.0
STILL = {"lr": 0.0, "adamw_lr": 0.0}  # so that what is seen after the step is the clip alone


def model(layers=2, bias=True, key_heads=2, **config):
    torch.manual_seed(0)
    net = llama(
        vocab_size=31,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=key_heads,
        intermediate_size=24,
        attention_bias=bias,
        **config,
    )
    with torch.no_grad():
        for number, block in enumerate(net.blocks):
            projection = block.self_attn.qkv_proj
            projection.weight.normal_()
            projection.weight[:4] *= 0.05  # a head that stays far below tau
            if bias:
                projection.bias.normal_()
                projection.bias[:4] *= 0.05
            projection.weight[8:12] *= 3 + number
    return net


TOKENS = torch.randint(31, (3, 20), generator=torch.Generator().manual_seed(1))


def logits(net, tokens=TOKENS):
    """Largest logit of every layer and head, in float64: [layers, N]."""
    net = copy.deepcopy(net).double()
    found = []

    def look(layer, arguments):
        x, rotary = arguments[:2]
        qkv = layer.qkv_proj(x).unflatten(-1, (-1, layer.head_dim))
        q, k = qkv.split([layer.num_heads, layer.num_kv_heads, layer.num_kv_heads], dim=2)[:2]
        if rotary is not None:
            from torchrecipes.modules import apply_rotary

            q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        k = k.repeat_interleave(layer.num_heads // layer.num_kv_heads, dim=2)
        scores = torch.einsum("bsnh,btnh->bnst", q, k) * layer.head_dim**-0.5
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        found.append(scores.masked_fill(hidden, float("-inf")).amax(dim=(0, 2, 3)))

    for block in net.blocks:
        block.self_attn.register_forward_pre_hook(look)
    with torch.no_grad():
        net(tokens)
    return torch.stack(found)


def step(net, optimizer, *micro_batches):
    for tokens in micro_batches or (TOKENS,):
        net.head(net(tokens)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_the_largest_logit_comes_down_to_tau_and_heads_below_it_stay(key_heads, bias):
    net = model(layers=1, bias=bias, key_heads=key_heads)
    before = logits(net)
    step(net, muon(net, **STILL, qk_clip_tau=TAU))
    after = logits(net)
    assert (before > TAU).any() and (before < TAU).any()
    torch.testing.assert_close(after, before.clamp(max=TAU), rtol=1e-4, atol=1e-6)
    assert after.max() <= TAU * (1 + 1e-3)


def test_queries_and_keys_share_the_factor_and_values_stay():
    net = model(layers=1, key_heads=4)
    before = copy.deepcopy(net.blocks[0].self_attn.qkv_proj.state_dict())
    gamma = (TAU / logits(net)[0]).clamp(max=1).sqrt().float()
    step(net, muon(net, **STILL, qk_clip_tau=TAU))
    rows = torch.cat((gamma, gamma, torch.ones(4))).repeat_interleave(4)
    after = net.blocks[0].self_attn.qkv_proj
    torch.testing.assert_close(after.weight, before["weight"] * rows[:, None], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after.bias, before["bias"] * rows, rtol=1e-5, atol=1e-6)
    assert torch.equal(after.weight[32:], before["weight"][32:])


def test_the_maximum_is_over_all_micro_batches():
    net = model(layers=1)
    halves = TOKENS[:1], TOKENS[1:]
    largest = torch.maximum(*(logits(net, half) for half in halves))
    for order in (halves, halves[::-1]):
        one = copy.deepcopy(net)
        step(one, muon(one, **STILL, qk_clip_tau=TAU), *order)
        torch.testing.assert_close(logits(one), largest.clamp(max=TAU), rtol=1e-4, atol=1e-6)


def test_logits_seen_before_gradients_were_thrown_away_do_not_count():
    """As in a trial of how many rows fit, or after a step that was skipped."""
    net = model(layers=1)
    other = copy.deepcopy(net)
    optimizer = muon(net, **STILL, qk_clip_tau=TAU)
    net.head(net(TOKENS.flip(1))).square().mean().backward()
    optimizer.zero_grad()
    step(net, optimizer)
    step(other, muon(other, **STILL, qk_clip_tau=TAU))
    for name, parameter in other.named_parameters():
        assert torch.equal(net.get_parameter(name), parameter), name


def test_below_tau_it_is_muon_to_the_bit():
    ours, theirs = model(), model()
    for net, clip in ((ours, {"qk_clip_tau": 1e4}), (theirs, {})):
        optimizer = muon(net, **clip)
        for _ in range(3):
            step(net, optimizer)
    assert logits(ours).max() < 1e4
    for parameter, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(parameter, expected)


def test_every_third_step_and_after_a_resume():
    def clips(net, optimizer, first, last):
        found = []
        for number in range(first, last + 1):
            attention = net.blocks[0].self_attn
            watched = attention.max_logits is not None
            with torch.no_grad():
                attention.qkv_proj.weight[8:12] *= 40  # past tau again
            step(net, optimizer)
            clipped = bool(logits(net)[0].max() <= TAU * 1.001)
            assert clipped == watched
            found += [number] if clipped else []
        return found

    settings = STILL | {"qk_clip_tau": TAU, "qk_clip_every": 3}
    net = model(layers=1)
    optimizer = muon(net, **settings)
    assert clips(net, optimizer, 1, 4) == [3]
    resumed = copy.deepcopy(net)
    fresh = muon(resumed, **settings)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert clips(resumed, fresh, 5, 9) == [6, 9]


def test_evaluation_does_not_count_and_what_is_not_finite_neither():
    net = model(layers=1, key_heads=4)
    optimizer = muon(net, **STILL, qk_clip_tau=TAU)
    watched = net.blocks[0].self_attn.max_logits
    net.eval()
    net(TOKENS)
    assert (watched == float("-inf")).all()
    net.train()
    with torch.no_grad():
        net.blocks[0].self_attn.qkv_proj.weight[0, 0] = float("nan")
    before = net.blocks[0].self_attn.qkv_proj.weight.detach().clone()
    net(TOKENS)
    optimizer.step()
    after = net.blocks[0].self_attn.qkv_proj.weight.detach()
    assert torch.equal(after[1:4], before[1:4]) and after[4:16].isfinite().all()


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_with_activation_checkpointing(mode):
    ours, theirs = model(), model()
    apply_activation_checkpointing(ours, mode)
    for net in (ours, theirs):
        step(net, muon(net, qk_clip_tau=TAU))
    for parameter, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(parameter, expected)


def test_compiled_blocks_have_two_graphs(monkeypatch):
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    ours, theirs = model(layers=3), model(layers=3)
    for block in ours.blocks:
        block.compile(backend=count)
    for net in (ours, theirs):
        optimizer = muon(net, **STILL, qk_clip_tau=TAU, qk_clip_every=2)
        for _ in range(6):
            step(net, optimizer)
    assert len(graphs) == 2
    for parameter, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_compiled_checkpointing_does_not_scan_again_in_the_backward_pass(mode):
    scans = {"forward": 0, "backward": 0}

    def counting(kind):
        def compiler(graph, _inputs):
            targets = [f"{node.target} {node.args[:1]}" for node in graph.graph.nodes]
            scans[kind] += sum("record_max_logits" in target for target in targets)
            return make_boxed_func(graph.forward)

        return compiler

    torch.compiler.reset()
    net = model(layers=2)
    apply_activation_checkpointing(net, mode)
    backend = aot_autograd(
        fw_compiler=counting("forward"),
        bw_compiler=counting("backward"),
        partition_fn=min_cut_rematerialization_partition,
    )
    for block in net.blocks:
        block.compile(backend=backend)
    step(net, muon(net, **STILL, qk_clip_tau=TAU))
    assert scans["forward"] > 0 and scans["backward"] == 0


def test_a_norm_of_queries_and_keys_is_refused():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
    model = qwen3(vocab_size=31, **sizes, num_key_value_heads=2, head_dim=4)
    with pytest.raises(UserError) as error:
        muon(model, qk_clip_tau=100)
    assert (error.value.key, error.value.code) == ("qk_clip_tau", "no_logits_to_clip")
    assert "blocks.0.self_attn" in str(error.value)


def test_wrong_values_are_all_named():
    with pytest.raises(UserError) as error:
        muon(nn.Linear(3, 3), lr=-1.0, qk_clip_tau=0.0, qk_clip_every=0)
    keys = sorted(problem.key for problem in error.value.problems)
    assert keys == ["adamw_lr", "lr", "qk_clip_every", "qk_clip_tau", "qk_clip_tau"]


def test_any_attention_of_this_library():
    layer = SelfAttention(16, 4, num_kv_heads=2)
    optimizer = muon(layer, **STILL, qk_clip_tau=1e-3)
    x = torch.randn(2, 10, 16)
    plan = choose_attention_backend((2, 10), device=x.device, dtype=x.dtype)
    layer(x, None, plan).sum().backward()
    before = layer.max_logits
    optimizer.step()
    layer(x, None, plan)
    torch.testing.assert_close(layer.max_logits, before.clamp(max=1e-3), rtol=1e-4, atol=1e-7)


SCRIPT = """
import json, sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torchrecipes.models import llama
from torchrecipes.optim import muon
from torchrecipes.error_file import hard_exit

dist.init_process_group("gloo")
rank = dist.get_rank()

def train(mesh):
    net = llama(vocab_size=31, hidden_size=12, num_hidden_layers=2, num_attention_heads=6,
                num_key_value_heads=2, intermediate_size=24, attention_bias=True)  # 20 rows, 3 ranks
    torch.manual_seed(0)
    with torch.no_grad():
        for block in net.blocks:
            block.self_attn.qkv_proj.weight.normal_(std=3)
            block.self_attn.qkv_proj.bias.normal_()
    if mesh is not None:
        for block in net.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(net, mesh=mesh)
    optimizer = muon(net, lr=1e-3, ns_dtype="fp32", qk_clip_tau=5.0, qk_clip_every=2)
    tokens = torch.randint(31, (6, 20), generator=torch.Generator().manual_seed(1))
    for step in range(4):
        mine = tokens if mesh is None else tokens.chunk(3)[rank]
        net.head(net(mine)).square().mean().backward()
        if step % 2:
            largest = torch.cat([block.self_attn.max_logits for block in net.blocks])
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.full_tensor() if mesh is not None else p for n, p in net.named_parameters()}, largest

expected, largest = train(None)
assert largest.max() > 5
mesh = DeviceMesh("cpu", torch.arange(3), mesh_dim_names=("shard",))
found, mine = train(mesh)
for name, value in found.items():
    torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4, msg=lambda m: f"{name}: {m}")
print(json.dumps(bool((mine < largest - 1e-3).any())))
dist.barrier()
hard_exit(0)
"""


def test_three_ranks_clip_as_one_by_the_largest_logit_of_all(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    assert any(json.loads(out.splitlines()[-1]) for out in ranks.run(script, 3))  # no rank saw all the largest
