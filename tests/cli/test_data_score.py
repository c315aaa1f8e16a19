"""`tune-style data score`."""

import json

import numpy as np
import pytest
import torch

from torchrecipes.cli import data_score
from torchrecipes.cli.main import main
from torchrecipes.data.sources import files
from torchrecipes.data.tokenizers import load_tokenizer, train_bpe
from torchrecipes.evaluation.text_perplexity import encode_documents, perplexity
from torchrecipes.losses import causal_lm_loss
from torchrecipes.models import llama, load_hf, neobert, save_hf

TEXTS = [f"the quick brown fox number {i} jumps over the lazy dog" for i in range(30)]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for family, causal in ((llama, True), (neobert, False)):
        tokenizer = train_bpe(files("texts.jsonl"), vocab_size=280, causal=causal)
        model = family(vocab_size=tokenizer.vocab_size, max_position_embeddings=16, initializer_range=0.2, **SIZES)
        save_hf(model, family.__name__, tokenizer)
    return tmp_path


def score(*words):
    return main(["data", "score", *map(str, words), "--device", "cpu"])


def read(path="scores.jsonl"):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def test_scores_are_sorted_and_agree_with_perplexity(text, capsys):
    assert score("llama", "--data", "texts.jsonl", "--min-tokens", "4", "--show", "3") == 0, capsys.readouterr().err
    lines = read()
    losses = [line["loss"] for line in lines]
    assert losses == sorted(losses, reverse=True)
    assert sorted(line["document"] for line in lines) == list(range(len(TEXTS)))
    model, tokenizer = load_hf("llama"), load_tokenizer("llama", causal=True)
    for line in lines[:3]:
        documents = encode_documents(tokenizer, [TEXTS[line["document"]]])
        expected = perplexity(model, documents, stride=16)
        assert line["loss"] == pytest.approx(expected.nll_per_token, rel=1e-5)
        assert (line["tokens"], line["excerpt"]) == (expected.tokens, TEXTS[line["document"]])
        assert line["source"] == f"texts.jsonl:{line['document'] + 1}"
    deviation = np.median(np.abs(np.array(losses) - np.median(losses)))
    assert lines[0]["robust_z"] == pytest.approx(0.6745 * (losses[0] - np.median(losses)) / deviation)
    out = capsys.readouterr().out
    assert out.count(" texts.jsonl:") == 6 and "highest" in out and "lowest" in out
    assert not (text / "scores.jsonl.partial").exists()


def test_a_masked_model_is_scored_on_hidden_tokens(text, capsys):
    assert score("neobert", "--data", "texts.jsonl", "-o", "a.jsonl", "--mlm-probability", "0.3") == 0
    assert "mlm" in capsys.readouterr().out
    assert score("neobert", "--data", "texts.jsonl", "-o", "b.jsonl", "--mlm-probability", "0.3") == 0
    assert read("a.jsonl") == read("b.jsonl")
    assert score("neobert", "--data", "texts.jsonl", "-o", "c.jsonl", "--mlm-probability", "0.3", "--seed", "1") == 0
    assert read("a.jsonl") != read("c.jsonl")


def test_bad_data_comes_first(text, capsys):
    model, tokenizer = load_hf("llama"), load_tokenizer("llama", pad_vocab_to_multiple_of=1, causal=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    rows = torch.tensor([tokenizer.encode(text)[:10] for text in TEXTS])
    for _ in range(30):
        loss = causal_lm_loss(model(rows[:, :-1]), model.head, rows[:, 1:].contiguous()) / rows[:, 1:].numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_hf(model, "trained", tokenizer)
    (text / "bad.jsonl").write_text(json.dumps({"text": "xof nworb kciuq %$ eht ## zzz"}) + "\n")
    assert score("trained", "--data", "texts.jsonl", "bad.jsonl", "--min-tokens", "1") == 0
    first, *others = read()
    assert first["source"] == "bad.jsonl:1" and first["robust_z"] > 3.5 > max(line["robust_z"] for line in others)
    highest = capsys.readouterr().out.split("highest")[1].splitlines()[2]
    assert "bad.jsonl:1" in highest


def test_interrupted_it_continues_to_the_same_scores(text, capsys, monkeypatch):
    words = ("llama", "--data", "texts.jsonl", "--batch-tokens", "8")
    assert score(*words, "-o", "whole.jsonl") == 0
    dumps, calls = json.dumps, 0

    def interrupt(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 20:
            raise KeyboardInterrupt
        return dumps(*args, **kwargs)

    monkeypatch.setattr(data_score.json, "dumps", interrupt)
    assert score(*words) == 130
    monkeypatch.setattr(data_score.json, "dumps", dumps)
    partial = text / "scores.jsonl.partial"
    assert 0 < len(partial.read_text().splitlines()) - 1 < len(TEXTS)
    # As a killed process leaves it.
    partial.write_text(partial.read_text()[:-20])
    assert score("neobert", "--data", "texts.jsonl") == 2
    assert "scores.jsonl.partial" in capsys.readouterr().err
    assert score(*words) == 0
    assert "scored already" in capsys.readouterr().err
    assert read() == read("whole.jsonl")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["llama", "--data", "nothing.txt"], "--data"),
        (["llama", "--data", "texts.jsonl", "--max-length", "99"], "--max-length"),
        (["llama", "--data", "texts.jsonl", "--batch-tokens", "0"], "--batch-tokens"),
        (["neobert", "--data", "texts.jsonl", "--mlm-probability", "2"], "--mlm-probability"),
        (["llama", "--data", "texts.jsonl", "-o", "llama/config.json"], "--output"),
        (["llama", "--data", "empty.txt"], "no documents"),
        (["nothing", "--data", "texts.jsonl"], "nothing"),
    ],
)
def test_wrong_input(text, capsys, words, named):
    (text / "empty.txt").write_text("\n")
    assert score(*words) == 2
    err = capsys.readouterr().err
    assert named in err and "Traceback" not in err
    assert not (text / "scores.jsonl").exists()
