"""Rows for new tokens in the folder of any family."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from torchrecipes.errors import UserError
from torchrecipes.models import FAMILY_BUILDERS, extend_vocabulary, load_hf, save_hf

PIECES = [[5, 7], [3], []]


def small(builder):
    """A small model of the family: its smallest size, with fewer layers and tokens."""
    size = next(iter(builder.sizes), None)
    fields = builder.__signature__.parameters
    wanted = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    wanted |= {"intermediate_size": 96, "head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4}
    return builder(size, vocab_size=100, seed=1, **{key: value for key, value in wanted.items() if key in fields})


@pytest.mark.parametrize("builder", FAMILY_BUILDERS, ids=lambda builder: builder.__name__)
@pytest.mark.parametrize(("first", "rows"), [(90, 100), (100, 103)])
def test_every_family_keeps_its_values_and_loads(tmp_path, builder, first, rows):
    model = small(builder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    save_hf(model, tmp_path / "old")
    extend_vocabulary(tmp_path / "old", tmp_path / "new", first, PIECES, rows)
    loaded = load_hf(tmp_path / "new", report=print)
    assert loaded.config.vocab_size == rows
    before, after = model.state_dict(), loaded.state_dict()
    extended = [name for name in before if len(before[name]) == 100]
    assert extended
    for name, old in before.items():
        new = after[name]
        if name not in extended:
            assert torch.equal(old, new), name
            continue
        assert len(new) == rows and torch.equal(new[:first], old[:first]), name
        for i, pieces in enumerate(PIECES):
            mean = old[pieces or slice(first)].double().mean(0)
            assert torch.allclose(new[first + i].double(), mean, atol=1e-6), name
        assert torch.equal(new[first + 3 :], old[first + 3 :]), name  # padding that stays


def folder(path, tensors, **config):
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"vocab_size": 10, "max_position_embeddings": 10, **config}))
    return path


def test_only_tables_of_the_vocabulary_change_and_dtypes_stay(tmp_path):
    tensors = {
        "model.embed_tokens.weight": torch.randn(10, 4, dtype=torch.bfloat16),
        "model.position_embeddings.weight": torch.randn(10, 4),  # as many rows, by chance
        "model.layers.0.mlp.weight": torch.randn(10, 10),
        "lm_head.bias": torch.randn(10),
    }
    old = folder(tmp_path / "old", tensors, mine=1)
    names = extend_vocabulary(old, tmp_path / "new", 10, [[1, 2]], 12)
    new = load_file(tmp_path / "new" / "model.safetensors")
    assert sorted(names) == ["lm_head.bias", "model.embed_tokens.weight"]
    assert {name: tensor.dtype for name, tensor in new.items()} == {name: t.dtype for name, t in tensors.items()}
    assert {name: len(tensor) for name, tensor in new.items() if name in names} == dict.fromkeys(names, 12)
    assert all(torch.equal(new[name], tensor) for name, tensor in tensors.items() if name not in names)
    assert new["lm_head.bias"][10] == tensors["lm_head.bias"][[1, 2]].mean()
    assert torch.allclose(new["lm_head.bias"][11], tensors["lm_head.bias"].mean())
    written = json.loads((tmp_path / "new" / "config.json").read_text())
    assert written == {"vocab_size": 12, "max_position_embeddings": 10, "mine": 1}


def test_what_cannot_be_extended(tmp_path):
    old = folder(tmp_path / "old", {"model.embed_tokens.weight": torch.randn(10, 4)})
    for first, rows in ((11, 20), (10, 10), (5, 8)):
        with pytest.raises(UserError) as caught:
            extend_vocabulary(old, tmp_path / "new", first, [[1], [2]], rows)
        assert caught.value.code == "vocab_too_large"
    strange = folder(tmp_path / "strange", {"something.weight": torch.randn(10, 4)})
    with pytest.raises(UserError) as caught:
        extend_vocabulary(strange, tmp_path / "new", 10, [[1]], 11)
    assert caught.value.code == "no_embedding"
    (old / "config.json").unlink()
    with pytest.raises(UserError) as caught:
        extend_vocabulary(old, tmp_path / "new", 10, [[1]], 11)
    assert caught.value.code == "no_config"
    assert not (tmp_path / "new").exists()
