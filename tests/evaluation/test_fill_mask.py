import csv
import io
import json

import pytest
import torch

from torchrecipes.cli.main import main
from torchrecipes.data.sources.records import Document
from torchrecipes.data.tokenizers.load import train_wordpiece
from torchrecipes.errors import UserError
from torchrecipes.evaluation import MaskFiller, fill_mask, over_texts
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


WORDS = "the quick brown fox jumps over the lazy dog".split()
LINES = [
    "the [MASK] fox",
    "",
    "no mask at all",
    " ".join([*WORDS, "[MASK]", "the", "[MASK]"]),
    "[MASK]" + " fox" * 40,
    *[" ".join(["[MASK]", *WORDS[:count]]) for count in range(9)],
    "over [MASK] [MASK] [MASK]",
]
REASONS = {1: "no_text", 2: "no_mask", 4: "too_long"}


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("packed", [False, True])
def test_many_texts_get_what_each_gets_alone(model, tokenizer, monkeypatch, tokens, packed):
    monkeypatch.setattr(over_texts, "TEXTS_PER_WINDOW", 6)
    monkeypatch.setattr(over_texts.TextBatches, "are_packed", lambda self: packed)
    windows = MaskFiller(model, tokenizer, top_k=3, tokens_per_batch=tokens).fill_iter(text for text in LINES)
    place = 0
    for found in windows:
        rows = iter(zip(found.tokens.tolist(), found.probabilities.tolist(), strict=True))
        for number, count in enumerate(found.num_masks.tolist()):
            if place in REASONS:
                assert count == 0 and found.reasons.pop(number) == REASONS[place].replace("no_text", "no_mask")
            else:
                expected = fill_mask(model, tokenizer, LINES[place], top_k=3)
                filled = [next(rows) for _ in range(count)]
                assert [[tokenizer.decode_token(t) for t in row] for row, _ in filled] == [
                    [prediction.token for prediction in row] for row in expected
                ]
                assert [p for _, row in filled for p in row] == pytest.approx(
                    [prediction.probability for row in expected for prediction in row], rel=1e-4
                )
            place += 1
        assert next(rows, None) is None and not found.reasons
    assert place == len(LINES)


@pytest.fixture(scope="module")
def saved(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_hf(model, folder, tokenizer)
    return folder


def test_every_line_of_standard_input_has_predictions_or_a_reason(model, tokenizer, saved, monkeypatch, capsys):
    lines = [*(line.encode() for line in LINES), b"\xff [MASK]"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n".join(lines))))
    assert main(["fill-mask", str(saved), "--input", "-", "--top-k", "2"]) == 0
    shown = capsys.readouterr()
    records = [json.loads(line) for line in shown.out.splitlines()]
    assert [record["text"] for record in records] == [*LINES, ""]
    for place, record in enumerate(records):
        reason = (REASONS | {len(LINES): "no_text"}).get(place)
        assert record.get("reason") == reason and (record["masks"] is None) == (reason is not None)
        if reason is None:
            expected = fill_mask(model, tokenizer, record["text"], top_k=2)
            assert [[guess["token"] for guess in mask] for mask in record["masks"]] == [
                [guess.token for guess in mask] for mask in expected
            ]
            assert record["masks"][0][0]["probability"] == pytest.approx(expected[0][0].probability, rel=1e-4)
    for reason in ("no_text", "no_mask", "too_long", "standard input:16"):
        assert reason in shown.err


def test_a_table_has_a_row_for_every_mask(saved, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"s": line}) + "\n" for line in LINES))
    output = tmp_path / "new" / "out.csv"
    command = ["fill-mask", str(saved), "-i", str(tmp_path / "in.jsonl"), "--text-column", "s", "-o", str(output)]
    assert main(command) == 0
    rows = list(csv.DictReader(output.open()))
    counts = [max(1, line.count("[MASK]")) for line in LINES]
    assert [int(row["row"]) for row in rows] == [n for n, count in enumerate(counts, start=1) for _ in range(count)]
    assert [row["text"] for row in rows] == [LINES[int(row["row"]) - 1] for row in rows]
    for row in rows:
        reason = REASONS.get(int(row["row"]) - 1, "")
        assert row["reason"] == reason and (row["mask"] == row["token_1"] == row["probability_5"] == "") == bool(reason)
    assert [row["mask"] for row in rows[-3:]] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ([], "--input"),
        (["a [MASK]", "--input", "-"], "--input"),
        (["--input", "missing.txt"], "--input"),
        (["a [MASK]", "--top-k", "0"], "--top-k"),
        (["a [MASK]", "--output", "out.npy"], "--output"),
    ],
)
def test_wrong_arguments(saved, arguments, key, capsys):
    assert main(["fill-mask", str(saved), *arguments]) == 2
    assert key in capsys.readouterr().err


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
