import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, BertForPreTraining, BertModel

from torchrecipes.models import bert, hf_state_dict, load_hf, save_hf

LENGTHS = [17, 30, 5]  # of the documents of a padded batch, 30 wide


def config(**changes):
    sizes = {
        "vocab_size": 101,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 80,
    }
    # Weights five times as large as usual, so that logits are of order 1 and errors show.
    return BertConfig(**(sizes | {"initializer_range": 0.1, "max_position_embeddings": 32} | changes))


def batch():
    generator = torch.Generator().manual_seed(3)
    input_ids = torch.randint(1, 101, (3, 30), generator=generator)
    types = torch.randint(0, 2, (3, 30), generator=generator)
    mask = torch.arange(30)[None] < torch.tensor(LENGTHS)[:, None]
    bounds = [0]
    for row, length in enumerate(LENGTHS):
        bounds += [row * 30 + length, (row + 1) * 30]
    return input_ids, types, mask, torch.tensor(bounds, dtype=torch.int32)


def randomize(model):
    """Biases and norms away from 0 and 1, or exchanging them would not show."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, float(name.endswith("weight")), 0.2)


def assert_same(ours, theirs, padded, types=None):
    ours.eval()
    input_ids, _, mask, bounds = batch()
    if padded:
        input_ids = input_ids.masked_fill(~mask, 0)
        logits = ours.head(ours(input_ids, cu_seqlens=bounds, token_type_ids=types))[mask]
        outputs = theirs(input_ids=input_ids, attention_mask=mask.long(), token_type_ids=types)
    else:
        logits = ours.head(ours(input_ids, token_type_ids=types))
        outputs = theirs(input_ids=input_ids, token_type_ids=types)
    their_logits = outputs.logits if "logits" in outputs else outputs.prediction_logits
    their_logits = their_logits[mask] if padded else their_logits
    assert 0.3 < their_logits.std() < 30
    assert (logits - their_logits).abs().max() <= 1e-5
    for model, scores in ((ours, logits), (theirs, their_logits)):
        model.zero_grad()
        scores = scores.flatten(0, -2)
        F.cross_entropy(scores, torch.arange(len(scores)) % 101).backward()
    gradients = hf_state_dict(ours, {name: parameter.grad for name, parameter in ours.named_parameters()})
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    assert set(gradients) == set(expected)
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).abs().max() <= 1e-5 * max(1, expected[name].abs().max()), name


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("typed", [False, True])
def test_theirs_loads_here(tmp_path, padded, typed):
    torch.manual_seed(0)
    theirs = BertForMaskedLM(config()).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    assert_same(load_hf(tmp_path, report=pytest.fail), theirs, padded, batch()[1] if typed else None)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("loader", [BertForMaskedLM, AutoModelForMaskedLM])
def test_ours_loads_there(tmp_path, loader, padded):
    torch.manual_seed(0)
    ours = bert(
        vocab_size=101,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=80,
        max_position_embeddings=32,
        initializer_range=0.1,
    )
    randomize(ours)
    save_hf(ours, tmp_path)
    theirs, info = loader.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(theirs) is BertForMaskedLM
    assert_same(ours, theirs.eval(), padded)


def test_pooler_and_next_sentence_head_are_dropped_and_said(tmp_path):
    torch.manual_seed(0)
    theirs = BertForPreTraining(config()).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    reports = []
    ours = load_hf(tmp_path, report=reports.append)
    assert_same(ours, theirs, True)
    assert len(reports) == 1
    for name in ("bert.pooler.dense.bias", "bert.pooler.dense.weight", "cls.seq_relationship.bias"):
        assert name in reports[0]


@pytest.mark.parametrize("pooler", [True, False])
def test_an_encoder_without_head_gets_a_new_one(tmp_path, pooler):
    torch.manual_seed(0)
    encoder = BertModel(config(), add_pooling_layer=pooler).eval()
    encoder.save_pretrained(tmp_path)
    reports = []
    ours = load_hf(tmp_path, seed=4, report=reports.append).eval()
    assert len(reports) == 1 + pooler
    assert "head.transform.dense.weight" in reports[-1]
    assert ours.head.transform.norm.weight.tolist() == [1.0] * 48
    assert ours.head.bias.abs().max() == 0
    input_ids = batch()[0]
    assert (ours(input_ids) - encoder(input_ids=input_ids).last_hidden_state).abs().max() <= 1e-5


def test_names_of_the_first_checkpoints(tmp_path):
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    theirs = BertForMaskedLM(config()).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    renamed["bert.embeddings.position_ids"] = torch.arange(32)[None]
    renamed["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()
    renamed["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same(load_hf(tmp_path, report=lambda line: None), theirs, True)


def test_dropout_is_that_of_the_config(tmp_path):
    torch.manual_seed(0)
    theirs = BertForMaskedLM(config(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.4))
    theirs.save_pretrained(tmp_path)
    ours = load_hf(tmp_path)
    assert ours.training
    input_ids = batch()[0]
    assert not torch.equal(ours(input_ids), ours(input_ids))
    # The same share of variance in what two passes agree on.
    with torch.no_grad():
        agreement = [
            torch.stack([run(input_ids) for _ in range(30)]).std(0).mean().item()
            for run in (ours, lambda ids: theirs.bert(input_ids=ids).last_hidden_state)
        ]
    assert abs(agreement[0] - agreement[1]) < 0.02 * agreement[1]
