"""Scaled RoPE and longer tables against `transformers`, in both directions."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, LlamaConfig, LlamaForCausalLM

from torchrecipes.models import (
    bert,
    distilbert,
    extend_context,
    gpt2,
    llama,
    load_hf,
    mistral,
    modernbert,
    neobert,
    qwen2,
    roberta,
    save_hf,
)

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
SIZES |= {"initializer_range": 0.1, "max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 32}
IDS = torch.randint(2, 61, (2, 120), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"attention_factor": 0.7},
        {"beta_fast": 8.0, "beta_slow": 2.0},
        {"mscale": 0.7, "mscale_all_dim": 1.3},
        {"truncate": False},
        {"factor": 1.0},
    ],
)
def test_their_yarn_is_read(tmp_path, keys):
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES | {"max_position_embeddings": 128}, rope_parameters=YARN | keys)
    theirs = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_hf(tmp_path, report=pytest.fail).eval()
    with torch.no_grad():
        expected = theirs(input_ids=IDS).logits
        assert (ours.head(ours(IDS)) - expected).abs().max() <= 1e-5
        plain = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 100.0}))
        plain.load_state_dict(theirs.state_dict())
        if keys != {"factor": 1.0}:
            assert (plain.eval()(input_ids=IDS).logits - expected).abs().max() > 0.01  # the scaling shows


ROTARY = [(family, method) for family in (llama, neobert, modernbert) for method in ("yarn", "linear", "theta")]
ROTARY += [(mistral, "yarn"), (qwen2, "yarn")]
LEARNED = [(family, method) for family in (gpt2, bert) for method in ("tile", "interpolate")]
LEARNED += [(roberta, "tile"), (distilbert, "tile")]
MASKED = (bert, roberta, distilbert, neobert, modernbert)


@pytest.mark.parametrize(("family", "method"), [*ROTARY, *LEARNED])
def test_an_extended_model_loads_there(tmp_path, family, method):
    model = family(**SIZES) if (family, method) in LEARNED else family(**SIZES, rope_theta=100.0)
    model = extend_context(model, 128, method=method).eval()
    save_hf(model, tmp_path)
    auto = AutoModelForMaskedLM if family in MASKED else AutoModelForCausalLM
    theirs, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert theirs.config.max_position_embeddings == 128 + model.position_offset
    again = load_hf(tmp_path, report=pytest.fail).eval()
    assert again.config == model.config
    with torch.no_grad():
        assert torch.equal(again(IDS), model(IDS))
        assert (model.head(model(IDS)) - theirs.eval()(input_ids=IDS).logits).abs().max() <= 1e-5
