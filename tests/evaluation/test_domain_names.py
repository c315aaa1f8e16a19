"""Inference for domain names: many at a time give what each gives by itself, and a line that is none has a reason."""

import csv
import json

import numpy as np
import pytest
import torch

from torchrecipes.cli.main import main
from torchrecipes.data.domains import NameOptions, Rejected, domain_tokenizer, parse_name, synthetic_names
from torchrecipes.evaluation import TextClassifier, TextEncoder, over_texts
from torchrecipes.models import EmbeddingModel, SequenceClassifier, domain_bert, save_hf

pytest.importorskip("publicsuffixlist")
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "num_suffixes": 7,
}
LINES = [
    *(
        "example.com",
        "",
        "WWW.Example.CO.UK.",
        "https://user@shop.example.de:80/x?y",
        "_dmarc.example.org",
        "192.0.2.7",
    ),
    *("com", "münchen.de", "not a name!", "*.example.net", "#x", "a..b.com", "two\nlines.com", "\udcff.com", "a-.com"),
    *("long-" * 12 + "x.example.com", "x1.y2.z3.example.com"),
]
OPTIONS = NameOptions(strip_url=True, underscore="accept")


@pytest.fixture(scope="module")
def tokenizer():
    return domain_tokenizer(synthetic_names(num_names=300, seed=1), num_suffixes=6)


@pytest.fixture
def encoder():
    return domain_bert(**SIZES, suffix_embedding_size=8, initializer_range=0.3)


def names_of(tokenizer):
    """Each line's name, or the line itself where it is none; and the reasons by their places."""
    found = [parse_name(line, OPTIONS, tokenizer.domain.suffix_list) for line in LINES]
    names = [line if isinstance(name, Rejected) else name for line, name in zip(LINES, found, strict=True)]
    reasons = {place: name.reason for place, name in enumerate(found) if isinstance(name, Rejected)}
    return names, reasons | {LINES.index("\udcff.com"): "not_utf8"}


def alone(model, tokenizer, name, max_length=64):
    """The output for one name, from the tokens that `tokenizers` gives."""
    ids = np.array(tokenizer.backend.encode(name.encode("utf-8", "replace").decode()).ids)
    ids = np.append(ids[: max_length - 1], ids[-1]) if len(ids) > max_length else ids
    types = tokenizer.token_type_ids(ids, np.array([len(ids)]))
    with torch.no_grad():
        return model.eval()(torch.from_numpy(ids)[None], token_type_ids=torch.from_numpy(types)[None])[0].numpy()


@pytest.mark.parametrize("tokens", [1, 64, 4096])
def test_many_names_are_embedded_as_each_alone(tokenizer, encoder, tokens, monkeypatch):
    monkeypatch.setattr(over_texts, "TEXTS_PER_WINDOW", 7)
    model = EmbeddingModel(encoder)
    encode = TextEncoder(model, tokenizer, tokens_per_batch=tokens)
    found = encode.encode(LINES)
    names, reasons = names_of(tokenizer)
    expected = np.array([alone(model, tokenizer, name) for name in names])
    assert np.abs(found - expected).max() <= 1e-5
    assert sorted(encode.invalid_names.elements()) == sorted(reasons.values())
    assert encode.num_truncated == 1 and "ip_address" in reasons.values() and len(reasons) >= 6


def test_a_list_of_names_is_classified_line_by_line(tokenizer, encoder, tmp_path, capsys):
    model = SequenceClassifier(encoder, label_names=["dga", "legit"])
    names, reasons = names_of(tokenizer)
    logits = TextClassifier(model, tokenizer).logits(LINES)
    assert np.flatnonzero(np.isnan(logits).any(1)).tolist() == sorted(reasons) and np.nanstd(logits, 0).min() > 0.01
    for place in set(range(len(LINES))) - set(reasons):
        assert np.abs(logits[place] - alone(model, tokenizer, names[place])).max() <= 1e-5

    save_hf(model, tmp_path / "run", tokenizer)
    lines = [line for line in LINES if "\n" not in line and line.isprintable()]
    (tmp_path / "names.txt").write_text("\n".join(lines) + "\n")
    command = ["predict", str(tmp_path / "run"), "--input", str(tmp_path / "names.txt"), "--output"]
    assert main([*command, str(tmp_path / "out.jsonl")]) == 0
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert main([*command, str(tmp_path / "out.csv")]) == 0
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    for line, record, row in zip(lines, records, rows, strict=True):
        reason = reasons.get(LINES.index(line))
        assert record["text"] == row["text"] == line and record.get("reason") == reason == (row["reason"] or None)
        assert (record["label"] is None) == (row["label"] == row["dga"] == "") == (reason is not None)
    assert "ip_address" in capsys.readouterr().err
