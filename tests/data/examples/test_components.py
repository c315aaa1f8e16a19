"""Sources of examples: the fields of records in every format, and what is wrong with them."""

import csv
import gzip
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from torchrecipes.data.examples import labeled_texts, pairs, prepare_examples, raw_texts, scored_pairs
from torchrecipes.data.sources.records import EMPTY_TEXT, Document
from torchrecipes.data.tokenizers import train_wordpiece
from torchrecipes.errors import UserError

ROWS = [
    {"q": "one", "p": "two", "n": ["three", "four"], "s": [0.5, 0.25, -1], "c": 3},
    {"q": "five", "p": "six", "n": [], "s": [1], "c": 1},
    {"q": "seven", "p": "eight", "n": ["nine", None], "s": [2, 1, 0], "c": 3},
]
EXAMPLES = [
    (("one", "two", "three", "four"), (0.5, 0.25, -1.0), 3),
    (("five", "six"), (1.0,), 1),
    (("seven", "eight", "nine"), (2.0, 1.0), 3),
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece([Document("a film that is good and bad", "1")], vocab_size=60)


def write(path: Path, content: str | list) -> str:
    if isinstance(content, str):
        path.write_text(content, newline="")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    elif path.suffix == ".json":
        path.write_text(json.dumps(content, indent=1))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in content).encode()))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path, row_group_size=2)
    else:
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(content)
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.parquet"])
def test_pairs_of_every_format(tmp_path, name):
    source = pairs(write(tmp_path / name, ROWS), "q", "p", "n", "s", "c")
    examples = list(source)
    assert [example[:3] for example in examples] == EXAMPLES
    assert type(examples[0].label) is int and examples[1].source.startswith(str(tmp_path / name))
    for number in range(1, 3):
        reading = iter(source)
        for _ in range(number):
            next(reading)
        position = json.loads(json.dumps(source.position()))
        assert list(source.read(position)) == examples[number:]


def test_fields_of_objects_in_json_and_structs_in_parquet(tmp_path):
    rows = [{"data": {"q": "one", "p": "two"}, "label": "x"}, {"data": {"q": "three", "p": "four"}, "label": "y"}]
    for name in ("a.jsonl", "a.parquet"):
        examples = list(pairs(write(tmp_path / name, rows), "data.q", "data.p", label="label"))
        assert [(example.texts, example.label) for example in examples] == [
            (("one", "two"), "x"), (("three", "four"), "y"),
        ]  # fmt: skip


def test_columns_of_tables(tmp_path):
    rows = [["one", "two", "", "0.5", "1"], ["a, b", "c\nd", "e", "2", "3"]]
    options = {"negatives": ["n"], "columns": ["query", "positive", "n", "s1", "s2"], "scores": ["s1", "s2"]}
    examples = list(pairs(write(tmp_path / "a.csv", rows), **options))
    assert [example[:2] for example in examples] == [(("one", "two"), (0.5,)), (("a, b", "c\nd", "e"), (2.0, 3.0))]
    path = write(tmp_path / "a.tsv", 'one\ttwo\r\n"x\ty\r\n')
    assert [e.texts for e in pairs(path, columns=["query", "positive"])] == [("one", "two"), ('"x', "y")]
    path = write(tmp_path / "b.csv", "query;positive\none;two\n")
    assert [e.texts for e in pairs(path, delimiter=";")] == [("one", "two")]


def test_a_tokenizer_is_trained_on_every_text(tmp_path):
    source = pairs(write(tmp_path / "a.jsonl", ROWS), "q", "p", "n").as_documents()
    assert [document.text for document in source] == [text for texts, _, _ in EXAMPLES for text in texts]
    assert source.report.documents == 9 and source.fingerprint != pairs(str(tmp_path / "a.jsonl"), "q", "p").fingerprint


def test_the_fingerprint_follows_what_decides_the_examples(tmp_path):
    rows = [{"sentence1": "a", "sentence2": "b", "score": 1}]
    path, other = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows)
    prints = [
        scored_pairs(path).fingerprint,
        scored_pairs(path, low=0, high=5).fingerprint,
        scored_pairs(path, low=0, high=4).fingerprint,
        scored_pairs(path, "sentence2", "sentence1").fingerprint,
        labeled_texts(path, "sentence1", label="score").fingerprint,
    ]
    assert len(set(prints)) == 5 and scored_pairs(other).fingerprint == prints[0]


