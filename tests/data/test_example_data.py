import json
from types import SimpleNamespace

import numpy as np
import pytest

from torchrecipes.config import Component
from torchrecipes.data import ExampleData, load_examples
from torchrecipes.data.example_data import open_example_rows
from torchrecipes.errors import UserError

PAIRS, LABELED = "torchrecipes.data.examples.pairs", "torchrecipes.data.examples.labeled_texts"


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def files(tmp_path):
    return {
        "a": write(tmp_path / "a.jsonl", [{"query": f"what is {i}", "positive": f"it is {i}"} for i in range(30)]),
        "b": write(tmp_path / "b.jsonl", [{"query": f"who is {i}", "positive": f"she is {i}"} for i in range(10)]),
        "train": write(tmp_path / "train.jsonl", [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(40)]),
        "test": write(tmp_path / "test.jsonl", [{"text": f"test {i}", "label": "b"} for i in range(6)]),
    }


def config_of(tmp_path, **data):
    tokenizer = Component("torchrecipes.data.tokenizers.train_wordpiece", {"vocab_size": 100})
    return SimpleNamespace(
        data=ExampleData(**data),
        tokenizer=tokenizer,
        init_from=None,
        output_dir=str(tmp_path / "run"),
        seq_len=32,
        global_batch_size=4,
    )


def source(path, component=PAIRS, **args):
    return Component(component, {"path": path, **args})


def test_one_source_is_split_by_the_hash_of_a_text(tmp_path, files):
    config = config_of(tmp_path, source=source(files["a"]), validation_fraction=0.2, split_by="query")
    found = load_examples(config)
    assert found.train.num_rows + found.eval_sets["validation"].num_rows == 30
    assert found.eval_sets["validation"].num_rows == 6
    train, eval_sets = open_example_rows(config, tmp_path / "run" / "corpus", found.tokenizer)
    assert train.identity() == found.train.identity() and eval_sets.keys() == {"validation"}


def test_a_step_of_more_examples_than_there_are_is_said(tmp_path, files, capsys):
    config = config_of(tmp_path, source=source(files["b"]))
    for size, is_said in ((10, False), (11, True)):
        config.global_batch_size = size
        load_examples(config)
        assert ("warning: global_batch_size=11" in capsys.readouterr().out) == is_said


def test_prompts_of_a_dataset_replace_those_of_the_model(tmp_path, files):
    sources = {"one": source(files["a"]), "two": source(files["b"])}
    config = config_of(tmp_path, sources=sources, dataset_prompts={"two": {"query": "who who who "}})
    found = load_examples(config, prompts={"query": "what "})
    one, two = (found.train.parts[name].corpus.prompt_lengths[0] for name in ("one", "two"))
    assert found.train.source_names == ("one", "two") and two > one > 0


def test_labels_of_the_training_examples_number_those_of_the_others(tmp_path, files):
    config = config_of(tmp_path, source=source(files["train"], LABELED), test=source(files["test"], LABELED))
    found = load_examples(config, task="single_label")
    assert found.label_names == ("a", "b")
    labels = found.eval_sets["test"].corpus.labels
    assert labels.tolist() == [1] * 6


def test_an_unknown_label_of_a_set_is_named(tmp_path, files):
    other = write(tmp_path / "other.jsonl", [{"text": "x", "label": "c"}])
    config = config_of(tmp_path, source=source(files["train"], LABELED), test=source(other, LABELED))
    with pytest.raises(UserError) as error:
        load_examples(config, task="single_label")
    assert error.value.code == "unknown_label"


@pytest.mark.parametrize(
    ("data", "key", "code"),
    [
        ({}, "source", "no_source"),
        ({"source": source("x"), "sources": {"a": source("x")}}, "source", "no_source"),
        ({"sources": {"a": source("x")}, "weights": {"b": 1.0}}, "weights", "unknown_name"),
        ({"sources": {"a": source("x")}, "dataset_prompts": {"b": {}}}, "dataset_prompts.b", "unknown_name"),
        ({"sources": {"a": source("x")}, "validation_fraction": 0.1}, "validation_fraction", "several_sources"),
    ],
)
def test_sources_that_contradict_each_other_are_found_without_reading(data, key, code):
    (problem,) = ExampleData(**data).check()
    assert (problem.key, problem.code) == (key, code)


def test_a_missing_file_is_named_with_the_key_of_its_source(tmp_path):
    for data, key in (
        ({"source": source(str(tmp_path / "none.jsonl"))}, "data.source.path"),
        ({"sources": {"a": source(str(tmp_path / "none.jsonl"))}}, "data.sources.a.path"),
    ):
        with pytest.raises(UserError) as error:
            load_examples(config_of(tmp_path, **data))
        assert error.value.key == key


def test_a_stream_is_tokenized_while_it_is_read(tmp_path, files):
    config = config_of(tmp_path, source=source(files["a"]), validation=source(files["b"]), window=8)
    found = load_examples(config, prompts={"query": "what "})
    assert found.train.num_available in (8, 16) and found.eval_sets["validation"].num_rows == 10
    train, eval_sets = open_example_rows(config, tmp_path / "run" / "corpus")
    assert train.identity() == found.train.identity() and eval_sets.keys() == {"validation"}
    all_at_once = load_examples(config_of(tmp_path / "other", source=source(files["a"])), prompts={"query": "what "})
    numbers, _ = found.train.locate(np.arange(30), seed=0, shuffle=False)
    blocks = [rows.examples(numbers) for rows in (found.train, all_at_once.train)]
    assert blocks[0].tokens.tolist() == blocks[1].tokens.tolist() and found.train.num_rows == 30


