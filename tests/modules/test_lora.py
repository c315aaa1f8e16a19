"""LoRA layers against their definition in float64, and where they are added."""

import copy

import pytest
import torch
from torch import nn

from torchrecipes.errors import UserError
from torchrecipes.models import bert, gpt2, llama, modernbert
from torchrecipes.modules import LoRALinear, apply_lora, init_lora, merge_lora, unmerge_lora
from torchrecipes.modules.lora import lora_layers
from torchrecipes.training.activation_checkpointing import apply_activation_checkpointing

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def small(family=bert, **keys):
    return family(**SMALL, intermediate_size=48, **keys)


def fill_B(model, seed=0):
    """A trained B: random."""
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        layer.lora_B.data.normal_(0, 0.1, generator=generator)
    return model


def ids(rows=2, length=12):
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rows", [[(0, 20)], [(0, 8), (8, 6), (14, 6)], [(0, 8), (14, 6)], [(8, 6)]])
def test_a_layer_computes_its_definition(rows):
    torch.manual_seed(0)
    base = nn.Linear(10, 20).double()
    layer = LoRALinear(base, rank=3, scale=0.7, rows=rows)
    layer.lora_A.data.normal_()
    layer.lora_B.data.normal_()
    x = torch.randn(2, 5, 10, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    expected, first = base(x).clone(), 0
    for part, (start, size) in enumerate(rows):
        A, B = layer.lora_A[3 * part : 3 * part + 3], layer.lora_B[first : first + size]
        expected[..., start : start + size] += 0.7 * x @ A.T @ B.T
        first += size
    assert (out - expected).abs().max() < 1e-12
    grad = torch.randn_like(out)
    names = ("x", "lora_A", "lora_B")
    ours = torch.autograd.grad(out, (x, layer.lora_A, layer.lora_B), grad)
    theirs = torch.autograd.grad(expected, (x, layer.lora_A, layer.lora_B), grad)
    for name, found, wanted in zip(names, ours, theirs, strict=True):
        assert (found - wanted).abs().max() < 1e-12, name


def test_only_A_and_B_train_and_the_model_starts_unchanged():
    model = small()
    before = model(ids())
    assert apply_lora(model, rank=4) is model
    assert torch.equal(model(ids()), before)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = [f"blocks.{i}.self_attn.{kind}" for i in (0, 1) for kind in ("qkv_proj", "o_proj")]
    assert trained == {f"{layer}.{kind}" for layer in layers for kind in ("lora_A", "lora_B")}
    assert model.blocks[0].self_attn.qkv_proj.lora_A.shape == (12, 32)  # query, key and value have one each
    model.head(model(ids())).sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained


@pytest.mark.parametrize(
    ("family", "targets", "parts"),
    [
        (bert, "attention", 2 * (3 + 1)),
        (bert, "all_linear", 2 * (3 + 1 + 2)),
        (bert, ["query", "value"], 2 * 2),
        (bert, ["blocks.1.*"], 3 + 1 + 2),
        (llama, "all_linear", 2 * (3 + 1 + 3)),
        (llama, ["q_proj", "up_proj"], 2 * 2),
        (gpt2, "all_linear", 2 * 4),  # transformers has one matrix for queries, keys and values
        (modernbert, "all_linear", 2 * 4),
    ],
)
def test_targets(family, targets, parts):
    model = apply_lora(small(family), rank=2, targets=targets)
    assert sum(len(layer.rows) for layer in lora_layers(model).values()) == parts


def test_A_is_a_function_of_seed_and_name_also_from_meta():
    first, second = (apply_lora(small(), seed=3) for _ in range(2))
    with torch.device("meta"):
        meta = apply_lora(small())
    meta.to_empty(device="cpu")
    meta.init_weights(3)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name))
        if "lora" in name:
            assert torch.equal(parameter, meta.get_parameter(name)), name
    assert not torch.equal(first.blocks[0].self_attn.o_proj.lora_A, first.blocks[1].self_attn.o_proj.lora_A)
    wide = LoRALinear(nn.Linear(768, 4), rank=512, scale=1.0)
    init_lora(nn.ModuleList([wide]), 0)
    assert abs(wide.lora_A.std().item() * (3 * 768) ** 0.5 - 1) < 0.02  # as uniform in +-1 / sqrt(768)
    assert not wide.lora_B.any()


