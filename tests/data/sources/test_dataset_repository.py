"""Cloned dataset repositories: the split and the subset that are read, and what is left out."""

import gzip
import json
from dataclasses import replace

import pytest

from torchrecipes.data.sources import files, hf_dataset
from torchrecipes.data.sources.eval_split import split_for_evaluation
from torchrecipes.errors import UserError


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(*paths):
    """Files with one document each: their own path."""
    from pathlib import Path

    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        row = json.dumps({"text": str(path)}).encode()
        path.write_bytes(
            gzip.compress(row) if path.suffix == ".gz" else row if ".json" in path.name else path.name.encode()
        )


def texts(source):
    return [document.text for document in source]


def refused(*arguments, **options):
    with pytest.raises(UserError) as error:
        files(*arguments, **options)
    return error.value


def test_names_say_the_split(here):
    write("repo/data/train-00000-of-00002.jsonl", "repo/data/train-00001-of-00002.jsonl.gz")
    write("repo/data/test-00000-of-00001.jsonl", "repo/data/validation.jsonl", "repo/data/extra-00000-of-00001.jsonl")
    write("repo/README.md", "repo/notes.txt")
    source = files("repo")
    assert texts(source) == ["repo/data/train-00000-of-00002.jsonl", "repo/data/train-00001-of-00002.jsonl.gz"]
    assert sorted(source.splits()) == ["extra", "test", "train", "validation"]
    report = str(source.report)
    for name in ("split 'test'", "split 'validation'", "split 'extra'", "repo/README.md", "repo/notes.txt"):
        assert name in report
    assert texts(files("repo", split="test")) == ["repo/data/test-00000-of-00001.jsonl"]
    error = refused("repo", split="tset")
    assert (error.key, error.code) == ("split", "no_such_split") and "test" in error.hint
    chosen = split_for_evaluation(source, "auto", 1)
    assert texts(chosen) == ["repo/data/validation.jsonl"] and chosen.max_documents == 1
    assert replace(source, split="test").fingerprint != source.fingerprint


def test_folders_say_the_split_and_a_subset_is_one_of_them(here):
    for language in ("de", "en"):
        write(f"repo/{language}/train/0.jsonl", f"repo/{language}/train/1.jsonl", f"repo/{language}/test/0.jsonl")
    assert texts(files("repo")) == [f"repo/{name}/train/{i}.jsonl" for name in ("de", "en") for i in (0, 1)]
    source = files("repo", subset="en")
    assert texts(source) == ["repo/en/train/0.jsonl", "repo/en/train/1.jsonl"]
    assert "subset 'de'" in str(source.report) and source.splits() == ["test", "train"]
    assert texts(files("repo", subset="en", split="test")) == ["repo/en/test/0.jsonl"]
    assert refused("repo", subset="fr").code == "no_such_subset"


CARD = """---
license: mit
configs:
- config_name: first
  data_files:
  - split: train
    path: "a/part-*"
  - split: dev
    path: ["a/dev.jsonl", "a/more-dev.jsonl"]
- config_name: second
  data_files: b/*.jsonl
- config_name: third
  data_dir: c
---
# A card
"""


@pytest.mark.parametrize("folder", ["repo", "./repo/"])
def test_the_card_says_the_files_of_splits_and_subsets(here, folder):
    write(
        "repo/a/part-1.jsonl", "repo/a/part-0.jsonl", "repo/a/dev.jsonl", "repo/a/more-dev.jsonl", "repo/a/none.jsonl"
    )
    write("repo/b/x.jsonl", "repo/c/train.jsonl", "repo/c/test.jsonl")
    (here / "repo/README.md").write_text(CARD)
    error = refused(folder)
    assert (error.key, error.code) == ("subset", "several_subsets") and "first, second, third" in error.problem
    source = files(folder, subset="first")
    assert texts(source) == ["repo/a/part-0.jsonl", "repo/a/part-1.jsonl"] and source.splits() == ["train", "dev"]
    report = str(source.report)
    assert "split 'dev'" in report and "subset 'second'" in report and "none.jsonl" in report
    assert texts(files(folder, subset="first", split="dev")) == ["repo/a/dev.jsonl", "repo/a/more-dev.jsonl"]
    assert texts(files(folder, subset="second")) == ["repo/b/x.jsonl"]
    assert texts(files(folder, subset="third", split="test")) == ["repo/c/test.jsonl"]
    assert refused(folder, subset="fist").code == "no_such_subset"
    (here / "repo/README.md").write_text(CARD.replace("config_name: second", "config_name: default"))
    assert texts(files(folder)) == ["repo/b/x.jsonl"]
    (here / "repo/README.md").write_text(CARD.replace("b/*.jsonl", "gone/*.jsonl"))
    assert refused(folder, subset="second").code == "no_such_file"


@pytest.mark.parametrize("card", ["no YAML", "---\n: [\n---\n", "---\n- a list\n---\n", "---\nconfigs: {a: 1}\n---\n"])
def test_a_card_that_says_nothing_leaves_it_to_the_names(here, card):
    write("repo/train.jsonl", "repo/test.jsonl")
    (here / "repo/README.md").write_text(card)
    assert texts(files("repo")) == ["repo/train.jsonl"]


def test_files_that_are_named_are_read_whatever_they_are(here):
    write("repo/train.jsonl", "repo/test.jsonl")
    for path in ("repo/*", ["repo/test.jsonl", "repo/train.jsonl"]):
        assert sorted(texts(files(path))) == ["repo/test.jsonl", "repo/train.jsonl"]
    assert refused("repo/test.jsonl", split="test").code == "no_such_split"
    assert refused("repo/test.jsonl", subset="x").code == "no_such_subset"
    write("plain/a.jsonl")
    assert refused("plain", split="test").code == "no_such_split"


def test_splits_of_the_datasets_library(here, monkeypatch):
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", here / "cache")
    rows = library.Dataset.from_dict({"text": ["a", "b"]})
    library.DatasetDict({"train": rows, "dev": rows}).save_to_disk("several")
    rows.save_to_disk("one")
    write("repo/train.jsonl", "repo/test.jsonl")
    assert hf_dataset("several").splits() == ["train", "dev"] and hf_dataset("one").splits() == []
    assert sorted(hf_dataset("repo").splits()) == ["test", "train"]
    assert texts(split_for_evaluation(hf_dataset("several", streaming=True), "auto")) == ["a", "b"]
