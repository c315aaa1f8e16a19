"""`tune-style data split-report`: figures against plain counts, and splits that are not what the rule gives."""

import csv
import json
from collections import Counter

import numpy as np
import pytest

from torchrecipes.cli.main import main
from torchrecipes.data.corpus import append_to_corpus, prepare_corpus
from torchrecipes.data.domains import domain_names, domain_tokenizer
from torchrecipes.data.domains.name_split import NameSplit
from torchrecipes.data.domains.split_report import report_split
from torchrecipes.data.sources import files
from torchrecipes.data.tokenizers import train_char
from torchrecipes.errors import UserError

psl = pytest.importorskip("publicsuffixlist").PublicSuffixList()
NAMES = [f"n{i}.{suffix}" for suffix, n in {"com": 700, "co.uk": 120, "de": 99, "net": 30}.items() for i in range(n)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("names") / "names.txt"
    path.write_text("\n".join(NAMES))
    return domain_names(str(path))


@pytest.fixture(scope="module")
def tokenizer(source):
    return domain_tokenizer(source)


def test_figures(source, tokenizer, tmp_path, capsys):
    _, validation = prepare_corpus(tmp_path / "c", source, tokenizer, 0.002, shard_tokens=3000)
    more = tmp_path / "more.txt"
    again = "".join(f"n{i}.de\n" for i in range(99))  # which are not held out, whatever is added
    more.write_text("new1.de\nnew2.de\nn1.com\n" + again + "".join(f"m{i}.fr\n" for i in range(150)))
    append_to_corpus(tmp_path / "c", domain_names(str(more)), tokenizer)
    capsys.readouterr()
    assert main(["data", "split-report", str(tmp_path / "c"), "--json", "--csv", str(tmp_path / "all.csv")]) == 0
    found = json.loads(capsys.readouterr().out)
    counts = Counter(psl.publicsuffix(name) for name in [*NAMES, *more.read_text().split()])
    rows = {row["suffix"]: row for row in found["suffixes"]}
    assert {suffix: row["train"] + row["validation"] for suffix, row in rows.items()} == counts
    assert list(rows) == ["com", "de", "fr", "co.uk", "net"]
    assert {suffix for suffix, row in rows.items() if row["validation"]} >= {"com", "co.uk", "de", "fr"}
    assert (found["in_both"], found["problems"], found["fraction"]) == (0, [], 0.002)
    assert (
        found["train"] + found["validation"] == sum(counts.values()) and found["validation"] > validation.num_documents
    )
    with (tmp_path / "all.csv").open() as file:
        assert [row["suffix"] for row in csv.DictReader(file)] == list(rows)
    assert main(["data", "split-report", str(tmp_path / "c"), "--top", "2"]) == 0
    shown = capsys.readouterr().out
    assert "is what the rule gives" in shown and "co.uk" not in shown and "and 3 more" in shown


@pytest.mark.parametrize("wrong", ["limit", "chosen", "both", "more"])
def test_another_split_is_found(source, tokenizer, tmp_path, monkeypatch, wrong, capsys):
    right = NameSplit.holds_out
    draws = np.random.default_rng(0)
    splits = {
        "limit": lambda self, hashes: right(self, hashes) & (hashes != hashes.min()),
        "chosen": lambda self, hashes: hashes < self.limit,
        "both": lambda self, hashes: draws.random(len(hashes)) < 0.5,
        "more": lambda self, hashes: right(self, hashes) | (hashes == hashes.max()),
    }
    names = tmp_path / "twice.txt"
    names.write_text("\n".join(NAMES * 2))
    with monkeypatch.context() as patched:
        patched.setattr(NameSplit, "holds_out", splits[wrong])
        prepare_corpus(tmp_path / "c", domain_names(str(names)) if wrong == "both" else source, tokenizer, 0.002)
    report = report_split(tmp_path / "c")
    says = {"limit": "to be held out by", "chosen": "or more", "both": "are validation names", "more": "not to be"}
    assert any(says[wrong] in problem for problem in report.problems)
    assert (report.num_in_both > 0) == (wrong == "both")
    assert main(["data", "split-report", str(tmp_path / "c")]) == 2


@pytest.mark.parametrize("name", ["tokens", "document_offsets", "suffix_starts"])
def test_a_corrupt_corpus_is_named(source, tokenizer, tmp_path, name, capsys):
    prepare_corpus(tmp_path / "c", source, tokenizer, 0.002)
    path = tmp_path / "c" / "train" / "shard-00000.safetensors"
    content = bytearray(path.read_bytes())
    size = 8 + int.from_bytes(content[:8], "little")
    start, end = json.loads(content[8:size])[name]["data_offsets"]
    middle = size + (start + end) // 16 * 8
    content[middle : middle + 16] = b"\xee" * 16
    path.write_bytes(content)
    assert main(["data", "split-report", str(tmp_path / "c")]) == 2
    assert f"{path} is corrupt" in capsys.readouterr().err


def test_without_the_rule_there_are_figures_alone(source, tokenizer, tmp_path):
    prepare_corpus(tmp_path / "c", source, tokenizer, eval_samples=10)
    report = report_split(tmp_path / "c")
    assert report.fraction is None and report.problems == [] and report.validation.tolist() == [10, 0, 0, 0]
    prepare_corpus(tmp_path / "t", files(source.path, sample_by="line"), train_char(source), 0.1)
    with pytest.raises(UserError) as caught:
        report_split(tmp_path / "t")
    assert caught.value.code == "no_names"
