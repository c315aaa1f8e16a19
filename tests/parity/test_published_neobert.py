"""A folder as NeoBERT is published, against its network in float64, written from the paper and the code beside it."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import EuroBertForMaskedLM

from torchrecipes.errors import UserError
from torchrecipes.models import architecture_differences, load_hf, meta_model_from_hf, save_hf

WIDTH, HEADS, LAYERS, INNER, VOCAB = 48, 4, 3, 40, 101
CONFIG = {
    "architectures": ["NeoBERTLMHead"],
    "auto_map": {"AutoConfig": "model.NeoBERTConfig", "AutoModelForMaskedLM": "model.NeoBERTLMHead"},
    "classifier_init_range": 0.02,
    "decoder_init_range": 0.02,
    "dim_head": 64,
    "embedding_init_range": 0.02,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "kwargs": {"pretrained_model_name_or_path": "google-bert/bert-base-uncased", "trust_remote_code": True},
    "max_length": 4096,
    "model_type": "neobert",
    "norm_eps": 1e-05,
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "pad_token_id": 0,
    "pretrained_model_name_or_path": "google-bert/bert-base-uncased",
    "torch_dtype": "float32",
    "transformers_version": "4.48.2",
    "trust_remote_code": True,
    "vocab_size": 30522,
}
SMALL = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "vocab_size": VOCAB}
SMALL |= {"dim_head": WIDTH // HEADS, "intermediate_size": 56, "max_length": 64}  # 2 / 3 of 56, up to a multiple of 8


def tensors():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, mean=0.0):
        return mean + 0.15 * torch.randn(*shape, generator=generator)

    found = {"model.encoder.weight": normal(VOCAB, WIDTH), "model.layer_norm.weight": normal(WIDTH, mean=1.0)}
    for layer in range(LAYERS):
        name = f"model.transformer_encoder.{layer}"
        found |= {
            f"{name}.qkv.weight": normal(3 * WIDTH, WIDTH),
            f"{name}.wo.weight": normal(WIDTH, WIDTH),
            f"{name}.ffn.w12.weight": normal(2 * INNER, WIDTH),
            f"{name}.ffn.w3.weight": normal(WIDTH, INNER),
            f"{name}.attention_norm.weight": normal(WIDTH, mean=1.0),
            f"{name}.ffn_norm.weight": normal(WIDTH, mean=1.0),
        }
    return found | {"decoder.weight": normal(VOCAB, WIDTH), "decoder.bias": normal(VOCAB)}


def reference(weights, ids):
    """Logits of one row: RoPE turns neighbouring pairs as complex numbers; each head's q, k and v lie together."""
    weights = {name: tensor.double() for name, tensor in weights.items()}
    size = WIDTH // HEADS

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[name]

    angles = torch.outer(torch.arange(len(ids)), 10_000.0 ** (-torch.arange(0, size, 2).double() / size))
    turns = torch.polar(torch.ones_like(angles), angles)
    x = weights["model.encoder.weight"][ids]
    for layer in range(LAYERS):
        name = f"model.transformer_encoder.{layer}"
        qkv = norm(x, f"{name}.attention_norm.weight") @ weights[f"{name}.qkv.weight"].T
        heads = []
        for head in range(HEADS):
            q, k, v = qkv[:, 3 * size * head : 3 * size * (head + 1)].split(size, -1)
            q, k = (torch.view_as_complex(z.reshape(len(ids), -1, 2)) * turns for z in (q, k))
            scores = (q @ k.conj().T).real / size**0.5
            heads.append(scores.softmax(-1) @ v)
        x = x + torch.cat(heads, -1) @ weights[f"{name}.wo.weight"].T
        gate, up = (norm(x, f"{name}.ffn_norm.weight") @ weights[f"{name}.ffn.w12.weight"].T).chunk(2, -1)
        x = x + (F.silu(gate) * up) @ weights[f"{name}.ffn.w3.weight"].T
    return norm(x, "model.layer_norm.weight") @ weights["decoder.weight"].T + weights["decoder.bias"]


def folder_of(path, weights):
    (path / "config.json").write_text(json.dumps(CONFIG | SMALL))
    save_file(weights, path / "model.safetensors")
    return path


def test_logits_are_those_of_the_published_network(tmp_path):
    weights, ids = tensors(), torch.randint(0, VOCAB, (40,), generator=torch.Generator().manual_seed(1))
    model = load_hf(folder_of(tmp_path, weights), report=pytest.fail).eval()
    with torch.no_grad():
        expected = reference(weights, ids)
        logits = model.head(model(ids[None]))[0]
    assert 0.3 < expected.std() < 30
    assert (logits - expected).abs().max() <= 1e-5

    save_hf(model, tmp_path / "ours")
    theirs, info = EuroBertForMaskedLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        assert (theirs.eval()(input_ids=ids[None]).logits[0] - expected).abs().max() <= 1e-5
    again = load_hf(tmp_path / "ours", report=pytest.fail).eval()
    assert again.config == model.config
    assert architecture_differences(model, tmp_path / "ours") == []
    with torch.no_grad():
        assert torch.equal(again.head(again(ids[None]))[0], logits)


def test_without_its_head(tmp_path):
    weights = {name.removeprefix("model."): tensor for name, tensor in tensors().items() if "decoder" not in name}
    reports = []
    model = load_hf(folder_of(tmp_path, weights), report=reports.append)
    assert len(reports) == 1 and "head.bias" in reports[0]
    assert torch.equal(model.embedding.weight, weights["encoder.weight"])


def test_the_published_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    model = meta_model_from_hf(tmp_path)
    assert sum(parameter.numel() for parameter in model.parameters()) == 245_136_954
    assert (model.config.intermediate_size, model.config.max_position_embeddings) == (2048, 4096)
    for key, value in {"rope": False, "hidden_act": "gelu", "ngpt": True, "new": 3}.items():
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | {key: value}))
        with pytest.raises(UserError) as error:
            meta_model_from_hf(tmp_path)
        assert [problem.key for problem in error.value.problems] == [key]
