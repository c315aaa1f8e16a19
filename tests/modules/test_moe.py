"""The mixture of experts against a plain float64 loop over tokens and experts."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchrecipes.modules import MoE
from torchrecipes.modules import moe as moe_module
from torchrecipes.modules.expert_dispatch import dispatch
from torchrecipes.modules.grouped_swiglu import swiglu_backward
from torchrecipes.modules.moe import load_balancing_loss, router_z_loss

KINDS = {
    "softmax": {},
    "not normalized": {"norm_topk_prob": False},
    "sigmoid": {"scoring_func": "sigmoid"},
    "bias": {"scoring_func": "sigmoid", "router_bias": True},
    "mlp router": {"router": "mlp"},
    "shared expert": {"shared_intermediate_size": 32},
}


def made(num_experts=4, num_chosen=2, seed=0, **settings):
    torch.manual_seed(seed)
    moe = MoE(16, 24, num_experts, num_chosen, **settings)
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=0.3)
    if moe.gate.e_score_correction_bias is not None:
        nn.init.normal_(moe.gate.e_score_correction_bias, std=0.5)
    return moe


def by_loops(moe, x, weights):
    """The same by the definition; `weights` are the parameters by name, in float64."""
    hidden = x if moe.gate.proj is None else F.silu(x @ weights["gate.proj.weight"].T)
    logits = hidden @ weights["gate.weight"].T
    scores = logits.softmax(-1) if moe.scoring_func == "softmax" else logits.sigmoid()
    bias = moe.gate.e_score_correction_bias
    chosen = (scores if bias is None else scores + bias.double()).topk(moe.num_experts_per_tok).indices
    rows = []
    for token, experts in enumerate(chosen.tolist()):
        total = sum(scores[token, expert] for expert in experts) if moe.norm_topk_prob else 1
        row = 0
        for expert in experts:
            gate, up = (weights["experts.gate_up_proj"][expert] @ x[token]).chunk(2)
            out = weights["experts.down_proj"][expert] @ (F.silu(gate) * up)
            row = row + scores[token, expert] / total * out
        if moe.shared_expert is not None:
            gate, up = (weights["shared_expert.gate_up_proj.weight"] @ x[token]).chunk(2)
            row = row + weights["shared_expert.down_proj.weight"] @ (F.silu(gate) * up)
        rows.append(row)
    return torch.stack(rows)


def assert_equals_loops(moe, x, tolerance=2e-5):
    x = x.requires_grad_()
    out, _ = moe(x)
    direction = torch.randn_like(out)
    out.backward(direction)
    wide = {name: parameter.detach().double().requires_grad_() for name, parameter in moe.named_parameters()}
    x_wide = x.detach().double().requires_grad_()
    expected = by_loops(moe, x_wide.flatten(0, -2), wide).view(x.shape)
    expected.backward(direction.double())
    assert (out - expected).abs().max() < tolerance
    assert (x.grad - x_wide.grad).abs().max() < tolerance
    for name, parameter in moe.named_parameters():
        theirs = wide[name].grad if wide[name].grad is not None else torch.zeros_like(wide[name])
        assert (parameter.grad - theirs).abs().max() < tolerance, name


@pytest.fixture(params=["cpu", "cuda"])
def kernels(request, monkeypatch):
    """Whose kernels to use, on tensors of the CPU."""
    monkeypatch.setattr(moe_module, "kernel_device", lambda device: request.param)
    return request.param


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_experts", "num_chosen"), [(4, 2), (4, 1), (4, 4), (16, 2)])
@pytest.mark.usefixtures("kernels")
def test_output_and_gradients_are_those_of_a_loop(kind, num_experts, num_chosen):
    assert_equals_loops(made(num_experts, num_chosen, **KINDS[kind]), torch.randn(2, 5, 16))


@pytest.mark.usefixtures("kernels")
def test_one_token_and_experts_without_any():
    assert_equals_loops(made(8), torch.randn(1, 16))


@pytest.mark.usefixtures("kernels")
def test_all_tokens_to_one_expert():
    moe = made(num_chosen=1)
    with torch.no_grad():
        moe.gate.weight.zero_()
        moe.gate.weight[2] = 1.0
    x = torch.rand(6, 16) + 0.1
    assert moe(x)[1].tokens_per_expert.tolist() == [0, 0, 6, 0]
    assert_equals_loops(moe, x)


def test_the_bias_decides_the_choice_and_not_the_weights():
    moe = made(num_chosen=1, norm_topk_prob=False, router_bias=True)
    with torch.no_grad():
        moe.gate.e_score_correction_bias.copy_(torch.tensor([0.0, 0.0, 10.0, 0.0]))
    x = torch.randn(7, 16)
    out, routing = moe(x)
    assert routing.tokens_per_expert.tolist() == [0, 0, 7, 0]
    share = (x @ moe.gate.weight.T).softmax(-1)[:, 2:3]
    gate, up = (x @ moe.experts.gate_up_proj[2].T).chunk(2, -1)
    assert torch.allclose(out, share * ((F.silu(gate) * up) @ moe.experts.down_proj[2].T), atol=1e-5)


def test_routing_by_its_definitions():
    moe, x = made(num_experts=8), torch.randn(50, 16)
    routing = moe(x)[1]
    probability = (x.double() @ moe.gate.weight.double().T).softmax(-1)
    counts = torch.bincount(probability.topk(2).indices.flatten(), minlength=8)
    assert routing.tokens_per_expert.tolist() == counts.tolist()
    aux = 8 * (counts / 50 * probability.mean(0)).sum()
    assert routing.aux_loss.item() == pytest.approx(aux.item(), rel=1e-5)
    z = (x.double() @ moe.gate.weight.double().T).exp().sum(-1).log().square().mean()
    assert routing.z_loss.item() == pytest.approx(z.item(), rel=1e-5)
    entropy = -(probability * probability.log()).sum(-1).mean()
    assert routing.entropy.item() == pytest.approx(entropy.item(), rel=1e-5)


def test_the_losses_where_they_are_known():
    even = torch.full((12, 4), 0.25)
    chosen = torch.eye(4).repeat(3, 1)
    assert load_balancing_loss(even, chosen).item() == pytest.approx(1.0)
    one = torch.zeros(12, 4)
    one[:, 1] = 1.0
    assert load_balancing_loss(one, one).item() == pytest.approx(4.0), "all tokens to one of four experts"
    assert router_z_loss(torch.zeros(5, 8)).item() == pytest.approx(math.log(8) ** 2)


def test_the_auxiliary_loss_is_that_of_transformers_for_one_layer():
    modeling = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    moe, x = made(num_experts=8), torch.randn(50, 16)
    logits = (x @ moe.gate.weight.T,)
    theirs = modeling.load_balancing_loss_func(logits, num_experts=8, top_k=2)
    assert moe(x)[1].aux_loss.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_the_auxiliary_loss_evens_out_the_load():
    moe = made(num_experts=8)
    x = torch.randn(256, 16) + torch.randn(16)
    optimizer = torch.optim.Adam(moe.gate.parameters(), lr=0.02)

    def violation():
        counts = moe(x)[1].tokens_per_expert
        return (counts.max() / counts.mean() - 1).item()

    before = violation()
    for _ in range(200):
        optimizer.zero_grad()
        moe(x)[1].aux_loss.backward()
        optimizer.step()
    assert before > 1 and violation() < 0.3, (before, violation())


def test_the_router_is_in_fp32_under_autocast():
    moe, x = made(num_experts=64, num_chosen=8), torch.randn(200, 16)
    exact = moe(x)[1]
    with torch.autocast("cpu", torch.bfloat16):
        out, routing = moe(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(routing.tokens_per_expert, exact.tokens_per_expert)
    assert routing.z_loss.item() == pytest.approx(exact.z_loss.item(), rel=1e-6)


@pytest.mark.usefixtures("kernels")
def test_bf16_is_as_close_as_its_rounding():
    moe, x = made(num_experts=8), torch.randn(100, 16)
    expected = by_loops(moe, x.double(), {name: p.detach().double() for name, p in moe.named_parameters()})
    with torch.autocast("cpu", torch.bfloat16):
        out = moe(x)[0]
    assert (out - expected).norm() / expected.norm() < 0.02


def test_compiled_it_gives_the_same_numbers():
    moe, x = made(num_experts=8), torch.randn(3, 20, 16)
    out, _ = moe(x)
    out.square().sum().backward()
    expected = [parameter.grad.clone() for parameter in moe.parameters()]
    moe.zero_grad()
    compiled = torch.compile(moe)
    for again in (x, x + 0):
        moe.zero_grad()
        found, _ = compiled(again)
        found.square().sum().backward()
    assert torch.allclose(found, out, atol=1e-5)
    for parameter, gradient in zip(moe.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "settings", "message"),
    [
        ((16, 24, 4, 5), {}, "num_experts_per_tok=5"),
        ((16, 20, 4, 2), {}, "moe_intermediate_size=20"),
        ((16, 24, 4, 2), {"scoring_func": "relu"}, "scoring_func='relu'.*softmax, sigmoid"),
        ((16, 24, 4, 2), {"router": "deep"}, "router='deep'.*linear, mlp"),
    ],
)
def test_what_does_not_fit_is_refused(sizes, settings, message):
    with pytest.raises(ValueError, match=message):
        MoE(*sizes, **settings)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.usefixtures("kernels")
def test_float64_also_with_an_uneven_load(kind, uneven):
    moe = made(8, 2, **KINDS[kind]).double()
    x = torch.randn(30, 16, dtype=torch.float64)
    if uneven:  # nearly all tokens alike, so that a few experts get them
        x = x * 1e-3 + torch.randn(16, dtype=torch.float64)
    assert_equals_loops(moe, x, tolerance=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("kernels")
def test_no_tokens(kind):
    moe = made(4, 2, **KINDS[kind])
    out, routing = moe(torch.randn(0, 5, 16, requires_grad=True))
    (out.sum() + routing.aux_loss + routing.z_loss).backward()
    assert out.shape == (0, 5, 16) and not any(value.isnan().any() for value in routing)
    assert all(not parameter.grad.any() for parameter in moe.parameters() if parameter.grad is not None)


@pytest.mark.parametrize(("tokens", "num_experts", "k"), [(1, 4, 2), (64, 8, 2), (200, 3, 1), (517, 64, 8)])
def test_dispatch_is_a_stable_sort(tokens, num_experts, k):
    torch.manual_seed(0)
    scores = torch.randn(tokens, num_experts) + 2 * torch.randn(num_experts)  # some experts get few tokens, or none
    expert_Tk = scores.topk(k).indices
    token_M, place_Tk, ends_E = dispatch(expert_Tk, num_experts)
    order_M = expert_Tk.flatten().argsort(stable=True)
    assert torch.equal(token_M, (order_M // k).int())
    assert torch.equal(order_M[place_Tk.flatten()], torch.arange(tokens * k))
    assert torch.equal(ends_E, expert_Tk.flatten().bincount(minlength=num_experts).cumsum(0).int())
    assert ends_E.is_contiguous(), "the kernel of grouped_mm takes it for contiguous"


def test_the_largest_are_those_of_topk(monkeypatch):
    monkeypatch.setattr(moe_module, "kernel_device", lambda device: "cuda")
    scores = torch.randn(50, 12)
    for k in (1, 3, 8, 12):
        assert torch.equal(moe_module._largest(scores, k), scores.topk(k).indices)
    assert torch.equal(moe_module._largest(torch.full((2, 4), torch.nan), 3), torch.arange(3).expand(2, 3))


class NoWaiting(TorchDispatchMode):
    """Fails where a GPU would have to be waited for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert torch.Tag.data_dependent_output not in function.tags, function
        assert function is not torch.ops.aten.nonzero.default, function
        if function is torch.ops.aten.index.Tensor:
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "a mask as an index"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_a_gpu(monkeypatch, kind):
    monkeypatch.setattr(moe_module, "kernel_device", lambda device: "cuda")
    moe = made(**KINDS[kind])
    with NoWaiting():
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            torch.ones(1).item()
        out, routing = moe(torch.randn(2, 5, 16))
        (out.sum() + routing.aux_loss + routing.z_loss).backward()


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("size", [24, 1024, 1544])
def test_the_triton_kernel_of_swiglu(dtype, tolerance, size):
    torch.manual_seed(0)
    inputs = torch.randn(70, 2 * size), torch.rand(70), torch.randn(70, size)
    found = swiglu_backward(*(x.to("cuda", dtype) for x in inputs))
    for ours, expected in zip(found, swiglu_backward(*(x.to(dtype).double() for x in inputs)), strict=True):
        assert ours.dtype == dtype and (ours.cpu() - expected).norm() / expected.norm() < tolerance
