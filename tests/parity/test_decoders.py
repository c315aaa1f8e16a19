"""Decoders against `transformers`: logits and gradients, loaded from its folders and read by it from ours."""

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from torchrecipes.models import hf_state_dict, llama, load_hf, qwen3, save_hf

SIZES = {
    "vocab_size": 101,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    # Weights five times as large as usual, so that logits are of order 1 and errors show.
    "initializer_range": 0.1,
    "max_position_embeddings": 64,
}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "factor": 2.5}
ROPE = {"rope_type": "default", "rope_theta": 100.0}
THEIRS = {
    "llama": (LlamaForCausalLM, LlamaModel, LlamaConfig, {"num_key_value_heads": 4, "rope_parameters": ROPE}),
    "qwen3": (
        Qwen3ForCausalLM,
        Qwen3Model,
        Qwen3Config,
        {"num_key_value_heads": 4, "head_dim": 12, "rope_parameters": ROPE},
    ),
}
OURS = {"llama": (llama, {"rope_theta": 100.0}), "qwen3": (qwen3, {"rope_theta": 100.0})}
CASES = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 2}),
    ("llama", {"head_dim": 8, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"rope_scaling": LLAMA3}),
    ("llama", {"rope_scaling": LINEAR}),
    ("qwen3", {}),
    ("qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 2, "head_dim": 16}),
    ("qwen3", {"head_dim": 8, "num_key_value_heads": 1, "attention_bias": True}),
]


def their_model(family, changes, kind=0):
    classes, config_class, defaults = THEIRS[family][:2], *THEIRS[family][2:]
    keys = SIZES | defaults | changes
    if "rope_scaling" in keys:
        keys["rope_parameters"] = keys.pop("rope_scaling") | {"rope_theta": ROPE["rope_theta"]}
    torch.manual_seed(0)
    return randomize(classes[kind](config_class(**keys)).eval())


def our_model(family, changes):
    builder, defaults = OURS[family]
    return randomize(builder(**(SIZES | defaults | changes)))


def randomize(model):
    """Biases and norms away from 0 and 1, or exchanging them would not show."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, float(name.endswith("weight")), 0.2, generator=generator)
    return model


def assert_same(ours, theirs):
    ours.eval()
    input_ids = torch.randint(1, 101, (3, 40), generator=torch.Generator().manual_seed(3))
    logits, their_logits = ours.head(ours(input_ids)), theirs(input_ids=input_ids).logits
    assert 0.3 < their_logits.std() < 30
    assert (logits - their_logits).abs().max() <= 1e-5
    for model, scores in ((ours, logits), (theirs, their_logits)):
        model.zero_grad()
        scores = scores.flatten(0, -2)
        F.cross_entropy(scores, torch.arange(len(scores)) % 101).backward()
    gradients = hf_state_dict(ours, {name: parameter.grad for name, parameter in ours.named_parameters()})
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert set(gradients) == set(expected)
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).abs().max() <= 1e-5 * max(1, expected[name].abs().max()), name


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_theirs_loads_here(tmp_path, family, changes):
    theirs = their_model(family, changes)
    theirs.save_pretrained(tmp_path)
    assert_same(load_hf(tmp_path, report=pytest.fail), theirs)


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_ours_loads_there(tmp_path, family, changes):
    ours = our_model(family, changes)
    save_hf(ours, tmp_path)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(theirs) is THEIRS[family][0]
    assert_same(ours, theirs.eval())


@pytest.mark.parametrize("family", sorted(THEIRS))
def test_a_decoder_without_head_gets_a_new_one(tmp_path, family):
    theirs = their_model(family, {}, kind=1)
    theirs.save_pretrained(tmp_path)
    reports = []
    ours = load_hf(tmp_path, seed=4, report=reports.append)
    assert [line.removeprefix(str(tmp_path)) for line in reports] == [
        " has no language-model head: head.decoder.weight start from seed 4"
    ]
    input_ids = torch.arange(40).view(2, 20)
    assert (ours(input_ids) - theirs(input_ids=input_ids).last_hidden_state).abs().max() <= 1e-5
