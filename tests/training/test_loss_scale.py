"""The loss scale of fp16, held by the guard, against torch.amp.GradScaler and against training in fp32."""

import copy

import pytest
import torch
from torch import nn

from tests import ranks
from torchrecipes.data import Examples
from torchrecipes.distributed import clip_grad_norm, parallelize
from torchrecipes.errors import UserError
from torchrecipes.losses import InfoNCE, causal_lm_loss
from torchrecipes.models import bert, gpt2, moe, neobert
from torchrecipes.training import Guard
from torchrecipes.training.precision import autocast

CPU, NAN, INF = torch.device("cpu"), float("nan"), float("inf")
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {"num_key_value_heads": 2, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "neobert": lambda: neobert(**SIZES, intermediate_size=64),
    "bert": lambda: bert(**SIZES, intermediate_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "gpt2": lambda: gpt2(**SIZES, embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0),
    "moe": lambda: moe(**SIZES, **EXPERTS),
}


def make(**settings):
    guard = Guard(dtype=torch.float16, **settings)
    guard.log_fn = lambda _: None
    return guard


def scaled_backward(model, optimizer, scale, gradient):
    """A backward pass of `scale` times a loss whose gradient is `gradient`, for every weight."""
    optimizer.zero_grad()
    (sum(p.sum() for p in model.parameters()) * scale).backward()
    for p in model.parameters():
        p.grad.mul_(gradient)


@pytest.mark.parametrize("fused", [True, False])
def test_it_decides_as_the_scaler_of_torch(fused):
    gradients = [INF, INF, *[0.25] * 4, NAN, *[0.5] * 3, -INF, *[0.25] * 7, INF, 0.25]
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused) for model in (ours, theirs)]
    guard = make(growth_interval=3)
    scaler = torch.amp.GradScaler("cpu", growth_interval=3)
    scales = []
    for step, gradient in enumerate(gradients, start=1):
        scaled_backward(ours, optimizers[0], guard.loss_scale, gradient)
        norm = clip_grad_norm(ours, 0.5, guard.loss_scale)
        guard.step(optimizers[0], torch.tensor(1.0), norm)
        guard.check(step)
        scaled_backward(theirs, optimizers[1], scaler.scale(torch.tensor(1.0)), gradient)
        scaler.unscale_(optimizers[1])
        their_norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        scaler.step(optimizers[1])
        scaler.update()
        torch.testing.assert_close(norm, their_norm, rtol=0, atol=0, equal_nan=True)
        scales.append((guard.loss_scale.item(), scaler.get_scale()))
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=0)
    assert [scale for scale, _ in scales] == [scale for _, scale in scales]
    assert len(set(scales)) == 3 and scales[0][0] == 2**15
    assert guard.overflowed_steps == 5 and guard.skipped_steps == 0


def test_an_overflow_is_the_guard_s_matter_once_the_scale_is_1():
    guard = make(init_scale=4.0, max_skips=2)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    for step in range(1, 4):
        guard.step(optimizer, torch.tensor(2.0), torch.tensor(INF))
        guard.check(step)
    assert (guard.overflowed_steps, guard.skipped_steps, guard.loss_scale.item()) == (2, 1, 1.0)
    guard.step(optimizer, torch.tensor(2.0), torch.tensor(NAN))
    with pytest.raises(UserError) as error:
        guard.check(4)
    assert error.value.code == "diverged"


def test_a_loss_that_is_not_finite_is_not_the_scale_s_doing():
    guard = make()
    guard.step(torch.optim.SGD([torch.zeros(1)]), torch.tensor(NAN), torch.tensor(NAN))
    guard.check(1)
    assert (guard.overflowed_steps, guard.skipped_steps) == (0, 1)
    assert guard.metrics()["loss_scale"] == 2**15


def test_state_is_restored_and_a_rollback_takes_the_scale_of_then():
    optimizer = torch.optim.SGD([torch.zeros(1)])

    def feed(guard, norms):
        for step, norm in enumerate(norms, start=1):
            guard.step(optimizer, torch.tensor(1.0), torch.tensor(norm))
            guard.check(step)
        return guard.loss_scale.item(), guard._good_steps.item()

    guard, other = make(growth_interval=3), make(growth_interval=3)
    feed(guard, [INF, 1.0, 1.0])
    state = copy.deepcopy(guard.state_dict())
    other.load_state_dict(state)
    assert feed(other, [1.0, 1.0]) == feed(guard, [1.0, 1.0]) == (2.0**16, 1.0)
    feed(guard, [INF])
    guard.load_state_dict(state)
    assert feed(guard, [1.0]) == (2.0**16, 0.0) and guard.overflowed_steps == 2
    guard.load_state_dict(Guard().state_dict())  # a run in fp32 that continues in fp16
    assert guard.loss_scale.item() == 2**16
    Guard().load_state_dict(state)
    assert "loss_scale" not in Guard().state_dict() and Guard().loss_scale == 1.0