def test_several_labels(tokenizer, tmp_path):
    lists = write(tmp_path / "a.jsonl", [{"text": "film", "label": label} for label in (["b", "a"], [], ["c"])])
    strings = write(tmp_path / "b.csv", [["text", "label"], ["film", "b; a"], ["film", ""], ["film", "c"]])
    columns = write(
        tmp_path / "c.csv", [["text", "a", "b", "c"], ["film", 1, 1, 0], ["film", 0, 0, 0], ["film", 0, 0, 1]]
    )
    made = {
        "lists": labeled_texts(lists),
        "strings": labeled_texts(strings, label_delimiter=";"),
        "columns": labeled_texts(columns, label=["a", "b", "c"]),
    }
    for name, source in made.items():
        corpus, _ = prepare_examples(tmp_path / name, source, tokenizer, max_length=16, task="multi_label")
        assert corpus.label_names == ["a", "b", "c"] and corpus.label_counts == [1, 1, 1]
        assert corpus.read([0, 1, 2]).labels.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    with pytest.raises(UserError) as error:
        prepare_examples(tmp_path / "single", labeled_texts(lists), tokenizer, max_length=16)
    assert (error.value.code, error.value.key) == ("wrong_task", "task")


def test_numbers(tokenizer, tmp_path):
    path = write(tmp_path / "a.csv", [["text", "label"], ["a film", "0.5"], ["good", "-2"], ["bad", "3"]])
    corpus, _ = prepare_examples(tmp_path / "c", labeled_texts(path), tokenizer, max_length=16, task="regression")
    assert corpus.read([0, 1, 2]).labels.tolist() == [0.5, -2, 3] and corpus.label_names == []
    with pytest.raises(UserError) as error:
        prepare_examples(tmp_path / "d", labeled_texts(path), tokenizer, max_length=16)
    assert error.value.code == "wrong_task" and "regression" in error.value.hint
    path = write(tmp_path / "b.csv", [["text", "label"], ["a film", "0.5"], ["good", "nine"], ["bad", "inf"]])
    with pytest.raises(UserError) as error:
        prepare_examples(tmp_path / "e", labeled_texts(path), tokenizer, max_length=16, task="regression")
    assert error.value.code == "bad_label" and f"{path}:3" in error.value.problem and f"{path}:4" in error.value.problem


@pytest.mark.parametrize(("names", "labels"), [(["bad", "good"], ["good", 0, "1"]), (["7", "5"], ["5", 7, "5"])])
def test_given_names_are_the_classes_in_their_order(tokenizer, tmp_path, names, labels):
    path = write(tmp_path / "a.jsonl", [{"text": "film", "label": label} for label in labels])
    corpus, _ = prepare_examples(tmp_path / "c", labeled_texts(path), tokenizer, max_length=16, label_names=names)
    assert corpus.read([0, 1, 2]).labels.tolist() == [1, 0, 1] and corpus.label_names == names


def test_an_integer_is_no_number_of_a_class_where_the_names_are_integers(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "film", "label": label} for label in (7, 1)])
    with pytest.raises(UserError) as error:
        prepare_examples(tmp_path / "c", labeled_texts(path), tokenizer, max_length=16, label_names=["7", "5"])
    assert error.value.code == "unknown_label"


