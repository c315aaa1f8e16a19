from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tests import ranks
from torchrecipes.errors import UserError
from torchrecipes.models import bert, neobert
from torchrecipes.training.activation_checkpointing import apply_activation_checkpointing
from torchrecipes.training.float8 import convert_to_float8
from torchrecipes.training.precision import resolve_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BOTH = pytest.mark.parametrize("precision", ["float8", "float8_rowwise"])
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
TOKENS = torch.arange(128).reshape(4, 32) % 61

convert = partial(convert_to_float8, device=CPU, emulate=True)


class Holder(nn.Module):
    """A model as `convert_to_float8` wants it, of the given layers."""

    def __init__(self, *layers):
        super().__init__()
        self.blocks = nn.ModuleList(layers)
        self.head = nn.Linear(4096, 4096, device="meta")


def rounded(x, mantissa, least_exponent, largest):
    """The nearest float with so many bits of mantissa, ties to even; float64."""
    exponent = torch.floor(torch.log2(x.abs().clamp(min=1e-300))).clamp(min=least_exponent)
    step = 2.0 ** (exponent - mantissa)
    return (torch.round(x / step) * step).clamp(-largest, largest)


E4M3, E5M2 = (3, -6, 448.0), (2, -14, 57344.0)  # OCP 8-bit floating point specification, table 1


def quantized(x, kind, dim=None):
    """Scaled so that the largest magnitude is the format's, rounded, and scaled back. With `dim`: for each slice along
    it, and the scale a power of two."""
    largest = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = kind[2] / largest
    if dim is not None:
        scale = 2.0 ** torch.floor(torch.log2(scale))
    return rounded(x * scale, *kind) / scale


@BOTH
def test_a_layer_computes_what_float8_is(precision):
    torch.manual_seed(0)
    layer = nn.Linear(32, 48)
    model = Holder(layer)
    assert convert(model, precision) == 1
    x = (torch.randn(64, 32) * 10 ** torch.randn(64, 1)).requires_grad_()
    gradient = torch.randn(64, 48) * 10 ** torch.randn(1, 48)
    out = model.blocks[0](x)
    out.backward(gradient)

    x64, w, g = (t.detach().double() for t in (x, layer.weight, gradient))
    if precision == "float8":
        expected = quantized(x64, E4M3) @ quantized(w, E4M3).T
        expected_x = quantized(g, E5M2) @ quantized(w, E4M3)
        expected_w = quantized(g, E5M2).T @ quantized(x64, E4M3)
    else:  # scales along the dimension that is summed over
        expected = quantized(x64, E4M3, 1) @ quantized(w, E4M3, 1).T
        expected_x = quantized(g, E4M3, 1) @ quantized(w, E4M3, 0)
        expected_w = quantized(g, E4M3, 0).T @ quantized(x64, E4M3, 0)
    expected = expected + layer.bias.double()
    for ours, reference in ((out, expected), (x.grad, expected_x), (layer.weight.grad, expected_w)):
        scale = reference.abs().max().item()
        torch.testing.assert_close(ours.detach().double(), reference, rtol=1e-5, atol=1e-6 * scale)
    assert (expected - (x64 @ w.T + layer.bias)).norm() > 1e-2 * expected.norm()  # fp32 would not pass


def loss_of(model, tokens=TOKENS):
    logits = model.head(model(tokens).flatten(0, 1))
    return nn.functional.cross_entropy(logits.float(), (tokens.flatten() + 1) % 61)


@BOTH
@pytest.mark.parametrize("bf16", [False, True])
def test_a_model_learns(precision, bf16):
    model = neobert(vocab_size=64, **SIZES)
    assert convert(model, precision) == 8
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of(model)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] > 4 and losses[-1] < 1


@pytest.mark.parametrize("make", [neobert, bert])
def test_names_stay_and_so_do_embedding_and_head(make):
    model = make(vocab_size=64, **SIZES)
    before = dict(model.named_parameters())
    outside = {name: type(module) for name, module in model.named_modules() if not name.startswith("blocks.")}
    convert(model, "float8")
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}
    assert outside == {name: type(module) for name, module in model.named_modules() if not name.startswith("blocks.")}


@BOTH
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputed_activations_give_the_same_gradients(precision, mode):
    models = [neobert(vocab_size=64, **SIZES) for _ in range(2)]
    for model in models:
        convert(model, precision)
    apply_activation_checkpointing(models[1], mode)
    for model in models:
        loss_of(model).backward()
    for parameter, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(parameter.grad, other.grad)


def test_only_layers_that_gain_from_it(monkeypatch):
    """torchao's limits (out_features x in_features), on a GPU that has float8."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))

    def sizes(precision, *shapes):
        layers = [nn.Linear(n, m, bias=False, device="meta") for m, n in shapes]
        model = Holder(*layers)
        convert_to_float8(model, precision, device=CUDA)
        return [type(layer) is not nn.Linear for layer in model.blocks]

    assert sizes("float8", (1040, 64), (1024, 4096), (1024, 4112), (2050, 4096)) == [True, False, True, False]
    shapes = [(2048, 8192), (4096, 2048), (4096, 2064), (4112, 1040), (4112, 1024)]
    assert sizes("float8_rowwise", *shapes) == [False, False, True, True, False]
    with pytest.raises(UserError) as error:
        sizes("float8_rowwise", (768, 768))
    assert error.value.code == "nothing_to_convert"


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp32"])
def test_other_precisions_change_nothing(precision):
    model = neobert(vocab_size=64, **SIZES)
    assert convert_to_float8(model, precision, device=CPU) == 0
    assert all(type(module).__module__.startswith(("torch.", "torchrecipes.")) for module in model.modules())


@BOTH
def test_a_device_without_float8_is_refused(precision, monkeypatch):
    for refuse in (resolve_dtype, lambda name, device: convert_to_float8(Holder(), name, device=device)):
        with pytest.raises(UserError) as error:
            refuse(precision, CPU)
        assert (error.value.key, error.value.code) == ("compute.precision", "no_float8")
        assert {"float8": "8.9", "float8_rowwise": "9.0"}[precision] in str(error.value)
    assert resolve_dtype(precision, CPU, emulate_float8=True) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    if precision == "float8":
        assert resolve_dtype(precision, CUDA) == torch.bfloat16
    else:
        with pytest.raises(UserError) as error:
            resolve_dtype(precision, CUDA)
        assert error.value.code == "no_float8" and "NVIDIA L4 has 8.9" in str(error.value)


def two_ranks():
    found = []
    for precision, dtype in (("float8", None), ("float8_rowwise", None), ("float8", torch.bfloat16)):
        alone, model = neobert(vocab_size=64, **SIZES), neobert(vocab_size=64, **SIZES)
        for each in (alone, model):
            convert(each, precision)
        apply_activation_checkpointing(model, "selective")
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in model.blocks:
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy, reshard_after_forward=False)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            halves = [loss_of(alone, half) for half in TOKENS.chunk(2)]  # a rank's scales are of its own rows
            loss = loss_of(model, TOKENS.chunk(2)[torch.distributed.get_rank()])
        (sum(halves) / 2).backward()
        loss.backward()
        pairs = zip(model.parameters(), alone.parameters(), strict=True)
        errors = [((p.grad.full_tensor() - q.grad).norm() / q.grad.norm()).item() for p, q in pairs]
        found.append(max(errors))
    return found


def test_sharded_over_two_ranks():
    for *exact, rounded in ranks.call(two_ranks):
        assert max(exact) < 1e-6
        assert rounded < 0.2  # gathered weights are rounded to bf16 before they are to float8
