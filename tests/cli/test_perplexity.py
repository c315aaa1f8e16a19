import json
import math
from dataclasses import replace

import pytest
import torch

from torchrecipes.cli.main import main
from torchrecipes.data.sources.records import Document
from torchrecipes.data.tokenizers.load import train_bpe, train_char
from torchrecipes.models import llama, save_hf

DOCUMENTS = ["the quick brown fox jumps over the lazy dog", "über 水", "the dog " * 30, "a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_bpe([Document(" ".join(DOCUMENTS), "a")], vocab_size=280, causal=True)
    model = llama(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
        initializer_range=0.3,
        seed=1,
    )
    save_hf(model, folder, tokenizer)
    (folder / "data.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in DOCUMENTS))
    (folder / "data.txt").write_text("\n".join(DOCUMENTS))
    return folder


def measured(capsys, folder, *words):
    code = main(["perplexity", str(folder), "--device", "cpu", "--json", "--data", *map(str, words)])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def expected(folder, documents, window=32, stride=16):
    """Tokens and nats by transformers' tokenizer and model, in float64."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    nats = tokens = 0
    for text in documents:
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in ids[1:]
        for start in range(0, max(1, len(ids) - 1 - window + stride), stride):
            with torch.no_grad():
                log_p = model(torch.tensor([ids[start : start + window]])).logits[0].log_softmax(-1)
            first = 1 if start == 0 else start + window - stride + 1
            for i in range(first, min(start + window, len(ids) - 1) + 1):
                nats -= log_p[i - 1 - start, ids[i]].item()
                tokens += 1
    return tokens, nats


def test_figures_equal_those_of_transformers(folder, capsys):
    found = measured(capsys, folder, folder / "data.jsonl", "--text-column", "body")
    tokens, nats = expected(folder, DOCUMENTS)
    num_bytes = sum(len(text.encode()) for text in DOCUMENTS)
    assert (found["documents"], found["tokens"], found["bytes"]) == (4, tokens, num_bytes)
    assert found["nll_per_token"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert (found["window"], found["stride"]) == (32, 16)


def test_options_change_the_figures(folder, capsys):
    settings = ("--sample-by", "line", "--max-length", 20, "--stride", 3, "--batch-size", 2, "--limit", 3)
    found = measured(capsys, folder, folder / "data.txt", *settings)
    tokens, nats = expected(folder, DOCUMENTS[:3], window=20, stride=3)
    assert (found["documents"], found["tokens"]) == (3, tokens)
    assert found["nll_per_token"] == pytest.approx(nats / tokens, rel=1e-5)
    whole = measured(capsys, folder, folder / "data.txt")
    assert whole["documents"] == 1 and whole["bytes"] == (folder / "data.txt").stat().st_size


def test_bad_records_are_skipped_and_counted_on_request(folder, tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text('{"text": "the dog"}\n{"text": 3}\n')
    words = ["perplexity", str(folder), "--data", str(tmp_path / "data.jsonl"), "--on-bad-record", "skip", "--json"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["documents"] == 1 and "skipped 1: " in err


def test_unknown_characters_are_counted(tmp_path, capsys):
    tokenizer = train_char([Document("abc" * 9, "a")], causal=True)
    model = llama(vocab_size=tokenizer.vocab_size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    save_hf(model, tmp_path / "model", tokenizer)
    (tmp_path / "data.txt").write_text("abcäöüabc\n")
    assert measured(capsys, tmp_path / "model", tmp_path / "data.txt")["unknown_tokens"] == 3
    assert main(["perplexity", str(tmp_path / "model"), "--data", str(tmp_path / "data.txt")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:2] == ["unknown", "3"]


def test_a_special_token_in_the_place_of_unk_is_not_counted(tmp_path, capsys):
    tokenizer = train_bpe([Document("abc" * 9, "a")], vocab_size=270, causal=True)
    tokenizer = replace(tokenizer, unk_id=tokenizer.eos_id)
    save_hf(
        llama(
            vocab_size=tokenizer.vocab_size,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=32,
        ),
        tmp_path / "model",
        tokenizer,
    )
    (tmp_path / "data.txt").write_text("abc\nabc\n")
    assert measured(capsys, tmp_path / "model", tmp_path / "data.txt")["unknown_tokens"] == 0


def test_figures_are_printed_for_people(folder, capsys):
    assert main(["perplexity", str(folder), "--data", str(folder / "data.txt")]) == 0
    out = capsys.readouterr().out
    names = ["documents", "tokens", "loss", "perplexity", "bits per byte", "speed"]
    assert [line[:14].strip() for line in out.splitlines()[2:]] == names
    assert "windows of 32 tokens, stride 16" in out
    assert main(["perplexity", str(folder), "--data", str(folder / "data.txt"), "--by-position"]) == 0
    assert "loss/0-31" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "key", "detail"),
    [
        (["missing.txt"], "--data", "missing.txt"),
        (["empty.txt"], None, "empty.txt"),
        (["data.txt", "--stride", "40"], "--stride", "--stride 32 or less"),
        (["data.txt", "--max-length", "9", "--stride", "10"], "--stride", "--stride 9 or less"),
        (["data.txt", "--stride", "0"], "--stride", "1 or more"),
        (["data.txt", "--max-length", "33"], "--max-length", "--max-length 32 or less"),
        (["data.txt", "--max-length", "0"], "--max-length", "1 or more"),
        (["data.txt", "--batch-size", "0"], "--batch-size", "1 or more"),
        (["data.txt", "--limit", "0"], "--limit", "1 or more"),
        (["data.txt", "--sample-by", "sentence"], "--sample-by", "sentence"),
        (["data.jsonl"], None, "'text'"),
    ],
)
def test_mistakes_name_the_option_and_the_remedy(folder, words, key, detail, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (folder / "empty.txt").write_text("\n")
    assert main(["perplexity", str(folder), "--data", *words]) == 2
    err = capsys.readouterr().err
    assert detail in err and err.startswith(f"{key}: " if key else "")