def test_merging_is_exact_and_undone():
    model = fill_B(apply_lora(small(llama), rank=4, targets="all_linear")).eval()
    before, weights = model(ids()), copy.deepcopy(model.state_dict())
    merge_lora(model)
    merge_lora(model)  # no second time
    assert (model(ids()) - before).abs().max() < 1e-5
    W, A, B = (weights[f"blocks.0.mlp.down_proj.{kind}"].double() for kind in ("weight", "lora_A", "lora_B"))
    assert (model.blocks[0].mlp.down_proj.weight - (W + 4 * B @ A)).abs().max() < 1e-6
    unmerge_lora(model)
    assert (model(ids()) - before).abs().max() < 1e-5
    for name, tensor in model.state_dict().items():
        assert (tensor - weights[name]).abs().max() < 1e-6, name


def test_the_scale():
    assert apply_lora(small(), rank=4, alpha=8).lora.scale == 2.0
    assert apply_lora(small(), rank=4, alpha=8, rslora=True).lora.scale == 4.0


def test_dropout_is_in_training_only():
    model = fill_B(apply_lora(small(), dropout=0.5))
    torch.manual_seed(0)
    assert not torch.equal(model.train()(ids()), model(ids()))
    assert torch.equal(model.eval()(ids()), model(ids()))


def test_a_module_of_ones_own():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
            self.attention = nn.MultiheadAttention(8, 2)  # never calls its output layer
            self.classifier = nn.Linear(8, 3)

        def forward(self, x):
            return self.classifier(self.encoder(x))

    model = apply_lora(Mine(), rank=2, targets=["encoder.*"])
    assert lora_layers(model).keys() == {"encoder.0", "encoder.2"}
    assert model.classifier.weight.requires_grad and not model.encoder[0].weight.requires_grad  # beside the encoder
    assert model.lora.trained[-2:] == ("classifier.weight", "classifier.bias")
    assert "attention.out_proj" not in lora_layers(apply_lora(Mine(), targets="all_linear"))
    assert apply_lora(Mine(), targets=["encoder.*"], modules_to_save=[]).lora.trained == ()
    assert apply_lora(Mine(), targets=["encoder.*"], modules_to_save=["classifier"]).lora.trained == (
        "classifier.weight",
        "classifier.bias",
    )


@pytest.mark.parametrize(
    ("options", "key", "code"),
    [
        ({"rank": 0}, "rank", "out_of_range"),
        ({"alpha": 0}, "alpha", "out_of_range"),
        ({"dropout": 1.0}, "dropout", "out_of_range"),
        ({"targets": ["query", "nothing"]}, "lora.targets", "no_such_layer"),
        ({"modules_to_save": ["nothing"]}, "lora.modules_to_save", "no_such_parameter"),
    ],
)
def test_wrong_settings(options, key, code):
    with pytest.raises(UserError) as error:
        apply_lora(small(), **options)
    assert (error.value.key, error.value.code) == (key, code)


def test_not_twice():
    with pytest.raises(UserError) as error:
        apply_lora(apply_lora(small()))
    assert error.value.code == "has_lora"


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_checkpointing_and_autocast(mode):
    grads = []
    for wrap in (False, True):
        model = fill_B(apply_lora(small(llama), rank=4, dropout=0.1))
        if wrap:
            apply_activation_checkpointing(model, mode)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(ids())
        out.float().square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert all(grad.dtype == torch.float32 for grad in grads[-1].values()) and len(grads[-1]) == 8
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


def test_compiled_blocks():
    model = fill_B(apply_lora(small(llama), rank=4))
    expected = model(ids())
    for block in model.blocks:
        block.compile(backend="aot_eager")
    assert (model(ids()) - expected).abs().max() < 1e-6
