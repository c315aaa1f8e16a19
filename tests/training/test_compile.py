"""`compute.compile`: what is compiled, and how often."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from torchrecipes.models import bert, gpt2, neobert
from torchrecipes.modules.moe import Router
from torchrecipes.training.setup import compile_model

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
MODELS = {
    "neobert": lambda: neobert(**SIZES, intermediate_size=64),
    "gpt2": lambda: gpt2(**SIZES, embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0),
    "bert": lambda: bert(**SIZES, intermediate_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
}


def outputs(model, ids):
    hidden = model.head(model(ids))
    return [hidden, *torch.autograd.grad(hidden.square().sum(), list(model.parameters()), allow_unused=True)]


@pytest.mark.parametrize(
    ("family", "graphs"),
    [
        ("neobert", {"cpu": 2, "cuda": 3}),  # block, final norm; embedding
        ("gpt2", {"cpu": 2, "cuda": 3}),
        ("bert", {"cpu": 2, "cuda": 3}),  # block, transform of the head; embedding
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_all_of_a_model_is_compiled_once(device, family, graphs):
    torch.compiler.reset()
    plain, model = MODELS[family](), MODELS[family]()
    counter = CompileCounter()
    compile_model(model, torch.device(device), backend=counter)
    for seed in range(3):
        ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(outputs(model, ids), outputs(plain, ids))
    assert counter.frame_count == graphs[device]
    assert list(model.state_dict()) == list(plain.state_dict())


def test_any_module_is_compiled():
    torch.compiler.reset()
    counter = CompileCounter()
    model = Doubled()
    compile_model(model, torch.device("cpu"), backend=counter)
    assert model(torch.ones(2)).tolist() == [2, 2]
    assert counter.frame_count == 1


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def test_what_is_in_fp32_under_autocast_has_a_backward_pass_in_fp32():
    torch.compiler.reset()
    torch.manual_seed(0)
    plain = Router(32, 8)
    model = copy.deepcopy(plain)
    compile_model(model, torch.device("cpu"), backend="aot_eager")
    gradients = []
    for router in (plain, model):
        x = torch.ones(16, 32).cumsum(0).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            logits = router(x)
        gradients.append(torch.autograd.grad(logits.softmax(-1).square().sum(), (x, router.weight)))
    torch.testing.assert_close(*gradients)
