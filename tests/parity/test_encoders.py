"""Encoders against `transformers`: logits and gradients, loaded from its folders and read by it from ours."""

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaModel,
)

from torchrecipes.models import distilbert, hf_state_dict, load_hf, modernbert, roberta, save_hf

SIZES = {"vocab_size": 101, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
# Weights five times as large as usual, so that logits are of order 1 and errors show.
SIZES |= {"intermediate_size": 80, "max_position_embeddings": 200, "initializer_range": 0.1}
IDS = {f"{kind}_token_id": None for kind in ("pad", "bos", "eos", "cls", "sep")}
DISTILBERT = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
DISTILBERT |= {"intermediate_size": "hidden_dim"}
MODERNBERT = {"local_attention": 12, "global_attn_every_n_layers": 2}
FAMILIES = {  # ours, its arguments; theirs, and its arguments
    "modernbert": (modernbert, MODERNBERT, ModernBertForMaskedLM, ModernBertModel, ModernBertConfig, IDS | MODERNBERT),
    "roberta": (roberta, {"pad_token_id": 3}, RobertaForMaskedLM, RobertaModel, RobertaConfig, {"pad_token_id": 3}),
    "xlm-roberta": (
        roberta,
        {"model_type": "xlm-roberta"},
        XLMRobertaForMaskedLM,
        XLMRobertaModel,
        XLMRobertaConfig,
        {},
    ),
    "distilbert": (distilbert, {}, DistilBertForMaskedLM, DistilBertModel, DistilBertConfig, {}),
}
BIASES = {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True, "decoder_bias": False}
ROPE = {"global_rope_theta": 300.0, "local_rope_theta": 20.0}
CASES = [
    ("modernbert", {}),
    ("modernbert", BIASES | ROPE),
    ("modernbert", {"tie_word_embeddings": False, "num_hidden_layers": 4, "global_attn_every_n_layers": 3}),
    ("roberta", {}),
    ("roberta", {"type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    ("xlm-roberta", {}),
    ("distilbert", {}),
]
LENGTH = 180  # more than a tile of queries and its window
INPUTS = torch.randint(4, 101, (2, LENGTH), generator=torch.Generator().manual_seed(3))


def their_model(family, changes, kind=2):
    model_class, config_class, defaults = FAMILIES[family][kind], *FAMILIES[family][4:]
    keys = SIZES | defaults | changes
    if family == "distilbert":
        keys = {DISTILBERT.get(key, key): value for key, value in keys.items()}
    torch.manual_seed(0)
    return randomize(model_class(config_class(**keys)).eval())


def our_model(family, changes):
    builder, defaults = FAMILIES[family][:2]
    names = {"global_rope_theta": "rope_theta"}
    return randomize(builder(**(SIZES | defaults | {names.get(key, key): value for key, value in changes.items()})))


def randomize(model):
    """Biases and norms away from 0 and 1, or exchanging them would not show."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, float(name.endswith("weight")), 0.2, generator=generator)
    return model


def assert_same(ours, theirs):
    ours.eval()
    ours.zero_grad(), theirs.zero_grad()
    logits, their_logits = ours.head(ours(INPUTS)), theirs(input_ids=INPUTS).logits
    assert 0.1 < their_logits.std() < 30
    assert (logits - their_logits).abs().max() <= 1e-5
    for scores in (logits, their_logits):
        F.cross_entropy(scores.flatten(0, 1), torch.arange(2 * LENGTH) % 101).backward()
    gradients = hf_state_dict(ours, {name: parameter.grad for name, parameter in ours.named_parameters()})
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    if "lm_head.decoder.weight" in expected:  # the tied weight, which XLM-RoBERTa has first under this name
        expected["roberta.embeddings.word_embeddings.weight"] = expected.pop("lm_head.decoder.weight")
    assert set(gradients) == set(expected)
    for name, gradient in gradients.items():
        if name.endswith("token_type_embeddings.weight") or "position_embeddings" in name:
            gradient, expected[name] = gradient[4:LENGTH], expected[name][4:LENGTH]  # theirs gives padding none
        if gradient.numel():
            assert (gradient - expected[name]).abs().max() <= 1e-5 * max(1, expected[name].abs().max()), name


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_theirs_loads_here(tmp_path, family, changes):
    theirs = their_model(family, changes)
    theirs.save_pretrained(tmp_path)
    assert_same(load_hf(tmp_path, report=pytest.fail), theirs)


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_ours_loads_there(tmp_path, family, changes):
    ours = our_model(family, changes)
    save_hf(ours, tmp_path)
    theirs, info = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(theirs) is FAMILIES[family][2]
    assert_same(ours, theirs.eval())


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_packing_are_documents_of_their_own(tmp_path, family):
    """Theirs: a padded batch. Ours: its documents in one row of another order, with padding at the end."""
    theirs = their_model(family, {})
    lengths = [150, 30]
    pad = getattr(theirs.config, "pad_token_id", None) or 0
    mask = torch.arange(LENGTH)[None] < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        expected = theirs(input_ids=INPUTS.masked_fill(~mask, pad), attention_mask=mask.long()).logits
        theirs.save_pretrained(tmp_path)
        ours = load_hf(tmp_path, report=pytest.fail).eval()
        row = torch.cat((INPUTS[1, :30], INPUTS[0, :150], torch.full((20,), pad)))[None]
        positions = torch.cat([torch.arange(n) for n in (30, 150, 20)])[None]
        logits = ours.head(ours(row, positions, cu_seqlens=torch.tensor([0, 30, 180, 200]), max_seqlen=150))[0]
    assert (logits[:30] - expected[1, :30]).abs().max() <= 1e-5
    assert (logits[30:180] - expected[0, :150]).abs().max() <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_without_head_gets_a_new_one(tmp_path, family):
    encoder = their_model(family, {}, kind=3)
    encoder.save_pretrained(tmp_path)
    reports = []
    ours = load_hf(tmp_path, seed=4, report=reports.append).eval()
    assert "head.transform.dense.weight" in reports[-1]
    assert len(reports) == 1 + ("roberta" in family)  # its pooler
    with torch.no_grad():
        assert (ours(INPUTS) - encoder(input_ids=INPUTS).last_hidden_state).abs().max() <= 1e-5


def test_a_window_of_every_layer_is_refused(tmp_path):
    """A list of layers that no period makes."""
    from torchrecipes.errors import UserError

    kinds = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    config = ModernBertConfig(**SIZES | IDS | {"num_hidden_layers": 4, "layer_types": kinds})
    ModernBertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError) as error:
        load_hf(tmp_path)
    assert [problem.key for problem in error.value.problems] == ["layer_types"]
