import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from torchrecipes.errors import UserError
from torchrecipes.models import (
    bert,
    distilbert,
    gpt2,
    hf_config,
    llama,
    load_hf,
    mistral,
    modernbert,
    neobert,
    qwen2,
    qwen3,
    roberta,
    save_hf,
)
from torchrecipes.models.hub import meta_model_from_hf

FAMILIES = {"neobert": neobert, "bert": bert, "gpt2": gpt2, "llama": llama, "qwen3": qwen3}
FAMILIES |= {"modernbert": modernbert, "roberta": roberta, "distilbert": distilbert, "mistral": mistral, "qwen2": qwen2}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}


def saved(folder, family="neobert", **arguments):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = FAMILIES[family](vocab_size=37, **sizes, **arguments)
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
    return error.value


def problem_keys(folder):
    error = error_of(folder)
    assert error.code == "weights_mismatch"
    return {problem.key for problem in error.problems}


@pytest.mark.parametrize(
    ("family", "arguments"),
    [
        ("neobert", {}),
        ("neobert", {"tie_word_embeddings": False, "num_key_value_heads": 1}),
        ("bert", {}),
        ("modernbert", {}),
        ("modernbert", {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True}),
        ("modernbert", {"decoder_bias": False, "tie_word_embeddings": False, "rope_scaling": LLAMA3}),
        ("modernbert", {"global_attn_every_n_layers": 1, "rope_theta": 5.0, "local_rope_theta": 6.0}),
        ("roberta", {"pad_token_id": 0}),
        ("roberta", {"model_type": "xlm-roberta", "type_vocab_size": 2}),
        ("distilbert", {"attention_dropout": 0.1}),
        ("mistral", {"sliding_window": 5, "num_key_value_heads": 1}),
        ("mistral", {}),
        ("qwen2", {"num_key_value_heads": 1}),
        ("gpt2", {}),
        ("gpt2", {"tie_word_embeddings": False, "attention_bias": False, "lm_head_bias": True, "attn_pdrop": 0.1}),
        ("llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True, "lm_head_bias": True, "rope_scaling": LLAMA3}),
        ("qwen3", {"num_key_value_heads": 1, "head_dim": 12, "tie_word_embeddings": False}),
        ("qwen3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "attention_dropout": 0.1}),
    ],
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
    assert error_of(tmp_path).code == "no_model"
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    error = error_of(tmp_path)
    assert error.code == "pickle" and "pytorch_model.bin" in str(error)
    (tmp_path / "config.json").unlink()
    assert error_of(tmp_path).code == "pickle"


@pytest.mark.parametrize(
    ("family", "changes", "keys"),
    [
        ("neobert", {"hidden_act": "gelu"}, "hidden_act"),
        ("neobert", {"mlp_bias": True, "attention_bias": True}, "mlp_bias attention_bias"),
        ("neobert", {"attention_dropout": 0.1}, "attention_dropout"),
        ("neobert", {"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling"),
        ("neobert", {"rope_scaling": {"type": "yarn", "factor": 2, "beta": 3}}, "rope_scaling"),
        ("neobert", {"rope_parameters": DYNAMIC}, "rope_scaling"),
        ("neobert", {"sliding_window": 128}, "sliding_window"),
        ("neobert", {"vocab_size": "REMOVED"}, "vocab_size"),
        ("neobert", {"num_hidden_layers": 2.5}, "num_hidden_layers"),
        ("neobert", {"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ("neobert", {"num_attention_heads": 3, "head_dim": None}, "hidden_size"),
        ("neobert", {"head_dim": 7}, "head_dim"),
        ("neobert", {"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads"),
        ("bert", {"num_attention_heads": 3}, "hidden_size"),
        ("bert", {"hidden_act": "relu"}, "hidden_act"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("bert", {"is_decoder": True, "add_cross_attention": True}, "is_decoder add_cross_attention"),
        ("bert", {"tie_word_embeddings": False}, "tie_word_embeddings"),
        ("bert", {"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ("bert", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("gpt2", {"n_head": 3}, "hidden_size"),
        ("gpt2", {"activation_function": "gelu"}, "activation_function"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"scale_attn_weights": False, "add_cross_attention": True}, "scale_attn_weights add_cross_attention"),
        ("gpt2", {"rope_theta": 1e4}, "rope_theta"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"rope_parameters": DYNAMIC}, "rope_scaling"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "rope_scaling"),
        ("llama", {"rope_parameters": LLAMA3 | {"factor": 0}}, "rope_scaling"),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rope_scaling"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"head_dim": 7}, "head_dim"),
        ("llama", {"num_attention_heads": 3, "head_dim": None}, "hidden_size"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads"),
        ("llama", {"sliding_window": 128}, "sliding_window"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 128}, "use_sliding_window sliding_window"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 2}, "layer_types"),
    ],
)
def test_keys_that_change_the_network_are_refused_by_name(tmp_path, family, changes, keys):
    saved(tmp_path, family)
    edit_config(tmp_path, **changes)
    error = error_of(tmp_path)
    assert error.code == "unsupported_config"
    assert str(tmp_path / "config.json") in str(error)
    assert {problem.key for problem in error.problems} == set(keys.split())


def test_sizes_below_1_and_unknown_families_are_refused(tmp_path):
    saved(tmp_path, "gpt2")
    edit_config(tmp_path, n_layer=0)
    assert "num_hidden_layers=0" in str(error_of(tmp_path))
    for model_type in ("no-such-model", "REMOVED"):
        edit_config(tmp_path, model_type=model_type)
        assert error_of(tmp_path).code == "unknown_model_type"


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
    keys = {"model.norm.weight", "model.extra", "model.layers.0.mlp.up_proj.weight"}
    assert problem_keys(tmp_path) == keys


def test_half_a_head_is_an_error(tmp_path):
    saved(tmp_path, "bert")
    edit_tensors(tmp_path, lambda tensors: tensors.pop("cls.predictions.bias"))
    assert problem_keys(tmp_path) == {"cls.predictions.bias"}


def test_a_tied_head_that_differs_is_an_error(tmp_path):
    saved(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(37, 16)}))
    error = error_of(tmp_path)
    assert error.code == "weights_mismatch"
    assert "lm_head.weight" in str(error) and "tie_word_embeddings" in error.hint


def test_corrupt_folders(tmp_path):
    assert error_of(tmp_path / "nowhere").code == "not_found"
    (tmp_path / "paris").mkdir()
    assert str(tmp_path / "paris") in error_of(tmp_path / "pairs").hint
    saved(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert error_of(tmp_path).code == "corrupt_file"
    weights.unlink()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}))
    assert error_of(tmp_path).code == "missing_shard"
    index.write_text("[]")
    assert error_of(tmp_path).code == "corrupt_index"
    (tmp_path / "config.json").write_text("{")
    assert error_of(tmp_path).code == "not_json"


LLAMA_3_2_1B = """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
"bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "hidden_size":
2048, "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072,
"mlp_bias": false, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
"num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor":
32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
"rope_type": "llama3"}, "rope_theta": 500000.0, "tie_word_embeddings": true, "torch_dtype":
"bfloat16", "transformers_version": "4.45.0.dev0", "use_cache": true, "vocab_size": 128256}"""
QWEN3_0_6B = """{"architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
"bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
"hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": 3072,
"max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
"num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
"rope_scaling": null, "rope_theta": 1000000, "sliding_window": null, "tie_word_embeddings": true,
"torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": true,
"use_sliding_window": false, "vocab_size": 151936}"""
GPT2 = """{"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
"bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
"layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12,
"n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": null,
"summary_first_dropout": 0.1, "summary_proj_to_labels": true, "summary_type": "cls_index",
"summary_use_proj": true, "task_specific_params": {"text-generation": {"do_sample": true,
"max_length": 50}}, "vocab_size": 50257}"""


@pytest.mark.parametrize(
    ("config", "parameters"), [(LLAMA_3_2_1B, 1_235_814_400), (QWEN3_0_6B, 596_049_920), (GPT2, 124_439_808)]
)
def test_published_configs_are_understood(tmp_path, config, parameters):
    (tmp_path / "config.json").write_text(config)
    model = meta_model_from_hf(tmp_path)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    if config is LLAMA_3_2_1B:
        assert model.config.rope_scaling == LLAMA3
    if config is QWEN3_0_6B:
        with torch.device("meta"):
            assert model.config == qwen3("0.6b").config
    if config is GPT2:
        assert (model.config.attn_pdrop, model.config.max_position_embeddings) == (0.1, 1024)


def test_a_headless_folder_of_a_model_with_a_head_bias_starts_it_at_zero(tmp_path):
    saved(tmp_path, "llama", tie_word_embeddings=True, lm_head_bias=True)
    edit_tensors(tmp_path, lambda tensors: tensors.pop("lm_head.bias"))
    reports = []
    model = load_hf(tmp_path, report=reports.append)
    assert len(reports) == 1 and "head.bias" in reports[0]
    assert model.head.bias.tolist() == [0.0] * 37
