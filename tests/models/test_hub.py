import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from torchrecipes.errors import UserError
from torchrecipes.models import bert, hf_config, load_hf, neobert, save_hf


def saved(folder, family="neobert", **arguments):
    model = {"neobert": neobert, "bert": bert}[family](37, 16, 2, 2, 24, **arguments)
    save_hf(model, folder)
    return model


def edit_config(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value != "REMOVED"}))


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def error_of(folder):
    with pytest.raises(UserError) as error:
        load_hf(folder, report=lambda line: None)
    return str(error.value)


@pytest.mark.parametrize(
    ("family", "arguments"),
    [("neobert", {}), ("neobert", {"tie_word_embeddings": False, "num_key_value_heads": 1}), ("bert", {})],
)
def test_save_load_save_changes_no_byte(tmp_path, family, arguments):
    model = saved(tmp_path / "first", family, **arguments)
    loaded = load_hf(tmp_path / "first", report=pytest.fail)
    assert loaded.config == model.config
    save_hf(loaded, tmp_path / "second")
    names = sorted(file.name for file in (tmp_path / "first").iterdir())
    assert names == ["config.json", "model.safetensors"]
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    tensors = load_file(tmp_path / "first" / "model.safetensors")
    assert sum(x.numel() for x in tensors.values()) == sum(p.numel() for p in model.parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(loaded.named_parameters())[name])


def test_special_tokens_come_from_the_tokenizer(tmp_path):
    class Tokenizer:
        pad_id, mask_id, cls_id, sep_id, bos_id, eos_id = 0, 4, 2, 3, None, None

        def save(self, folder, model_max_length=None):
            (folder / "tokenizer.json").write_text("{}")

    model = saved(tmp_path)
    assert hf_config(model)["pad_token_id"] is None
    assert "mask_token_id" not in hf_config(model)
    save_hf(model, tmp_path, Tokenizer())
    config = json.loads((tmp_path / "config.json").read_text())
    found = {key: config[f"{key}_token_id"] for key in ("pad", "mask", "bos", "eos")}
    assert found == {"pad": 0, "mask": 4, "bos": 2, "eos": 3}
    assert (tmp_path / "tokenizer.json").exists()
    load_hf(tmp_path)


def test_nothing_in_the_folder_is_unpickled(tmp_path):
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "has no model.safetensors" in error_of(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    message = error_of(tmp_path)
    assert "pytorch_model.bin" in message
    assert "save_pretrained" in message


@pytest.mark.parametrize(
    ("family", "changes", "messages"),
    [
        ("neobert", {"model_type": "mistral"}, ["model_type is 'mistral'; supported are bert, eurobert, "]),
        ("neobert", {"model_type": "REMOVED"}, ["model_type is None"]),
        ("neobert", {"hidden_act": "gelu"}, ["hidden_act: 'gelu' is not supported; only 'silu' is"]),
        ("neobert", {"mlp_bias": True, "attention_bias": True}, ["mlp_bias: True", "attention_bias: True"]),
        ("neobert", {"attention_dropout": 0.1}, ["attention_dropout: 0.1"]),
        ("neobert", {"rope_scaling": {"type": "linear", "factor": 2}}, ["rope_scaling: {'type'"]),
        (
            "neobert",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            ["rope_type: 'yarn'", "rope_parameters.factor: 4.0 is a key that is not known here"],
        ),
        ("neobert", {"sliding_window": 128}, ["sliding_window: 128 is a key that is not known here"]),
        ("neobert", {"vocab_size": "REMOVED"}, ["vocab_size is missing"]),
        ("neobert", {"num_hidden_layers": 2.5}, ["num_hidden_layers: 2.5 is not int"]),
        ("neobert", {"tie_word_embeddings": 1}, ["tie_word_embeddings: 1 is not bool"]),
        ("neobert", {"num_attention_heads": 3}, ["hidden_size (16) must be a multiple of num_attention"]),
        ("neobert", {"head_dim": 7}, ["the size of a head (7) even, for RoPE"]),
        ("neobert", {"num_attention_heads": 4, "num_key_value_heads": 3}, ["num_key_value_heads (3) must divide"]),
        ("bert", {"num_attention_heads": 3}, ["hidden_size (16) must be a multiple of num_attention_heads (3)"]),
        ("bert", {"hidden_act": "relu"}, ["hidden_act: 'relu'"]),
        ("bert", {"position_embedding_type": "relative_key"}, ["position_embedding_type: 'relative_key'"]),
        ("bert", {"is_decoder": True, "add_cross_attention": True}, ["is_decoder: True", "add_cross_attention: True"]),
        ("bert", {"tie_word_embeddings": False}, ["tie_word_embeddings: False"]),
        ("bert", {"pruned_heads": {"0": [1]}}, ["pruned_heads: {'0': [1]}"]),
        ("bert", {"quantization_config": {"bits": 4}}, ["quantization_config"]),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(tmp_path, family, changes, messages):
    saved(tmp_path, family)
    edit_config(tmp_path, **changes)
    text = error_of(tmp_path)
    assert "config.json" in text
    for message in messages:
        assert message in text


def test_harmless_keys_and_old_spellings_are_accepted(tmp_path):
    model = saved(tmp_path)
    edit_config(
        tmp_path,
        rope_parameters="REMOVED",
        rope_theta=10_000,
        rope_scaling=None,
        hidden_dropout=0.0,
        torch_dtype="bfloat16",
        transformers_version="4.40.0.dev0",
        auto_map={"AutoModel": "modeling_eurobert.EuroBertModel"},
        clf_pooling="late",
        pad_token="<pad>",
        id2label={"0": "A"},
    )
    assert load_hf(tmp_path).config == model.config.__class__(
        **vars(model.config) | {"num_key_value_heads": 2, "head_dim": 8}
    )


def test_tensors_that_do_not_fit_are_all_named(tmp_path):
    saved(tmp_path, tie_word_embeddings=False)

    def edit(tensors):
        tensors.pop("model.norm.weight")
        tensors["model.extra"] = torch.zeros(1)
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 16)

    edit_tensors(tmp_path, edit)
    message = error_of(tmp_path)
    assert "model.norm.weight is missing" in message
    assert "model.extra is not expected" in message
    assert "model.layers.0.mlp.up_proj.weight has the shape (3, 16); config.json makes it (24, 16)" in message


def test_half_a_head_is_an_error(tmp_path):
    saved(tmp_path, "bert")
    edit_tensors(tmp_path, lambda tensors: tensors.pop("cls.predictions.bias"))
    assert "cls.predictions.bias is missing" in error_of(tmp_path)


def test_a_tied_head_that_differs_is_an_error(tmp_path):
    saved(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(37, 16)}))
    message = error_of(tmp_path)
    assert "lm_head.weight differs from model.embed_tokens.weight" in message
    assert "tie_word_embeddings" in message


def test_damaged_folders(tmp_path):
    assert "does not exist" in error_of(tmp_path / "nowhere")
    saved(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "is damaged" in error_of(tmp_path)
    weights.unlink()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}))
    assert "model-00001-of-00001.safetensors does not exist" in error_of(tmp_path)
    index.write_text("[]")
    assert "is not an index of shards" in error_of(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "is not JSON" in error_of(tmp_path)
