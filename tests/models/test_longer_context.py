"""`extend_context`: what it changes, in a model with weights and in one that is loaded afterwards."""

import json

import pytest
import torch

from torchrecipes.errors import UserError
from torchrecipes.models import (
    architecture_differences,
    bert,
    extend_context,
    gpt2,
    llama,
    load_hf,
    load_hf_weights,
    meta_model_from_hf,
    neobert,
    save_hf,
)

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
SIZES |= {"max_position_embeddings": 16, "initializer_range": 0.1}
POSITIONS = {"gpt2": "position_embedding.weight", "bert": "embedding.position_embeddings.weight"}
FAMILIES = {"gpt2": gpt2, "bert": bert, "llama": llama, "neobert": neobert}
IDS = torch.arange(40)[None]


def loaded(folder, seq_len, **arguments):
    """As a recipe does it: the model on the meta device, then its weights."""
    model = extend_context(meta_model_from_hf(folder), seq_len, **arguments)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    load_hf_weights(model, folder, report=pytest.fail)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_before_the_weights_is_after_the_weights_and_checkpoints_keep_it(tmp_path, family):
    save_hf(FAMILIES[family](**SIZES), tmp_path / "short")
    found, expected = loaded(tmp_path / "short", 40), extend_context(load_hf(tmp_path / "short"), 40).eval()
    assert torch.equal(found(IDS), expected(IDS))
    save_hf(found, tmp_path / "long")
    assert architecture_differences(expected, tmp_path / "long") == []
    again = load_hf(tmp_path / "long", report=pytest.fail).eval()
    assert again.config == expected.config and again.config.max_position_embeddings == 40
    assert torch.equal(again(IDS), expected(IDS))
    # The same settings on what they made: nothing to do.
    assert loaded(tmp_path / "long", 40).config == expected.config


@pytest.mark.parametrize("family", POSITIONS)
def test_a_table_is_repeated_or_stretched(tmp_path, family):
    short = FAMILIES[family](**SIZES)
    save_hf(short, tmp_path)
    table = short.state_dict()[POSITIONS[family]].clone()
    tiled = loaded(tmp_path, 40).state_dict()[POSITIONS[family]]
    assert torch.equal(tiled, torch.cat((table, table, table[:8])))
    stretched = loaded(tmp_path, 31, method="interpolate").state_dict()[POSITIONS[family]]
    torch.testing.assert_close(stretched[::2], table)
    torch.testing.assert_close(stretched[1::2], (table[1:] + table[:-1]) / 2)


def test_theta_grows_so_that_the_longest_wavelength_grows_by_the_factor():
    model = extend_context(llama(**SIZES, rope_theta=100.0), 64, method="theta")
    exponent = (16 - 2) / 16  # of the last of eight pairs
    assert model.config.rope_theta**exponent == pytest.approx(4 * 100.0**exponent)
    assert extend_context(llama(**SIZES), 64, method="theta", theta=1e6).config.rope_theta == 1e6
    assert extend_context(llama(**SIZES), 16, method="theta", theta=5e5).config.max_position_embeddings == 16


def test_scaling_of_a_scaled_model():
    model = extend_context(llama(**SIZES), 32, method="linear")
    assert extend_context(model, 64, method="linear").config.rope_scaling == {"rope_type": "linear", "factor": 4.0}
    model = extend_context(llama(**SIZES), 32)
    wanted = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    assert extend_context(model, 64).config.rope_scaling == wanted
    assert extend_context(llama(**SIZES), 32, factor=4).config.rope_scaling == wanted
    with pytest.raises(UserError) as error:
        extend_context(model, 128, method="linear")
    assert (error.value.key, error.value.code) == ("longer_context.method", "unsupported_method")


@pytest.mark.parametrize(
    ("family", "arguments", "key"),
    [
        ("gpt2", {"method": "yarn"}, "longer_context.method"),
        ("llama", {"method": "tile"}, "longer_context.method"),
        ("llama", {"method": "best"}, "longer_context.method"),
        ("gpt2", {"factor": 2}, "longer_context.factor"),
        ("llama", {"theta": 1e6}, "longer_context.theta"),
        ("llama", {"factor": 0.5}, "longer_context.factor"),
    ],
)
def test_what_does_not_fit_is_refused(family, arguments, key):
    with pytest.raises(UserError) as error:
        extend_context(FAMILIES[family](**SIZES), 64, **arguments)
    assert error.value.key == key


def test_a_table_of_another_length_is_refused(tmp_path):
    save_hf(gpt2(**SIZES), tmp_path)
    model = extend_context(meta_model_from_hf(tmp_path), 40).to_empty(device="cpu")
    config = json.loads((tmp_path / "config.json").read_text())
    save_hf(gpt2(**SIZES | {"max_position_embeddings": 20}), tmp_path)
    assert config["n_positions"] == 16
    with pytest.raises(UserError) as error:
        load_hf_weights(model, tmp_path)
    assert [problem.key for problem in error.value.problems] == ["transformer.wpe.weight"]
