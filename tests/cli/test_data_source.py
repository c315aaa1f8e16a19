"""The text of a `data` or `tokenizer` verb: files, or the source of a config."""

import argparse

import pytest

from torchrecipes.cli.data_source import add_source_arguments, config_parts, source_from
from torchrecipes.errors import UserError


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "a.jsonl").write_text('{"body": "three"}\n[]\n')
    (tmp_path / "c.yaml").write_text(
        "size: 3\nunknown_to_this_verb: ${nowhere}\ntokenizer: {_component_: torchrecipes.data.tokenizers.trane_bpe}\n"
        "data:\n  source:\n    _component_: torchrecipes.data.sources.files\n    path: a.txt\n    sample_by: line\n"
    )
    return tmp_path


def parse(*words, required=True):
    parser = argparse.ArgumentParser()
    add_source_arguments(parser, required)
    return parser.parse_intermixed_args(words)


def texts(*words):
    return [document.text for document in source_from(parse(*words))]


def test_files_with_the_options_of_the_source(text):
    assert texts("--data", "a.txt") == ["one\ntwo"]
    assert texts("--data", "a.txt", "--sample-by", "line") == ["one", "two"]
    assert texts("--data", "a.jsonl", "a.txt", "--text-column", "body", "--on-bad-record", "skip")[0] == "three"


def test_a_config_whose_other_keys_are_not_looked_at(text):
    assert texts("--config", "c.yaml") == ["one", "two"]
    assert texts("--config", "c.yaml", "data.source.sample_by=document") == ["one\ntwo"]
    assert config_parts("c.yaml", [], ["data.validation_fraction"]) == [None]


def test_a_config_gets_the_defaults_of_its_recipe():
    source, fraction, tokenizer = config_parts(
        "neobert/small", ["data.source.path=README.md"], ["data.source", "data.validation_fraction", "tokenizer"]
    )
    assert source.path == "torchrecipes.data.sources.files" and source.args == {"path": "README.md"}
    assert 0 < fraction < 1 and tokenizer.path.endswith("train_wordpiece")


@pytest.mark.parametrize(
    ("words", "key", "code"),
    [
        (["--data", "b.txt"], "--data", None),
        (["--data", "a.txt", "--sample-by", "lines"], "--sample-by", "invalid_value"),
        (["x=1", "--data", "a.txt"], None, "unused_option"),
        (["--config", "c.yaml", "--sample-by", "line"], "--sample-by", "unused_option"),
        (["--config", "d.yaml"], None, "not_found"),
        (["--config", "c.yaml", "data.source.paht=x"], None, "invalid_config"),
        (["--config", "c.yaml", "data.source.path=b.txt"], "data.source.path", None),
        (["--config", "c.yaml", "data.source=null"], "data.source", "no_source"),
    ],
)
def test_wrong_input_names_the_option_or_the_key(text, words, key, code):
    with pytest.raises(UserError) as caught:
        source_from(parse(*words))
    assert caught.value.key == key
    assert code is None or caught.value.code == code


def test_only_the_keys_that_are_asked_for_are_checked(text):
    with pytest.raises(UserError) as caught:
        config_parts("c.yaml", [], ["tokenizer"])
    (problem,) = caught.value.problems
    assert problem.key == "tokenizer._component_" and "train_bpe" in problem.hint


def test_without_text_where_none_is_needed(text):
    assert source_from(parse(required=False)) is None
    with pytest.raises(UserError) as caught:
        source_from(parse("--sample-by", "line", required=False))
    assert caught.value.key == "--sample-by"
    with pytest.raises(SystemExit):
        parse()
