"""FLOPs against closed forms, and the table of peaks."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from torchrecipes.cli.run import load_recipe
from torchrecipes.config import load
from torchrecipes.config.catalog import find_recipe
from torchrecipes.models.param_count import active_parameters
from torchrecipes.modules import MoE
from torchrecipes.planning import flops_per_token, peak_flops
from torchrecipes.planning.fake_model import TokenizerStandIn, meta_model

SIZES = "hidden_size=64 num_hidden_layers=3 num_attention_heads=4"


def counted(recipe_name, family, *settings):
    """FLOPs per token, and the model on the meta device."""
    path = find_recipe(recipe_name)
    recipe = load_recipe(path)
    overrides = [
        "seq_len=128",
        f"model._component_=torchrecipes.models.{family}",
        "output_dir=x",
        "data.source.path=x",
        "max_steps=1",
    ]
    overrides += [f"model.{size}" for size in SIZES.split()] + list(settings)
    config = load(recipe.Config, None, overrides, recipe=path)
    tokenizer = TokenizerStandIn(512)
    functions = (recipe.build_model, recipe.build_collator, recipe.compute_loss)
    return flops_per_token(config, tokenizer, *functions), meta_model(config, tokenizer, recipe.build_model)


def attention_flops(model, seq_len):
    """`12 L A S` (Chowdhery et al. 2022, 2204.02311, appendix B): the whole square of scores."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 12 * config.num_hidden_layers * config.num_attention_heads * head_dim * seq_len


@pytest.mark.parametrize("family", ["neobert", "bert"])
def test_encoders_match_the_closed_form(family):
    """`6 N` for the blocks, `6 p (V D + T)` for the head and its transform at the share p of masked tokens."""
    flops, model = counted("mlm_pretrain", family, "mlm_probability=0.25", "model.intermediate_size=192")
    blocks = sum(parameter.numel() for parameter in model.blocks.parameters())
    head = 512 * 64 + sum(parameter.numel() for parameter in model.head.transform.parameters())
    assert flops == pytest.approx(6 * blocks + attention_flops(model, 128) + 6 * 0.25 * head, rel=0.02)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "olmoe", "qwen3_moe"])
def test_decoders_match_the_closed_form_with_half_of_the_scores(family):
    flops, model = counted("causal_pretrain", family)
    expected = 6 * (active_parameters(model.blocks) + 512 * 64) + attention_flops(model, 128) / 2
    assert flops == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("recipe", "family", "window", "keys"),
    [
        ("mlm_pretrain", "modernbert", "model.local_attention=16", (128 + 2 * 17) / 3),  # every third layer is global
        ("causal_pretrain", "mistral", "model.sliding_window=16", 16),
        ("causal_pretrain", "mistral", "model.sliding_window=500", 64),
    ],
)
def test_windows_count_the_keys_that_a_token_sees(recipe, family, window, keys):
    flops, model = counted(recipe, family, window)
    whole, _ = counted(recipe, family, "model.local_attention=500" if family == "modernbert" else "seq_len=128")
    per_key = attention_flops(model, 1)
    assert whole - flops == pytest.approx(per_key * ((128 if family == "modernbert" else 64) - keys), rel=0.01)


def test_activation_checkpointing_does_not_count():
    plain, _ = counted("mlm_pretrain", "neobert")
    again, _ = counted("mlm_pretrain", "neobert", "compute.activation_checkpointing=full")
    assert plain == again


def test_only_the_chosen_experts_are_active():
    blocks = nn.ModuleList([nn.Linear(8, 8, bias=False), MoE(16, 24, num_experts=8, num_experts_per_tok=2)])
    assert active_parameters(blocks) == 64 + 8 * 16 + 2 * 3 * 16 * 24


class Example:
    """A collator whose batch is its tokens."""

    def example_batch(self, num_rows, seq_len):
        return torch.zeros(num_rows, seq_len, dtype=torch.int64)


def own_loss(model, batch, config):
    hidden = model(batch)
    if config.reads_values and hidden.sum().item() > 0:
        hidden = -hidden
    return hidden.sum(), {}


@pytest.mark.parametrize(("reads_values", "expected"), [(False, 6 * 64), (True, 6 * (32 * 8 + 64))])
def test_a_model_of_ones_own_is_counted_or_assumed_by_its_parameters(reads_values, expected, capsys):
    config = SimpleNamespace(seq_len=16, reads_values=reads_values)

    def build_model(config, tokenizer):
        return nn.Sequential(nn.Embedding(tokenizer.vocab_size, 8), nn.Linear(8, 8, bias=False))

    state = torch.get_rng_state()
    flops = flops_per_token(config, TokenizerStandIn(32), build_model, lambda *_: Example(), own_loss)
    assert flops == expected
    assert bool(capsys.readouterr().out) == reads_values
    assert torch.equal(torch.get_rng_state(), state)


def test_transformers_models_are_counted():
    pytest.importorskip("transformers")
    flops, model = counted(
        "mlm_pretrain",
        "from_transformers",
        "model.model_type=bert",
        "model.intermediate_size=192",
        "mlm_probability=0.25",
    )
    body = sum(p.numel() for name, p in model.named_parameters() if ".layer." in name)
    assert 6 * body < flops < 6 * sum(p.numel() for p in model.parameters()) + attention_flops(model, 128)


def test_peaks_of_known_gpus_and_of_this_cpu(monkeypatch):
    known = {
        "NVIDIA H200": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA L40": 181e12,
        "NVIDIA L4": 121e12,
        "NVIDIA RTX A1000": None,  # not an A100
        "Something new": None,
    }
    for name, peak in known.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_flops(torch.device("cuda", 0), torch.bfloat16) == peak
    assert peak_flops(torch.device("cuda", 0), torch.float32) is None
    assert peak_flops(torch.device("cpu"), torch.float32) > 1e8
    assert peak_flops(torch.device("cpu"), torch.float32) == peak_flops(torch.device("cpu"), torch.float32)
    # A CPU without fp16 multiplies large matrices in it slowly, which would give a run an MFU above 1.
    assert peak_flops(torch.device("cpu"), torch.float16) >= peak_flops(torch.device("cpu"), torch.float32)
