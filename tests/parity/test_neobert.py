import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForMaskedLM, EuroBertConfig, EuroBertForMaskedLM, EuroBertModel

from torchrecipes.models import hf_state_dict, load_hf, neobert, save_hf

LENGTHS = [17, 30, 5]  # of the documents of a padded batch, 30 wide


def config(**changes):
    sizes = {
        "vocab_size": 101,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 40,
    }
    # Weights five times as large as usual, so that logits are of order 1 and errors show.
    values = {"initializer_range": 0.1, "rope_theta": 500.0, "pad_token_id": 0, "max_position_embeddings": 64}
    return EuroBertConfig(**(sizes | values | changes))


def batch():
    generator = torch.Generator().manual_seed(3)
    input_ids = torch.randint(1, 101, (3, 30), generator=generator)
    mask = torch.arange(30)[None] < torch.tensor(LENGTHS)[:, None]
    bounds = [0]
    for row, length in enumerate(LENGTHS):
        bounds += [row * 30 + length, (row + 1) * 30]
    return input_ids, mask, torch.tensor(bounds, dtype=torch.int32)


def assert_same(ours, theirs, padded):
    input_ids, mask, bounds = batch()
    if padded:
        input_ids = input_ids.masked_fill(~mask, 0)
        logits = ours.head(ours(input_ids, cu_seqlens=bounds))[mask]
        their_logits = theirs(input_ids=input_ids, attention_mask=mask.long()).logits[mask]
    else:
        logits, their_logits = ours.head(ours(input_ids)), theirs(input_ids=input_ids).logits
    assert 0.3 < their_logits.std() < 30
    assert (logits - their_logits).abs().max() <= 1e-5
    for model, scores in ((ours, logits), (theirs, their_logits)):
        model.zero_grad()
        scores = scores.flatten(0, -2)
        F.cross_entropy(scores, torch.arange(len(scores)) % 101).backward()
    gradients = hf_state_dict(ours, {name: parameter.grad for name, parameter in ours.named_parameters()})
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert set(gradients) == set(expected)
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).abs().max() <= 1e-5 * max(1, expected[name].abs().max()), name


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 2, "head_dim": 8}])
def test_theirs_loads_here(tmp_path, changes, padded):
    torch.manual_seed(0)
    theirs = EuroBertForMaskedLM(config(**changes)).eval()
    theirs.save_pretrained(tmp_path)
    assert_same(load_hf(tmp_path), theirs, padded)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("loader", [EuroBertForMaskedLM, AutoModelForMaskedLM])
def test_ours_loads_there(tmp_path, loader, tied, padded):
    ours = neobert(
        vocab_size=101,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=40,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        rope_theta=500.0,
    )
    save_hf(ours, tmp_path)
    theirs, info = loader.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(theirs) is EuroBertForMaskedLM
    assert_same(ours, theirs.eval(), padded)


def test_shards_and_missing_heads(tmp_path):
    torch.manual_seed(0)
    theirs = EuroBertForMaskedLM(config()).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same(load_hf(tmp_path), theirs, True)

    encoder = EuroBertModel(config(tie_word_embeddings=True)).eval()
    encoder.save_pretrained(tmp_path / "tied")
    input_ids = batch()[0]
    ours = load_hf(tmp_path / "tied", report=pytest.fail)
    assert (ours(input_ids) - encoder(input_ids=input_ids).last_hidden_state).abs().max() <= 1e-5

    EuroBertModel(config()).save_pretrained(tmp_path / "untied")
    reports = []
    first, second = (load_hf(tmp_path / "untied", seed=4, report=reports.append) for _ in range(2))
    assert "head.decoder.weight" in reports[0]
    assert torch.equal(first.head.weight, second.head.weight)
    assert abs(first.head.weight.std().item() - 0.1) < 0.005


def test_bf16_weights_arrive_in_fp32(tmp_path):
    torch.manual_seed(0)
    theirs = EuroBertForMaskedLM(config()).bfloat16()
    theirs.save_pretrained(tmp_path)
    assert_same(load_hf(tmp_path), EuroBertForMaskedLM.from_pretrained(tmp_path, dtype=torch.float32), False)
