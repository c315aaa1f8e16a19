"""Models of `transformers` behind our interface: the same losses and gradients, packed rows, folders that it loads."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from torchrecipes.errors import UserError
from torchrecipes.models import (
    architecture_differences,
    check_causal,
    check_positions,
    from_transformers,
    load_hf,
    load_hf_weights,
    loading_hint,
    meta_model_from_hf,
    save_hf,
)
from torchrecipes.modules.blocks import transformer_blocks

transformers = pytest.importorskip("transformers")

VOCAB = 61
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.1}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CONFIGS = {
    "bert": SIZES | NO_DROPOUT,
    "roberta": SIZES | NO_DROPOUT,
    "modernbert": SIZES | {"local_attention": 8, "global_attn_every_n_layers": 2},
    "gpt2": {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
    | {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "initializer_range": 0.1},
    "llama": SIZES | {"num_key_value_heads": 2},
    "mistral": SIZES | {"num_key_value_heads": 2, "sliding_window": 5},
    "qwen3": SIZES | {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True},
}
CONFIGS["gemma3_text"] = CONFIGS["qwen3"] | {"num_hidden_layers": 3, "sliding_window": 5}
CONFIGS["gemma3_text"] |= {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
CAUSAL = {"gpt2", "llama", "mistral", "qwen3", "gemma3_text"}


def ours(family, **changes):
    return randomized(from_transformers(model_type=family, **(CONFIGS[family] | changes)))


def randomized(model):
    """Biases and norms away from 0 and 1, or exchanging them would not show."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, float(name.endswith("weight")), 0.2, generator=generator)
    return model


def theirs(folder, family):
    kind = transformers.AutoModelForCausalLM if family in CAUSAL else transformers.AutoModelForMaskedLM
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


def ids(rows=2, length=24):
    return torch.randint(4, VOCAB, (rows, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("tied", [True, False])
def test_losses_and_gradients_are_those_of_transformers(tmp_path, family, tied):
    model = ours(family, tie_word_embeddings=tied)
    save_hf(model, tmp_path)
    other = theirs(tmp_path, family)
    labels = torch.randint(0, VOCAB, (48,), generator=torch.Generator().manual_seed(4))
    losses = [
        F.cross_entropy(logits.flatten(0, 1), labels)
        for logits in (model.head(model(ids())), other(input_ids=ids()).logits)
    ]
    assert abs(losses[0] - losses[1]) <= 1e-5
    for loss in losses:
        loss.backward()
    found = {
        name: part
        for ours, parameter in model.named_parameters()
        if parameter.grad is not None  # BERT has a second bias, which an untied head does not use
        for name, part in model.hf_adapter.split(ours, parameter.grad).items()
    }
    expected = {name: parameter.grad for name, parameter in other.named_parameters() if parameter.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert (gradient - expected[name]).abs().max() <= 1e-5 * max(1, expected[name].abs().max()), name


@pytest.mark.parametrize("family", CONFIGS)
def test_packed_is_one_by_one(family):
    model = ours(family).eval()
    lengths = [5, 1, 18, 24]  # two rows of 24
    bounds = torch.tensor([0, *itertools.accumulate(lengths), 48], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths]).view(2, 24)
    packed = model(ids(), positions, cu_seqlens=bounds).flatten(0, 1)
    for start, end in itertools.pairwise(bounds.tolist()[:-1]):
        alone = model(ids().view(1, -1)[:, start:end])[0]
        assert (packed[start:end] - alone).abs().max() <= 1e-5


@pytest.mark.parametrize("family", CONFIGS)
def test_folders_of_transformers_load_and_come_back(tmp_path, family):
    save_hf(ours(family), tmp_path / "first")
    other = theirs(tmp_path / "first", family).eval()
    other.save_pretrained(tmp_path / "theirs")
    model = from_transformers(str(tmp_path / "theirs"), seed=7)
    load_hf_weights(model, tmp_path / "theirs", report=pytest.fail)
    assert (model.eval().head(model(ids())) - other(input_ids=ids()).logits).abs().max() <= 1e-5
    save_hf(model, tmp_path / "second")
    assert architecture_differences(model, tmp_path / "second") == []
    assert (tmp_path / "first" / "model.safetensors").read_bytes() == (
        tmp_path / "second" / "model.safetensors"
    ).read_bytes()
    assert ("MaskedLM" in loading_hint(model, tmp_path)) != (family in CAUSAL)
    check_causal(model, family in CAUSAL)
    with pytest.raises(UserError) as error:
        check_causal(model, family not in CAUSAL)
    assert error.value.code == "wrong_direction"


@pytest.mark.parametrize("family", CONFIGS)
def test_initial_values_are_a_function_of_the_seed(family):
    first, second = from_transformers(model_type=family, **CONFIGS[family]), ours(family, vocab_size=VOCAB)
    with torch.device("meta"):
        late = from_transformers(model_type=family, **CONFIGS[family])
    assert all(parameter.is_meta for parameter in late.parameters())
    late.to_empty(device="cpu")
    late.init_weights(0)
    assert torch.equal(first(ids()), late.train()(ids())), family
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, late.state_dict()[name]), name
    late.init_weights(1)
    assert not torch.equal(first.head.weight, late.head.weight)
    assert len(transformer_blocks(second)) == 3


def test_types_without_a_family_here_load_through_transformers(tmp_path):
    model = ours("gemma3_text")
    save_hf(model, tmp_path)
    assert type(meta_model_from_hf(tmp_path)) is type(model)
    again = load_hf(tmp_path, report=pytest.fail)
    assert torch.equal(again.eval()(ids()), model.eval()(ids()))


def test_a_body_without_head_gets_a_new_one(tmp_path):
    save_hf(ours("modernbert"), tmp_path / "first")
    transformers.AutoModel.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "body")
    reports = []
    model = from_transformers(str(tmp_path / "body"), causal=False)
    load_hf_weights(model, tmp_path / "body", report=reports.append)
    assert len(reports) == 1 and "head.bias" in reports[0]


def test_what_cannot_be_trained_is_refused():
    for keys, code in (
        ({"model_type": "no-such-model"}, "unknown_model_type"),
        ({"model_type": "llama", "causal": False} | SIZES, "unsupported_model"),
        ({"model_type": "t5"}, "unsupported_model"),
        ({"model_type": "gemma2", "final_logit_softcapping": 30.0} | SIZES, "unsupported_model"),
    ):
        with pytest.raises(UserError) as error, torch.device("meta"):
            from_transformers(**keys)
        assert error.value.code == code, keys


def test_positions_that_begin_later_leave_fewer():
    with torch.device("meta"):
        model = from_transformers(model_type="roberta", **CONFIGS["roberta"])
    check_positions(model, 62)
    with pytest.raises(UserError):
        check_positions(model, 63)


def test_attention_without_masks_takes_padded_rows_only():
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    model = from_transformers(model_type="mamba", **sizes).eval()
    bounds = torch.tensor([0, 10, 24, 48], dtype=torch.int32)
    padded = model(ids(), cu_seqlens=bounds)
    assert (padded[0, :10] - model(ids()[:1, :10])[0]).abs().max() <= 1e-5
    with pytest.raises(UserError) as error:
        model(ids(), cu_seqlens=torch.tensor([0, 5, 10, 24, 48], dtype=torch.int32))
    assert (error.value.code, error.value.key) == ("no_packing", "data.packing")
