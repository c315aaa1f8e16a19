"""`tune-style data clean` on the command line: its output, and mistakes as one message."""

import json

import pytest

from torchrecipes.cli.main import main


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = ["The first text of this file.", "the first   text of this file", "Another one."] * 2
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return tmp_path


def test_clean_prints_what_it_removed(here, capsys):
    assert main(["data", "clean", "--data", "a.jsonl", "--output", "out"]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert lines[0] == "kept 2 of 6 documents (33.3%)"
    assert [line.split()[1:] for line in lines[1:3]] == [["3", "exact_duplicates"], ["1", "near_duplicates"]]
    assert json.loads((here / "out/report.json").read_text())["kept_documents"] == 2


def test_stages_steps_and_other_texts(here, capsys):
    words = [
        "data",
        "clean",
        "--data",
        "a.jsonl",
        "--output",
        "out",
        "--steps",
        "exact_duplicates",
        "--num-shards",
        "2",
    ]
    words += ["--eval-sets", "a.jsonl"]
    for stage, index in (("filter", "1"), ("filter", "0"), ("merge", "0"), ("remove", "0"), ("remove", "1")):
        assert main([*words, "--stage", stage, "--shard-index", index]) == 0
    assert json.loads((here / "out/report.json").read_text())["kept_documents"] == 0


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--steps", "gopher"], "gopher_quality"),
        (["--steps", "near_duplicates.jacard=0.9"], "jaccard"),
        (["--against", "b.jsonl"], "--against"),
        (["--num-shards", "3"], "--stage"),
        (["--exempt", "[", "--steps", "c5"], "c4"),
    ],
)
def test_mistakes_are_one_message(here, capsys, words, shown):
    assert main(["data", "clean", "--data", "a.jsonl", "--output", "out", *words]) == 2
    message = capsys.readouterr().err
    assert shown in message and "Traceback" not in message


def test_decontaminate_prints_what_it_found(here, capsys):
    words = ["data", "decontaminate", "--data", "a.jsonl", "--eval-sets", "a.jsonl", "-o", "out", "-n", "5"]
    assert main([*words, "--action", "remove"]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert lines[0].startswith("4 documents overlap") and "4 of 6 documents" in lines[1]
    assert lines[2] == "kept 2 of 6 documents (33.3%)"
    assert main([*words, "--action", "delete"]) == 2
    assert "cut" in capsys.readouterr().err