def test_unknown_labels_are_listed_with_their_lines_or_counted(tokenizer, tmp_path):
    path = write(tmp_path / "a.csv", [["text", "label"], ["film", "good"], ["film", "bda"], ["good film", "bda"]])
    options = {"max_length": 16, "label_names": ["good", "bad"]}
    with pytest.raises(UserError) as error:
        prepare_examples(tmp_path / "c", labeled_texts(path), tokenizer, **options)
    assert (error.value.code, error.value.key) == ("unknown_label", "label")
    assert all(text in error.value.problem for text in ("'bda'", f"{path}:3", f"{path}:4", "good, bad"))
    assert "'bad'" in error.value.hint
    source = labeled_texts(path, on_bad_record="skip")
    corpus, _ = prepare_examples(tmp_path / "c", source, tokenizer, **options)
    assert corpus.num_examples == 1 and corpus.account["num_skipped"] == 2
    assert "no example has the label bad" in corpus.summary()


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        ([["film", "x"], ["good", "x"]], "one_class"),
        ([["film", ""]], "bad_record"),
        ([["film", "x", "y"], ["good", "x"]], "bad_record"),
        ([["", "x"], [" ", "x"]], "no_examples"),
        ([[f"film {i}", str(i)] for i in range(60)], "many_classes"),
        ([["film", "0.5"], ["good", "1"]], "wrong_task"),
    ],
)
def test_labels_that_cannot_be_used(tokenizer, tmp_path, rows, code):
    path = write(tmp_path / "a.csv", [["text", "label"], *rows])
    with pytest.raises(UserError) as error:
        prepare_examples(tmp_path / "c", labeled_texts(path), tokenizer, max_length=16)
    assert error.value.code == code


def test_bad_scores_are_named_with_their_lines(tmp_path):
    content = "a,b,4.8\nc,d,6.7\ne,f,abc\ng,h,nan\ni,,3.0\nk,l\nm,n,-inf\n"
    options = {"columns": ["sentence1", "sentence2", "score"], "low": 0, "high": 5}
    path = write(tmp_path / "a.csv", content)
    with pytest.raises(UserError) as error:
        list(scored_pairs(path, **options))
    assert error.value.code == "bad_record"
    assert [line.split(": ")[0] for line in error.value.problem.split("\n")] == [f"{path}:{n}" for n in (2, 3, 4, 6, 7)]
    source = scored_pairs(path, on_bad_record="skip", **options)
    assert [example.values for example in source] == [(0.96,)]
    assert sum(source.report.skipped.values()) == 6 and source.report.skipped[EMPTY_TEXT] == 1


def test_scores_must_be_as_many_as_passages(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"q": "a", "p": "b", "n": ["c"], "s": [1]}])
    with pytest.raises(UserError) as error:
        list(pairs(path, "q", "p", "n", "s"))
    assert error.value.code == "bad_record" and f"{path}:1" in error.value.problem


def test_a_column_of_negatives_that_no_record_has_is_an_error(tokenizer, tmp_path):
    source = pairs(write(tmp_path / "a.jsonl", [{"query": "a", "positive": "b"}]), negatives="negativ")
    assert [example.texts for example in source] == [("a", "b")]
    with pytest.raises(UserError) as error:
        prepare_examples(tmp_path / "c", source, tokenizer, max_length=16)
    assert (error.value.code, error.value.key) == ("no_negatives", "negatives")


def test_missing_columns_name_the_arguments(tmp_path):
    for name, rows in (("a.jsonl", [{"q": "a", "p": "b"}]), ("a.csv", [["q", "p"], ["a", "b"]])):
        with pytest.raises(UserError) as error:
            list(pairs(write(tmp_path / name, rows), "q"))
        assert (
            error.value.code == "bad_record" and "positive" in error.value.hint and "'positive'" in error.value.problem
        )
    with pytest.raises(UserError) as error:
        pairs(str(tmp_path / "a.csv"), columns=["q", "p"])
    assert (error.value.code, error.value.key) == ("invalid_value", "columns")


def test_arguments_that_do_not_go_together(tmp_path):
    text = write(tmp_path / "a.txt", "one\ntwo\n")
    for call, code, key in (
        (lambda: pairs(), "invalid_value", "path"),
        (lambda: pairs("a", dataset="b"), "invalid_value", "path"),
        (lambda: pairs(dataset=text), "invalid_value", "dataset"),
        (lambda: pairs(text), "no_columns", "path"),
        (lambda: scored_pairs(text, low=1), "invalid_value", "high"),
        (lambda: scored_pairs(text, low=5, high=0), "invalid_value", "high"),
        (lambda: raw_texts(text, max_examples=0), "invalid_value", "max_examples"),
        (lambda: raw_texts(text, on_bad_record="no"), "invalid_value", "on_bad_record"),
    ):
        with pytest.raises(UserError) as error:
            call()
        assert (error.value.code, error.value.key) == (code, key)
    assert [example.texts for example in raw_texts(text)] == [("one",), ("two",)]


