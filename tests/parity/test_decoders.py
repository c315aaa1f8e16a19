"""Decoders against `transformers`: logits and gradients, loaded from its folders and read by it from ours."""

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    OlmoeConfig,
    OlmoeForCausalLM,
    OlmoeModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3MoeModel,
)

from torchrecipes.models import gpt2, hf_state_dict, llama, load_hf, mistral, olmoe, qwen2, qwen3, qwen3_moe, save_hf

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
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2}
QWEN3_MOE = {"num_key_value_heads": 4, "head_dim": 12, "moe_intermediate_size": 56, "norm_topk_prob": True} | EXPERTS
THEIRS = {
    "llama": (LlamaForCausalLM, LlamaModel, LlamaConfig, {"num_key_value_heads": 4, "rope_parameters": ROPE}),
    "mistral": (
        MistralForCausalLM,
        MistralModel,
        MistralConfig,
        {"num_key_value_heads": 4, "sliding_window": None, "rope_parameters": ROPE},
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Model, Qwen2Config, {"num_key_value_heads": 4, "rope_parameters": ROPE}),
    "qwen3": (
        Qwen3ForCausalLM,
        Qwen3Model,
        Qwen3Config,
        {"num_key_value_heads": 4, "head_dim": 12, "rope_parameters": ROPE},
    ),
    "gpt2": (GPT2LMHeadModel, GPT2Model, GPT2Config, {}),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeModel, Qwen3MoeConfig, {"rope_parameters": ROPE} | QWEN3_MOE),
    "olmoe": (OlmoeForCausalLM, OlmoeModel, OlmoeConfig, {"rope_parameters": ROPE, "pad_token_id": None} | EXPERTS),
}
OURS = {
    "llama": (llama, {"rope_theta": 100.0}),
    "mistral": (mistral, {"rope_theta": 100.0, "rms_norm_eps": 1e-6}),
    "qwen2": (qwen2, {"rope_theta": 100.0, "tie_word_embeddings": False}),
    "qwen3": (qwen3, {"rope_theta": 100.0}),
    "gpt2": (gpt2, {}),
    "qwen3_moe": (qwen3_moe, {"rope_theta": 100.0} | QWEN3_MOE),
    "olmoe": (olmoe, {"rope_theta": 100.0} | EXPERTS),
}
CASES = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 2}),
    ("llama", {"head_dim": 8, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"rope_scaling": LLAMA3}),
    ("llama", {"rope_scaling": LINEAR}),
    ("mistral", {}),
    ("mistral", {"sliding_window": 7, "num_key_value_heads": 2, "head_dim": 16}),
    ("qwen2", {}),
    ("qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    ("qwen3", {}),
    ("qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 2, "head_dim": 16}),
    ("qwen3", {"head_dim": 8, "num_key_value_heads": 1, "attention_bias": True}),
    ("gpt2", {}),
    ("gpt2", {"tie_word_embeddings": False}),
    ("qwen3_moe", {}),
    ("qwen3_moe", {"tie_word_embeddings": True, "num_key_value_heads": 2, "decoder_sparse_step": 2}),
    ("qwen3_moe", {"mlp_only_layers": [1], "norm_topk_prob": False, "attention_bias": True, "num_experts_per_tok": 3}),
    ("olmoe", {}),
    ("olmoe", {"num_key_value_heads": 2, "tie_word_embeddings": True, "norm_topk_prob": True}),
    ("olmoe", {"attention_bias": True, "num_experts_per_tok": 6}),
]


def their_model(family, changes, kind=0):
    classes, config_class, defaults = THEIRS[family][:2], *THEIRS[family][2:]
    keys = SIZES | defaults | changes
    if "rope_scaling" in keys:
        keys["rope_parameters"] = keys.pop("rope_scaling") | {"rope_theta": ROPE["rope_theta"]}
    if family == "gpt2":  # whose config takes the other names as they are
        keys["n_inner"] = keys.pop("intermediate_size")
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
    theirs = their_model(family, {"tie_word_embeddings": False}, kind=1)
    theirs.save_pretrained(tmp_path)
    reports = []
    ours = load_hf(tmp_path, seed=4, report=reports.append).eval()
    assert len(reports) == 1 and "head.decoder.weight" in reports[0]
    input_ids = torch.arange(40).view(2, 20)
    assert (ours(input_ids) - theirs(input_ids=input_ids).last_hidden_state).abs().max() <= 1e-5


def test_a_head_with_a_bias_is_kept_here_and_dropped_there(tmp_path):
    """And attention without biases is attention with biases of 0."""
    ours = randomize(gpt2(**SIZES, attention_bias=False, tie_word_embeddings=False, lm_head_bias=True))
    save_hf(ours, tmp_path)
    again = load_hf(tmp_path, report=pytest.fail)
    assert again.config == ours.config
    theirs, info = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {"lm_head.bias"}
    assert all(name.endswith(("c_attn.bias", "c_proj.bias")) for name in info["missing_keys"])
    input_ids = torch.arange(40).view(2, 20)
    logits = again.head(again.eval()(input_ids))
    assert (logits - theirs.eval()(input_ids=input_ids).logits - ours.head.bias).abs().max() <= 1e-5
    assert ours.head.bias.std() > 0.1


def test_the_first_gpt2_folders(tmp_path):
    """Without a prefix, with the causal masks, the weight of the tied head, and keys of other classes."""
    import json

    from safetensors.torch import load_file, save_file

    theirs = their_model("gpt2", {})
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    old["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    for i in range(3):
        old[f"h.{i}.attn.bias"], old[f"h.{i}.attn.masked_bias"] = torch.ones(1, 1, 4, 4), torch.tensor(-1e4)
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"n_ctx": 64, "summary_type": "cls_index"}))
    reports = []
    assert_same(load_hf(tmp_path, report=reports.append), theirs)
    assert len(reports) == 1
    assert "h.0.attn.bias" in reports[0]


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe"])
def test_the_auxiliary_loss_of_one_layer_is_theirs(tmp_path, family):
    """Of several, theirs takes the layers' tokens together, ours the mean of the layers' losses."""
    theirs = their_model(family, {"num_hidden_layers": 1, "router_aux_loss_coef": 0.7})
    theirs.save_pretrained(tmp_path)
    ours = load_hf(tmp_path)
    input_ids = torch.randint(1, 101, (3, 40), generator=torch.Generator().manual_seed(3))
    aux_loss = theirs(input_ids=input_ids, output_router_logits=True).aux_loss
    ours(input_ids)
    assert aux_loss > 2.01  # 2 is an even load
    assert abs(ours.routing.aux_loss.item() - aux_loss.item()) <= 1e-5
    assert ours.router_loss.item() == pytest.approx(0.7 * 120 * aux_loss.item(), rel=1e-5)
    ours.router_loss.backward()
    (120 * 0.7 * aux_loss).backward()
    name = "model.layers.0.mlp.gate.weight"
    gradient, expected = ours.blocks[0].mlp.gate.weight.grad, dict(theirs.named_parameters())[name].grad
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe"])
def test_experts_are_stored_one_by_one_there_and_together_here(tmp_path, family):
    """Both read both."""
    from safetensors.torch import load_file

    theirs = their_model(family, {})
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_hf(tmp_path / "theirs")
    save_hf(ours, tmp_path / "ours")
    there, here = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    mlp = "model.layers.2.mlp.experts"
    assert f"{mlp}.5.down_proj.weight" in there and f"{mlp}.down_proj" not in there
    for number in range(6):
        gate, up, down = (there[f"{mlp}.{number}.{kind}_proj.weight"] for kind in ("gate", "up", "down"))
        assert torch.equal(here[f"{mlp}.gate_up_proj"][number], torch.cat((gate, up)))
        assert torch.equal(here[f"{mlp}.down_proj"][number], down)
    type(theirs).from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "again")
    again = load_hf(tmp_path / "again").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_dropout_is_that_of_the_config(tmp_path, family):
    if family == "gpt2":
        changes = {"embd_pdrop": 0.2, "attn_pdrop": 0.4, "resid_pdrop": 0.3}
    else:
        changes = {"attention_dropout": 0.4}
    theirs = their_model(family, changes)
    theirs.save_pretrained(tmp_path)
    ours = load_hf(tmp_path)
    body = theirs.base_model.train()
    input_ids = torch.arange(60).view(3, 20)
    with torch.no_grad():  # the same spread of what many passes give
        spread = [
            torch.stack([run(input_ids) for _ in range(60)]).std(0).mean().item()
            for run in (ours.train(), lambda ids: body(input_ids=ids).last_hidden_state)
        ]
        assert torch.equal(ours.eval()(input_ids), ours(input_ids))
    assert spread[0] > 0.01
    assert abs(spread[0] - spread[1]) < 0.03 * spread[1]
