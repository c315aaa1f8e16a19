"""Encoders without their language-model head: what `AutoModel` reads and writes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from torchrecipes.errors import UserError
from torchrecipes.models import (
    bert,
    distilbert,
    extend_context,
    gpt2,
    load_hf,
    meta_model_from_hf,
    modernbert,
    neobert,
    roberta,
    save_hf,
)
from torchrecipes.models.hub import architecture_differences, load_hf_weights

SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 40, "initializer_range": 0.2}
FAMILIES = {
    "bert": (bert, {}),
    "roberta": (roberta, {}),
    "xlm-roberta": (roberta, {"model_type": "xlm-roberta"}),
    "distilbert": (distilbert, {}),
    "modernbert": (modernbert, {"local_attention": 8}),
    "neobert": (neobert, {}),
    "neobert with a bias": (neobert, {"lm_head_bias": True, "tie_word_embeddings": False}),
}
POOLERS = {"bert", "roberta", "xlm-roberta"}
INPUTS = torch.randint(5, 60, (2, 20), generator=torch.Generator().manual_seed(1))


def pretrained(folder, family):
    """A model with its language-model head, whose vectors are random, too."""
    build, keys = FAMILIES[family]
    model = build(**SIZES, **keys, seed=3).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, float(name.endswith("weight")), 0.2)
    save_hf(model, folder)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pretrained_model_becomes_an_encoder_that_auto_model_loads(tmp_path, family):
    from transformers import AutoModel

    pretrained_model, lines = pretrained(tmp_path / "lm", family), []
    encoder = load_hf(tmp_path / "lm", report=lines.append, head=False).eval()
    # A tied head without a bias has no tensors of its own, to be named as dropped.
    assert encoder.head is None and len(lines) == (family != "neobert")
    with torch.no_grad():
        hidden = encoder(INPUTS)
        assert torch.equal(hidden, pretrained_model(INPUTS))
    save_hf(encoder, tmp_path / "encoder")
    theirs, info = AutoModel.from_pretrained(tmp_path / "encoder", output_loading_info=True)
    assert not any(info.values()), info
    assert [type(theirs).__name__] == json.loads((tmp_path / "encoder/config.json").read_text())["architectures"]
    with torch.no_grad():
        assert (theirs.eval()(INPUTS).last_hidden_state - hidden).abs().max() <= 1e-5
    assert (tmp_path / "encoder" / "model.safetensors").stat().st_size < (
        tmp_path / "lm" / "model.safetensors"
    ).stat().st_size or family in POOLERS
    # And back, as a run resumes and as another one starts from it.
    assert architecture_differences(encoder, tmp_path / "encoder") == []
    again = load_hf(tmp_path / "encoder", report=lines.append, head=False).eval()
    assert len(lines) == (family != "neobert") + (family in POOLERS)
    assert again.config == encoder.config and torch.equal(again(INPUTS), hidden)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_auto_model_saved_is_read(tmp_path, family):
    from transformers import AutoConfig, AutoModel

    pretrained(tmp_path, family)
    theirs = AutoModel.from_config(AutoConfig.from_pretrained(tmp_path)).eval()
    theirs.save_pretrained(tmp_path)
    lines = []
    model = meta_model_from_hf(tmp_path, head=False).to_empty(device="cpu")
    coverage = load_hf_weights(model, tmp_path, report=lines.append)
    assert not coverage.initialized and len(coverage.loaded) == len(model.state_dict())
    assert coverage.dropped == ["pooler.dense.bias", "pooler.dense.weight"] * (family in POOLERS)
    assert len(lines) == (family in POOLERS)
    with torch.no_grad():
        assert (model.eval()(INPUTS) - theirs(INPUTS).last_hidden_state).abs().max() <= 1e-5


def test_the_pooler_that_is_written_changes_nothing(tmp_path):
    from transformers import AutoModel

    pretrained(tmp_path, "bert")
    save_hf(load_hf(tmp_path, head=False, report=lambda line: None), tmp_path / "encoder")
    outputs = AutoModel.from_pretrained(tmp_path / "encoder").eval()(INPUTS)
    assert torch.allclose(outputs.pooler_output, outputs.last_hidden_state[:, 0].tanh(), atol=1e-6)


def test_a_classifier_is_dropped_by_name_and_a_missing_layer_refused(tmp_path):
    pretrained(tmp_path, "bert")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["classifier.weight"] = torch.zeros(2, 32)
    save_file(tensors, tmp_path / "model.safetensors")
    model = meta_model_from_hf(tmp_path, head=False).to_empty(device="cpu")
    coverage = load_hf_weights(model, tmp_path, report=lambda line: None)
    assert "classifier.weight" in coverage.dropped and "cls.predictions.bias" in coverage.dropped
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as error:
        load_hf_weights(model, tmp_path, report=lambda line: None)
    assert [problem.key for problem in error.value.problems] == ["encoder.layer.1.output.dense.weight"]


def test_a_decoder_is_refused(tmp_path):
    save_hf(gpt2(**SIZES), tmp_path)
    with pytest.raises(UserError) as error:
        meta_model_from_hf(tmp_path, head=False)
    assert error.value.code == "not_an_encoder"


def test_longer_positions_of_an_encoder(tmp_path):
    pretrained(tmp_path, "bert")
    model = extend_context(meta_model_from_hf(tmp_path, head=False), 80).to_empty(device="cpu")
    load_hf_weights(model, tmp_path, report=lambda line: None)
    table = load_file(tmp_path / "model.safetensors")["bert.embeddings.position_embeddings.weight"]
    assert torch.equal(model.embedding.position_embeddings.weight, torch.cat((table, table)))
    assert model.hf_adapter.architecture == "BertModel"


@pytest.mark.parametrize("build", [neobert, distilbert])
def test_token_types_for_a_model_without_them_are_refused(build):
    with pytest.raises(UserError) as error:
        build(**SIZES)(INPUTS, token_type_ids=torch.zeros_like(INPUTS))
    assert (error.value.key, error.value.code) == ("model", "no_token_types")