def test_duplicates_and_contradictions_are_counted(tokenizer, tmp_path):
    rows = [("film", "a"), ("good film", "b"), ("film", "a"), ("film", "b"), ("bad", "b"), ("bad", "b")]
    path = write(tmp_path / "a.csv", [["text", "label"], *rows])
    corpus, _ = prepare_examples(tmp_path / "c", labeled_texts(path), tokenizer, max_length=16)
    assert (corpus.num_duplicates, corpus.num_conflicts) == (3, 1)
    assert "3 examples" in corpus.summary() and "1 of them have another label" in corpus.summary()


def test_a_split_by_passage_keeps_its_queries_together(tokenizer, tmp_path):
    rows = [{"query": f"film {i}", "positive": f"good {i % 20}"} for i in range(100)]
    source = pairs(write(tmp_path / "a.jsonl", rows))
    train, validation = prepare_examples(
        tmp_path / "c", source, tokenizer, max_length=16, validation_fraction=0.2, split_by="positive"
    )
    passages = [set(c.read(range(c.num_examples)).text_hashes[1::2]) for c in (train, validation)]
    assert not passages[0] & passages[1] and validation.num_examples == 20
    with pytest.raises(UserError) as error:
        prepare_examples(tmp_path / "d", source, tokenizer, max_length=16, validation_fraction=0.2, split_by="passage")
    assert (error.value.code, error.value.key) == ("invalid_value", "split_by")


def test_equal_texts_are_never_on_both_sides(tokenizer, tmp_path):
    rows = [["text", "label"], *([f"film {i % 7}", "ab"[i % 7 % 2]] for i in range(70))]
    source = labeled_texts(write(tmp_path / "a.csv", rows))
    train, validation = prepare_examples(tmp_path / "c", source, tokenizer, max_length=16, validation_fraction=0.3)
    sides = [set(c.read(range(c.num_examples)).text_hashes) for c in (train, validation)]
    assert not sides[0] & sides[1] and all(sides)
    same = [["text", "label"], *(["film", "ab"[i % 2]] for i in range(9))]
    with pytest.raises(UserError) as error:
        source = labeled_texts(write(tmp_path / "b.csv", same))
        prepare_examples(tmp_path / "d", source, tokenizer, max_length=16, validation_fraction=0.3)
    assert error.value.code == "one_example"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hugging_face_dataset_with_named_classes(tokenizer, tmp_path, streaming):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg"])})
    rows = {"text": [f"film {i}" for i in range(2500)], "label": [i % 2 for i in range(2500)]}
    datasets.Dataset.from_dict(rows, features).save_to_disk(str(tmp_path / "data"))
    source = labeled_texts(dataset=str(tmp_path / "data"), streaming=streaming)
    assert source.label_names == ["pos", "neg"]
    examples = list(source)
    assert len(examples) == 2500 and examples[3].texts == ("film 3",) and examples[3].label == 1
    reading = iter(source)
    for _ in range(1500):
        next(reading)
    assert list(source.read(json.loads(json.dumps(source.position())))) == examples[1500:]
    corpus, _ = prepare_examples(tmp_path / "c", source, tokenizer, max_length=16)
    assert corpus.label_names == ["pos", "neg"] and corpus.read([0, 1]).labels.tolist() == [0, 1]
    with pytest.raises(UserError) as error:
        labeled_texts(dataset=str(tmp_path / "data"), label="lable", streaming=streaming)
    assert (error.value.code, error.value.key) == ("no_such_column", "label")


SHARED = Path(os.environ.get("TORCHRECIPES_DATA", Path(__file__).parents[4] / "shared" / "data"))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")
def test_every_damaged_file_gives_examples_or_one_message(tokenizer, tmp_path):
    found = [path for path in sorted((SHARED / "bad").iterdir()) if path.is_file() and path.name != "README.md"]
    for number, path in enumerate(found):
        for how in ("stop", "skip"):
            for make in (labeled_texts, raw_texts):
                try:
                    source = make(str(path), on_bad_record=how)
                    prepare_examples(tmp_path / f"{number}{how}{make.__name__}", source, tokenizer, max_length=32)
                except UserError as error:
                    assert error.code
    assert len(found) > 40