@pytest.mark.parametrize("setting", [{"init_scale": 0.5}, {"init_scale": INF}, {"growth_interval": 0}])
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(UserError) as error:
        Guard(**setting)
    assert [(problem.key, problem.code) for problem in error.value.problems] == [(*setting, "out_of_range")]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_fp32(family):
    ids = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([0, 5, 16, 32, 48, 64], dtype=torch.int32)
    found = []
    for dtype, scale in ((torch.float32, 1.0), (torch.float16, torch.tensor(2.0**20))):
        model = FAMILIES[family]().train()
        model.init_weights(1)
        with autocast(CPU, dtype):
            hidden = model(ids[:, :-1], cu_seqlens=documents, max_seqlen=16)
            loss = causal_lm_loss(hidden, model.head, ids[:, 1:])
        (loss * (scale * 1e-5 / 64)).backward()
        norm = clip_grad_norm(model, INF, scale)
        found.append((norm, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (norm, expected), (norm_16, gradients) = found
    torch.testing.assert_close(norm_16, norm, rtol=5e-3, atol=0)
    assert norm < 1e-4  # so small that many would be 0 without the scale
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() < 0.01 * expected[name].norm(), name


def sharded_overflow(strategy):
    """Whether all ranks see the norm of one process, and the overflow of one rank."""
    torch.manual_seed(0)
    ids, scale = torch.arange(64).view(4, 16), torch.tensor(1024.0)
    single = neobert(**SIZES, intermediate_size=64).train()
    model = copy.deepcopy(single)
    parallelize(model, strategy, CPU, torch.float16)
    norms, rank = [], torch.distributed.get_rank()
    for network, rows, factor in ((single, ids, 1), (model, ids.chunk(2)[rank], 1), (model, ids, [1, INF][rank])):
        with autocast(CPU, torch.float16):
            loss = network.head(network(rows)).float().logsumexp(-1).sum()
        (loss * (scale * factor / rows.numel())).backward()
        norms.append(str(clip_grad_norm(network, 1.0, scale).item()))
    return norms


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_all_ranks_see_the_same_norm_and_overflow(strategy):
    first, second = ranks.call(sharded_overflow, strategy)
    assert first == second and first[2] in ("inf", "nan")
    assert float(first[1]) == pytest.approx(float(first[0]), rel=5e-3)


class TwoLayers(nn.Module):
    """Embeddings in fp16 as an encoder gives them: products under autocast, then fp32."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(8, 16), nn.Linear(16, 6)

    def forward(self, texts):
        with autocast(CPU, torch.float16):
            return self.outer(self.inner(texts).tanh()).float()


def test_the_scale_goes_through_a_cached_contrastive_step():
    """As in contrastive_finetune: the scaled gradients of the embeddings enter the second pass."""
    generator = torch.Generator().manual_seed(0)
    texts, scale = [torch.randn(4, 8, generator=generator) for _ in range(3)], torch.tensor(2.0**16)
    places = Examples(torch.arange(12).view(6, 2), torch.arange(12))
    plain, cached = TwoLayers(), TwoLayers()
    loss, _ = InfoNCE()(plain(torch.cat(texts)), places)
    (loss * (scale * 1e-6)).backward()
    with torch.no_grad():
        parts = [cached(part) for part in texts]
    embeddings = torch.cat(parts).requires_grad_()
    loss, _ = InfoNCE()(embeddings, places)
    (loss * (scale * 1e-6)).backward()
    for part, gradient in zip(texts, embeddings.grad.split(4), strict=True):
        cached(part).backward(gradient)
    norms = [clip_grad_norm(model, INF, scale) for model in (plain, cached)]
    torch.testing.assert_close(norms[1], norms[0], rtol=2e-3, atol=0)
    for ours, theirs in zip(cached.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=5e-3, atol=1e-8)
    assert norms[0] < 1e-3
