"""Folders of other tools and classes, folders of runs, and models without an adapter."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests import ranks
from torchrecipes.data.sources.records import Document
from torchrecipes.data.tokenizers.load import load_tokenizer, train_wordpiece
from torchrecipes.errors import UserError
from torchrecipes.manifest import flush, write_manifest
from torchrecipes.models import (
    architecture_differences,
    bert,
    gpt2,
    has_hf_config,
    hf_state_dict,
    llama,
    load_hf,
    load_hf_weights,
    loading_hint,
    meta_model_from_hf,
    modernbert,
    resolve_model_folder,
    save_hf,
    stop_token_ids,
)

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
LLAMA = {"model_type": "llama"} | SIZES
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 61}
BERT = {"model_type": "bert"} | SIZES


def write_config(folder, config, bom=False):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8-sig" if bom else "utf-8")
    return folder


@pytest.mark.parametrize(
    "config",
    [
        # SmolLM2, old conversions, unsloth, files converted from GGUF, generation defaults.
        LLAMA | {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}},
        LLAMA | {"max_sequence_length": 2048, "_model_name_or_path": "x", "model_max_length": 2048},
        LLAMA | {"unsloth_version": "1", "unsloth_fixed": True, "_attn_implementation_autoset": True},
        LLAMA | {"use_sliding_window": False, "sliding_window": None, "partial_rotary_factor": 1.0},
        LLAMA | {"keys_to_ignore_at_inference": ["past_key_values"], "do_sample": False, "max_length": 20},
        LLAMA | {"hidden_act": "swish", "eos_token_id": [2, 3]},
        # GPT-2 medium and XL, DistilGPT2.
        GPT2 | {"_num_labels": 1, "n_special": 0, "predict_special_tokens": True, "output_past": True},
        BERT | {"output_past": True, "auto_map": {"AutoModel": "x.Y"}},
    ],
)
def test_keys_that_do_not_touch_the_network_are_skipped(tmp_path, config):
    meta_model_from_hf(write_config(tmp_path, config, bom=True), report=pytest.fail)


def test_unknown_keys_are_reported_if_empty_and_refused_otherwise(tmp_path):
    unknown = {"new_scaling": None, "use_new_norm": False, "extra_heads": 0, "new_layers": []}
    reports = []
    meta_model_from_hf(write_config(tmp_path, LLAMA | unknown), report=reports.append)
    assert len(reports) == 1 and all(key in reports[0] for key in unknown)
    for key, value in {"new_scaling": 2.0, "use_new_norm": True, "extra_heads": 1, "new_layers": [1]}.items():
        with pytest.raises(UserError) as error:
            meta_model_from_hf(write_config(tmp_path, LLAMA | {key: value}))
        assert [problem.key for problem in error.value.problems] == [key]


def test_chat_template_generation_config_and_stop_ids_travel(tmp_path):
    save_hf(llama(**SIZES), tmp_path / "first")
    (tmp_path / "first" / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    (tmp_path / "first" / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    save_hf(load_hf(tmp_path / "first"), tmp_path / "second")
    assert (tmp_path / "second" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert stop_token_ids(tmp_path / "second") == [2, 5]
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    (tmp_path / "first" / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    save_hf(load_hf(tmp_path / "first"), tmp_path / "second")
    assert (tmp_path / "second" / "chat_template.jinja").read_text() == "plain"
    (tmp_path / "first" / "chat_template.jinja").write_text("newer")
    save_hf(load_hf(tmp_path / "first"), tmp_path / "second")
    assert (tmp_path / "second" / "chat_template.jinja").read_text() == "newer"
    tokenizer = train_wordpiece([Document("a few words for a tokenizer " * 3, "here")], vocab_size=60)
    (tmp_path / "first" / "generation_config.json").unlink()
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    (tmp_path / "first" / "config.json").write_text(json.dumps(config | {"eos_token_id": [17, 5]}))
    for source, target in (("first", "fourth"), ("fourth", "fifth")):
        save_hf(load_hf(tmp_path / source), tmp_path / target, tokenizer)
    assert stop_token_ids(tmp_path / "fifth") == [17, 5, tokenizer.sep_id]
    assert stop_token_ids(write_config(tmp_path / "third", LLAMA | {"eos_token_id": 7})) == [7]
    assert stop_token_ids(write_config(tmp_path / "third", LLAMA | {"eos_token_id": None})) == []


def test_a_bert_keeps_token_types_for_fine_tuning_on_pairs(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = train_wordpiece([Document("a few words for a tokenizer " * 3, "here")], vocab_size=60)
    save_hf(bert(**SIZES | {"vocab_size": tokenizer.vocab_size}), tmp_path / "first", tokenizer)
    again = load_tokenizer(tmp_path / "first", pad_vocab_to_multiple_of=1)
    save_hf(load_hf(tmp_path / "first"), tmp_path / "second", again)
    encoded = transformers.AutoTokenizer.from_pretrained(tmp_path / "second")("few words", "a tokenizer")
    assert 1 in encoded["token_type_ids"]


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "BertForTokenClassification", "BertForPreTraining"])
def test_heads_of_other_classes_are_dropped_and_reported(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(**SIZES)
    theirs = getattr(transformers, name)(config).eval()
    theirs.save_pretrained(tmp_path)
    reports = []
    model = load_hf(tmp_path, report=reports.append).eval()
    text = "\n".join(reports)
    headless = name != "BertForPreTraining"
    assert ("classifier.weight" in text) == headless and ("head.bias" in text) == headless
    ids = torch.arange(20).view(2, 10)
    expected = theirs.bert(input_ids=ids).last_hidden_state
    assert (model(ids) - expected).abs().max() <= 1e-5


def test_the_classifier_of_a_decoder_is_dropped(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    reports = []
    load_hf(tmp_path, report=reports.append)
    assert "score.weight" in reports[0] and "head.decoder.weight" in reports[1]


def test_quantized_tensors_are_refused(tmp_path):
    save_hf(llama(**SIZES), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    for dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn):
        save_file(tensors | {name: torch.zeros(48, 32).to(dtype)}, tmp_path / "model.safetensors")
        with pytest.raises(UserError) as error:
            load_hf(tmp_path)
        assert [problem.key for problem in error.value.problems] == [name]


# Runs.


def make_run(folder, model, steps):
    for step in steps:
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        save_hf(model, checkpoint)
        write_manifest(checkpoint, step, flush(checkpoint, [file.name for file in checkpoint.iterdir()]))
    return checkpoint


def test_a_flipped_bit_is_found_before_the_weights_are_used(tmp_path):
    weights = make_run(tmp_path, llama(**SIZES), (5,)) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_hf(tmp_path)
    assert error.value.code == "corrupt_checkpoint" and "model.safetensors" in str(error.value)


def test_the_folder_of_a_run_stands_for_its_newest_valid_checkpoint(tmp_path):
    model = llama(**SIZES)
    newest = make_run(tmp_path, model, (5, 10, 99_999_999, 100_000_000))
    assert resolve_model_folder(tmp_path) == newest
    assert torch.equal(load_hf(tmp_path).head.weight, model.head.weight)
    (newest / "manifest.json").unlink()
    assert resolve_model_folder(tmp_path).name == "step-99999999"
    weights = tmp_path / "checkpoints" / "step-99999999" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert resolve_model_folder(tmp_path).name == "step-00000010"
    for checkpoint in (tmp_path / "checkpoints").iterdir():
        (checkpoint / "manifest.json").unlink(missing_ok=True)
    with pytest.raises(UserError) as error:
        resolve_model_folder(tmp_path)
    assert error.value.code == "corrupt_checkpoint"
    (tmp_path / "empty").mkdir()
    for folder, code in ((tmp_path / "empty", "no_model"), (tmp_path / "none", "not_found")):
        with pytest.raises(UserError) as error:
            resolve_model_folder(folder)
        assert error.value.code == code


# Models without an adapter.


class Own(nn.Module):
    def __init__(self, size=8):
        super().__init__()
        self.body = nn.Linear(4, size)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("steps", torch.tensor([3, 4]))
        self.head = nn.Linear(size, 3)

    def init_weights(self, seed):
        torch.manual_seed(seed)
        self.body.reset_parameters()
        self.head.reset_parameters()


def test_a_model_without_adapter_keeps_its_names(tmp_path):
    model = Own()
    save_hf(model, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.safetensors"]
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    assert not has_hf_config(tmp_path)
    assert "load_file" in loading_hint(model, tmp_path) and "config.yaml" in loading_hint(model, tmp_path)
    other = Own()
    assert architecture_differences(other, tmp_path) == []
    assert len(architecture_differences(Own(9), tmp_path)) == 3
    load_hf_weights(other, tmp_path, report=pytest.fail)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert hf_state_dict(model, {"body.weight": model.body.weight}).keys() == {"body.weight"}
    with pytest.raises(UserError) as error:
        meta_model_from_hf(tmp_path)
    assert error.value.code == "no_config"


def test_what_a_model_without_adapter_lacks(tmp_path):
    model = Own()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}
    save_file(tensors | {"classifier.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    reports = []
    other = Own()
    load_hf_weights(other, tmp_path, seed=4, report=reports.append)
    assert "classifier.weight" in reports[0] and "head.weight" in reports[1]
    assert torch.equal(other.body.weight, model.body.weight)
    del tensors["body.bias"]
    save_file(tensors | {"body.extra": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as error:
        load_hf_weights(other, tmp_path)
    assert {problem.key for problem in error.value.problems} == {"body.bias", "body.extra"}


# Ranks.

SCRIPT = """
import sys
sys.path.insert(0, ROOT)
import torch
from torch.distributed.fsdp import fully_shard
from safetensors.torch import save_file
from torchrecipes.error_file import hard_exit
from torchrecipes.models import hf_state_dict, load_hf_weights, meta_model_from_hf
from torchrecipes.models.transformers_model import from_transformers