def test_classes_of_a_stream_are_those_that_are_named(tmp_path, files):
    config = config_of(tmp_path, source=source(files["train"], LABELED), test=source(files["test"], LABELED), window=8)
    found = load_examples(config, task="single_label", label_names=["b", "a"])
    assert found.label_names == ("b", "a") and found.eval_sets["test"].corpus.labels.tolist() == [0] * 6
    assert found.train.examples(np.arange(4)).labels.tolist() == [1, 0, 1, 0]
    with pytest.raises(UserError) as error:
        load_examples(config, task="single_label")
    assert error.value.code == "no_label_names"


def test_what_needs_all_examples_does_not_go_with_a_stream(tmp_path, files):
    data = ExampleData(source=source(files["a"]), window=8, validation_fraction=0.1, split_by="query", per_label=2)
    assert [error.key for error in data.check()] == ["validation_fraction", "split_by", "per_label"]
    with pytest.raises(UserError) as error:
        open_example_rows(config_of(tmp_path, source=source(files["a"]), window=8), tmp_path)
    assert error.value.code == "no_corpus"


def test_a_number_is_the_same_class_in_all_sources(tmp_path, files):
    other = write(tmp_path / "other.jsonl", [{"text": f"another {i}", "label": "bc"[i % 2]} for i in range(20)])
    sources = {"one": source(files["train"], LABELED), "two": source(other, LABELED)}
    with pytest.raises(UserError) as error:
        load_examples(config_of(tmp_path / "a", sources=sources), task="single_label")
    assert (error.value.key, error.value.code) == ("label_names", "different_labels")
    named = load_examples(config_of(tmp_path / "b", sources=sources), task="single_label", label_names=["a", "b", "c"])
    assert named.label_counts == (20, 30, 10)


def test_datasets_have_labels_of_their_own_where_there_is_no_task(tmp_path, files):
    other = write(tmp_path / "other.jsonl", [{"text": f"another {i}", "label": "xyz"[i % 3]} for i in range(21)])
    sources = {"one": source(files["train"], LABELED), "two": source(other, LABELED)}
    assert load_examples(config_of(tmp_path, sources=sources)).num_examples == 61


@pytest.mark.parametrize(("task", "label"), [("single_label", "a"), ("multi_label", [])])
def test_named_classes_that_do_not_occur_are_nothing_to_learn(tmp_path, task, label):
    path = write(tmp_path / "one.jsonl", [{"text": f"text {i}", "label": label} for i in range(20)])
    with pytest.raises(UserError) as error:
        load_examples(config_of(tmp_path, source=source(path, LABELED)), task=task, label_names=["a", "b"])
    assert (error.value.key, error.value.code) == ("data", "one_class")


@pytest.mark.parametrize(("loss", "code"), [("InfoNCE", "ignored_scores"), ("CosineRegression", "score_range")])
@pytest.mark.parametrize("nested", [False, True])
def test_scores_go_with_the_loss(tmp_path, loss, code, nested):
    rows = [{"sentence1": f"one {i}", "sentence2": f"two {i}", "score": i % 6} for i in range(20)]
    scored = "torchrecipes.data.examples.scored_pairs"
    node = source(write(tmp_path / "scores.jsonl", rows), scored)
    config = config_of(tmp_path, source=node)
    config.loss = Component(f"torchrecipes.losses.{loss}", {})
    if nested:
        config.loss = Component("torchrecipes.losses.Matryoshka", {"loss": config.loss, "dims": [8]})
    with pytest.raises(UserError) as error:
        load_examples(config)
    assert (error.value.key, error.value.code) == ("data.source", code)
    config.loss = Component("torchrecipes.losses.CoSENT", {})
    load_examples(config)


def test_numbers_that_fp32_does_not_hold_are_refused(tmp_path):
    path = write(tmp_path / "large.jsonl", [{"text": f"text {i}", "label": 1e39} for i in range(4)])
    with pytest.raises(UserError) as error:
        load_examples(config_of(tmp_path, source=source(path, LABELED)), task="regression")
    assert error.value.code == "bad_label"
    path = write(tmp_path / "scores.jsonl", [{"sentence1": "a", "sentence2": "b", "score": 1e39}])
    scored = source(path, "torchrecipes.data.examples.scored_pairs")
    with pytest.raises(UserError) as error:
        load_examples(config_of(tmp_path / "other", source=scored))
    assert error.value.code == "bad_record"


def test_a_classifier_needs_labels_and_the_same_number_of_texts_everywhere(tmp_path, files):
    pairs = source(files["train"], LABELED, text_pair="label")
    for data, key, code in (
        ({"source": source(files["a"])}, "data.source", "no_labels"),
        ({"source": source(files["train"], LABELED), "test": pairs}, "data.test", "pairs"),
        ({"sources": {"one": pairs, "two": source(files["train"], LABELED)}}, "data.sources.two", "pairs"),
    ):
        with pytest.raises(UserError) as error:
            load_examples(config_of(tmp_path, **data), task="single_label")
        assert (error.value.key, error.value.code) == (key, code)
