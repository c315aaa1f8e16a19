"""Between logs, nothing that a step does after its backward passes waits for the device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torchrecipes.distributed import clip_grad_norm
from torchrecipes.models import moe, neobert
from torchrecipes.optim import adamw, cosine, muon
from torchrecipes.training import ExpertBalance, MetricLogger, sum_over_ranks
from torchrecipes.training.ema import EMA
from torchrecipes.training.guard import Guard
from torchrecipes.training.run import Run

# On a GPU each of these waits until the tensor's value, or its size, is known to the host.
WAITS = ("aten._local_scalar_dense", "aten.item", "aten.nonzero", "aten.masked_select", "aten.equal", "aten.is_nonzero")
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not str(function).startswith(WAITS), f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


def mixture():
    extra = {"num_key_value_heads": 2, "moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}
    return moe(vocab_size=31, **SIZES, **extra, router_bias=True, qk_norm=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "make_model, make_optimizer",
    [
        (lambda: neobert(vocab_size=31, **SIZES), adamw),
        (lambda: neobert(vocab_size=31, **SIZES), muon),
        (mixture, lambda model: muon(model, qk_clip_tau=1e-3)),
        (
            lambda: neobert(vocab_size=31, **SIZES),
            lambda model: torch.optim.AdamW(model.parameters(), fused=True),
        ),
    ],
)
def test_steps_between_logs(tmp_path, make_model, make_optimizer, dtype):
    model = make_model()
    optimizer = make_optimizer(model)
    lr_scheduler, guard, ema = cosine(optimizer, max_steps=10), Guard(dtype=dtype), EMA(model)
    balance = ExpertBalance(model, 0.01)
    run = Run(tmp_path, torch.device("cpu"))
    with MetricLogger(run, max_steps=10, tokens_per_step=24) as metrics:
        for step in range(1, 5):
            loss = model.head(model(torch.arange(24).view(2, 12))).float().square().sum()
            (loss * guard.loss_scale).backward()
            with NoWaiting():
                balance.add(model)
                sums = sum_over_ranks([{"loss": loss.detach()}])
                norm = clip_grad_norm(model, 1.0, guard.loss_scale)
                skipped = guard.step(optimizer, sums["loss"] / 24, norm)
                optimizer.zero_grad()
                balance.step(skipped)
                lr_scheduler.step()
                ema.update()
                metrics.update(sums, 24, skipped)
                guard.check(step)
        metrics.log(step, lr=0.1, grad_norm=norm)


def test_a_wait_is_seen():
    with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
        torch.ones(()).item()