torch.distributed.init_process_group("gloo")
folder, kind = sys.argv[1:3]
with torch.device("meta"):
    model = from_transformers(folder) if kind == "transformers" else meta_model_from_hf(folder)
for block in model.blocks:
    fully_shard(block)
fully_shard(model)
model.to_empty(device="cpu")
model.init_weights(5)
load_hf_weights(model, folder, seed=5, report=lambda line: None)
ids = torch.arange(24).view(2, 12)
model(ids).sum().backward()
tensors = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
if torch.distributed.get_rank() == 0:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder + "/found.safetensors")
torch.distributed.barrier()
hard_exit(0)
""".replace("ROOT", repr(str(Path(__file__).parents[2])))


@pytest.mark.parametrize(
    ("family", "kind"), [(gpt2, "ours"), (modernbert, "ours"), (bert, "transformers"), (llama, "transformers")]
)
def test_sharded_models_load_the_same_weights(tmp_path, family, kind):
    from torchrecipes.models.transformers_model import from_transformers

    save_hf(family(**SIZES, seed=3), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    headless = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith(("lm_head.", "cls.", "head.", "decoder."))
    }
    save_file(headless, tmp_path / "model.safetensors")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    ranks.run(script, 2, tmp_path, kind)
    alone = load_hf(tmp_path, seed=5, report=lambda line: None)
    if kind == "transformers":
        alone = from_transformers(str(tmp_path), seed=5)
        load_hf_weights(alone, tmp_path, seed=5, report=lambda line: None)
    found = load_file(tmp_path / "found.safetensors")
    assert found.keys() == alone.state_dict().keys()
    for name, tensor in alone.state_dict().items():
        assert torch.equal(tensor, found[name]), name
