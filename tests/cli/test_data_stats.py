"""`tune-style data stats`."""

import json
from itertools import pairwise

import numpy as np
import pytest

from torchrecipes.cli.main import main
from torchrecipes.data import open_corpus, prepare_corpus
from torchrecipes.data.corpus.lengths import document_lengths
from torchrecipes.data.sources import files
from torchrecipes.data.tokenizers import train_char


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stats")
    draw = np.random.default_rng(0)
    texts = ["é" * int(draw.integers(1, 200)) for _ in range(50)] + ["z" * 5000, "  a  "]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = files(str(folder / "a.jsonl"))
    tokenizer = train_char(source, limit_alphabet=2, folder=folder / "corpus" / "tokenizer")
    prepare_corpus(folder / "corpus", source, tokenizer, 0, shard_tokens=500)
    return folder / "corpus"


def measured(capsys, *words):
    capsys.readouterr()
    code = main(["data", "stats", "--json", *map(str, words)])
    out, err = capsys.readouterr()
    assert code == 0, err
    (figures,) = json.loads(out).values()
    return figures


def lengths_of(folder):
    corpus = open_corpus(folder)
    return [int(b - a) for a, b in zip(*corpus.spans(np.arange(corpus.num_documents)), strict=True)]


def test_figures_are_those_of_a_loop_over_the_documents(corpus, capsys):
    found, lengths = measured(capsys, corpus), lengths_of(corpus / "train")
    assert found["documents"] == len(lengths) == 52 and found["tokens"] == sum(lengths)
    # [CLS] and [SEP] around each; "é" has two bytes; "a" and blanks of "  a  " are unknown, a token each.
    text = [length - 2 for length in lengths]
    assert found["characters"] == sum(text) and found["bytes"] == 2 * sum(text[:50]) + 5000 + 5
    assert found["tokens_per_character"] == pytest.approx(sum(lengths) / sum(text))
    assert found["tokens_per_byte"] == pytest.approx(sum(lengths) / found["bytes"])
    assert found["unknown_share"] > 0
    assert found["lengths"]["mean"] == pytest.approx(np.mean(lengths))
    for key, share in {"p1": 0.01, "p50": 0.5, "p99": 0.99}.items():
        assert found["lengths"][key] == np.quantile(lengths, share, method="inverted_cdf")
    assert (found["lengths"]["shortest"], found["lengths"]["longest"]) == (min(lengths), max(lengths))
    histogram = found["lengths"]["histogram"]
    for row in histogram:
        inside = [length for length in lengths if row["from"] <= length <= row["to"]]
        assert (row["documents"], row["tokens"]) == (len(inside), sum(inside))
    assert sum(row["documents"] for row in histogram) == len(lengths)
    assert found["examples"]["longest"]["document"] == lengths.index(5002)
    assert "zzzz" in found["examples"]["longest"]["text"]
    assert found["examples"]["shortest"]["document"] == lengths.index(min(lengths))


@pytest.mark.parametrize("seq_len", [7, 64, 4096])
def test_rows_of_every_packing(corpus, capsys, seq_len):
    rows = {row["packing"]: row for row in measured(capsys, corpus, "--seq-len", seq_len)["rows"]}
    lengths = lengths_of(corpus / "train")
    starts = np.cumsum([0, *lengths])
    crossing = sum(a // seq_len != (b - 1) // seq_len for a, b in pairwise(starts))
    assert rows["concat"]["rows"] == -(-sum(lengths) // seq_len)
    assert rows["concat"]["cut_share"] == crossing / len(lengths)
    assert rows["none"]["rows"] == sum(-(-length // seq_len) for length in lengths)
    assert rows["none"]["cut_share"] == sum(length > seq_len for length in lengths) / len(lengths)
    for packing in ("best_fit", "next_fit"):
        assert rows[packing]["cut_share"] == rows["none"]["cut_share"]
        assert -(-sum(lengths) // seq_len) <= rows[packing]["rows"] <= rows["none"]["rows"]
    assert list(rows) == ["concat", "best_fit", "next_fit", "none"]
    for row in rows.values():
        assert row["fill"] == pytest.approx(sum(lengths) / row["rows"] / seq_len)


def test_the_first_of_equal_extremes_is_taken(corpus):
    lengths = document_lengths(open_corpus(corpus / "train"))
    assert lengths.values.tolist() == sorted(set(lengths_of(corpus / "train")))
    assert lengths.counts.sum() == 52


def test_text_and_picture(corpus, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    capsys.readouterr()
    plot = tmp_path / "new" / "lengths.png"
    assert main(["data", "stats", str(corpus), "--seq-len", "64", "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    assert "52 documents" in out and "concat" in out and "###" in out
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["nothing"], "nothing"),
        (["CORPUS", "--seq-len", "0"], "--seq-len"),
        (["CORPUS", "--plot", "CORPUS/prepare.json/x.png"], "--plot"),
        (["CORPUS", "--plot", "x.what"], "--plot"),
    ],
)
def test_wrong_input(corpus, capsys, monkeypatch, tmp_path, words, named):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "stats", *(word.replace("CORPUS", str(corpus)) for word in words)]) == 2
    assert named in capsys.readouterr().err
