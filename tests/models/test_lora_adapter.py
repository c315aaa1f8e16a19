"""LoRA in folders: peft reads what we write and the other way round, root folders are merged."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from torchrecipes.errors import UserError
from torchrecipes.models import (
    bert,
    distilbert,
    gpt2,
    llama,
    load_hf,
    load_lora,
    modernbert,
    neobert,
    qwen3,
    roberta,
    save_hf,
    save_lora,
)
from torchrecipes.modules import apply_lora
from torchrecipes.modules.lora import lora_layers

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

FAMILIES = [bert, roberta, distilbert, modernbert, neobert, gpt2, llama, qwen3]
MASKED = {bert, roberta, distilbert, modernbert, neobert}


def small(family, seed=0):
    return family(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        seed=seed,
    ).eval()


def trained(model, **options):
    """The model with LoRA whose B is not 0."""
    apply_lora(model, **{"rank": 4, "targets": "all_linear"} | options)
    for layer in lora_layers(model).values():
        layer.lora_B.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(5))
    return model


def ids():
    return torch.randint(5, 64, (2, 12), generator=torch.Generator().manual_seed(1))


def theirs(family, folder):
    kind = transformers.AutoModelForMaskedLM if family in MASKED else transformers.AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("targets", ["all_linear", "attention"])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_it_with_equal_outputs(family, targets, tmp_path):
    save_hf(small(family), tmp_path / "base")
    model = trained(small(family), targets=targets, rslora=targets == "attention")
    model.lora.base = "base"
    save_lora(model, tmp_path / "adapter")
    save_hf(model, tmp_path / "merged")
    expected = model.head(model(ids()))
    base = theirs(family, tmp_path / "base")
    assert (base(ids()).logits - expected).abs().max() > 1e-2
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert (loaded(ids()).logits - expected).abs().max() < 1e-5
    names = {name for name, _ in loaded.named_parameters() if "lora_" in name}
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name.replace(".default", "") for name in names} == stored.keys()
    assert (theirs(family, tmp_path / "merged")(ids()).logits - expected).abs().max() < 1e-5


@pytest.mark.parametrize("family", [bert, gpt2, llama])
def test_an_adapter_of_peft_is_loaded(family, tmp_path):
    save_hf(small(family), tmp_path / "base")
    targets = {bert: ["query", "value", "output.dense"], gpt2: ["c_attn", "c_proj"], llama: ["q_proj", "v_proj"]}
    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets[family], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(theirs(family, tmp_path / "base"), settings).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    model = load_lora(load_hf(tmp_path / "base"), tmp_path / "adapter").eval()
    assert (model.head(model(ids())) - adapted(ids()).logits).abs().max() < 1e-5
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    save_lora(model, tmp_path / "again")
    again, first = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("again", "adapter"))
    assert again.keys() == first.keys() and all(torch.equal(again[name], first[name]) for name in first)


def test_a_head_that_was_trained_goes_along(tmp_path):
    model = trained(small(bert), modules_to_save=["head.transform.*", "head.bias"])
    model.head.transform.dense.weight.data.normal_()
    save_hf(small(bert), tmp_path / "base")
    save_lora(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert "cls.predictions.transform.dense" in config["modules_to_save"]
    loaded = load_lora(load_hf(tmp_path / "base"), tmp_path / "adapter").eval()
    assert torch.equal(loaded.head(loaded(ids())), model.head(model(ids())))
    assert loaded.head.bias.requires_grad and loaded.lora == model.lora


def test_target_modules_are_short_where_that_is_unambiguous(tmp_path):
    def targets(model):
        save_lora(model, tmp_path)
        return json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]

    assert targets(trained(small(llama), targets=["v_proj"])) == ["self_attn.v_proj"]
    assert targets(trained(small(llama), targets=["blocks.1.self_attn.o_proj"])) == ["model.layers.1.self_attn.o_proj"]


def test_weights_of_a_folder_make_lora_begin_anew(tmp_path):
    from torchrecipes.models import load_hf_weights

    model = trained(small(bert))
    expected = model(ids())
    save_hf(model, tmp_path)
    load_hf_weights(model, tmp_path)
    assert (model(ids()) - expected).abs().max() < 1e-5  # not twice the update
    assert model.lora.base == str(tmp_path)


@pytest.mark.parametrize("key, value", [("use_dora", True), ("bias", "all"), ("rank_pattern", {"query": 2})])
def test_other_kinds_are_refused(key, value, tmp_path):
    save_lora(trained(small(bert)), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(UserError) as error:
        load_lora(small(bert), tmp_path)
    assert error.value.code == "unsupported_adapter"


def test_an_adapter_of_another_model_is_refused(tmp_path):
    save_lora(trained(small(llama)), tmp_path)
    with pytest.raises(UserError) as error:
        load_lora(small(bert), tmp_path)
    assert error.value.code == "weights_mismatch" and len(error.value.problems) == 14
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight"
    save_file(tensors | {name: torch.zeros(31, 4)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError) as error:
        load_lora(small(llama), tmp_path)
    assert [problem.key for problem in error.value.problems] == ["model.layers.0.self_attn.k_proj"]


def test_a_folder_without_adapter(tmp_path):
    save_hf(small(bert), tmp_path)
    with pytest.raises(UserError) as error:
        load_lora(small(bert), Path(tmp_path))
    assert error.value.code == "not_found"


def test_a_classifier(tmp_path):
    from torchrecipes.models import SequenceClassifier

    def classifier():
        return SequenceClassifier(small(bert), label_names=["a", "b", "c"]).eval()

    save_hf(classifier(), tmp_path / "base")
    model = trained(classifier())
    model.head.out_proj.weight.data.normal_()
    model.head.dense.weight.data.normal_(0, 0.1)
    save_lora(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["bert.pooler.dense", "classifier"]
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert (loaded(ids()).logits - model(ids())).abs().max() < 1e-5


def test_an_embedding_model(tmp_path):
    from torchrecipes.models import EmbeddingModel

    model = trained(EmbeddingModel(small(roberta), projection=8, learnable_temperature=0.05).eval())
    assert model.lora.trained == ("logit_scale", "projection.weight", "projection.bias")
    save_lora(model, tmp_path / "adapter")  # the projection is no part of the model that peft wraps
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(stored) == 2 * 2 * (3 + 1 + 2)
    save_hf(EmbeddingModel(small(roberta)), tmp_path / "base")
    base = transformers.AutoModel.from_pretrained(tmp_path / "base").eval()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert (loaded(ids()).last_hidden_state - model.encoder(ids())).abs().max() < 1e-5
