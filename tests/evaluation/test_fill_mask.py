import pytest
import torch

from torchrecipes.cli.main import main
from torchrecipes.data.sources.records import Document
from torchrecipes.data.tokenizers.load import train_wordpiece
from torchrecipes.errors import UserError
from torchrecipes.evaluation.mask_filling import fill_mask
from torchrecipes.manifest import flush, write_manifest
from torchrecipes.models import neobert, save_hf


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece([Document("the quick brown fox jumps over the lazy dog " * 3, "a")], vocab_size=60)


@pytest.fixture(scope="module")
def model(tokenizer):
    return neobert(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        seed=1,
    )


def test_guesses_are_those_of_the_logits_at_the_masks(model, tokenizer):
    text = "the [MASK] fox jumps over the [MASK] dog"
    first, second = fill_mask(model, tokenizer, text, top_k=4)
    ids = tokenizer.encode_prompt(text)
    with torch.no_grad():
        probability = model.head(model(torch.tensor([ids])))[0, :, : tokenizer.unpadded_vocab_size].softmax(-1)
    for guesses, position in (
        (first, ids.index(tokenizer.mask_id)),
        (second, len(ids) - 1 - ids[::-1].index(tokenizer.mask_id)),
    ):
        expected = probability[position].sort(descending=True)
        assert [guess.probability for guess in guesses] == pytest.approx(expected.values[:4].tolist(), rel=1e-4)
        assert [guess.token for guess in guesses] == [tokenizer.decode_token(i) for i in expected.indices[:4].tolist()]


def test_inert_tokens_are_never_guessed(model, tokenizer):
    assert tokenizer.unpadded_vocab_size < tokenizer.vocab_size
    (guesses,) = fill_mask(model, tokenizer, "the [MASK]", top_k=1000)
    assert len(guesses) == tokenizer.unpadded_vocab_size
    assert sum(guess.probability for guess in guesses) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize(("text", "code"), [("the fox", "no_mask"), ("the [MASK]" + " fox" * 40, "too_long")])
def test_wrong_text_is_refused(model, tokenizer, text, code):
    with pytest.raises(UserError) as error:
        fill_mask(model, tokenizer, text)
    assert error.value.code == code


def test_the_command_prints_tokens_and_probabilities(model, tokenizer, tmp_path, capsys):
    for step in (5, 10):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        save_hf(model, folder, tokenizer)
        write_manifest(folder, step, flush(folder, sorted(file.name for file in folder.iterdir())))
    assert main(["fill-mask", str(tmp_path), "the [MASK] fox", "--top-k", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "the [MASK] fox" in lines and sum("%" in line for line in lines) == 2


def test_the_command_says_what_a_folder_lacks(tmp_path, capsys):
    assert main(["fill-mask", str(tmp_path), "the [MASK]"]) == 2
    assert "config.json" in capsys.readouterr().err
