import csv
import io
import json

import pytest

from tests.evaluation.classifiers import saved_classifier, texts_of
from torchrecipes.cli.main import main
from torchrecipes.data.tokenizers import load_tokenizer
from torchrecipes.evaluation import TextClassifier
from torchrecipes.models import bert, gpt2, load_classifier, save_hf

TEXTS = [*texts_of(6), "", "the big red dog"]
NAMES = ["bad", "fair", "good"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    saved_classifier(folder)
    return folder


def expected(folder, texts=TEXTS):
    classify = TextClassifier(load_classifier(folder), load_tokenizer(folder, pad_vocab_to_multiple_of=1))
    return classify.predict(texts)


def write(folder, kind):
    """The texts in a file of some kind, and further arguments to read it."""
    file = folder / f"texts.{kind}"
    if kind == "txt":
        file.write_text("\n".join(TEXTS) + "\n")
    elif kind == "jsonl":
        file.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
        return file, ["--text-column", "body"]
    elif kind == "csv":
        file.write_text("id,text\n" + "".join(f'{number},"{text}"\n' for number, text in enumerate(TEXTS)))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": TEXTS}), file)
    return file, []


def assert_same(records, predictions, texts=TEXTS):
    for record, prediction, text in zip(records, predictions, texts, strict=True):
        assert record["text"] == text
        if not text:
            assert record["label"] is None and record["probabilities"] is None
            continue
        assert record["label"] == prediction.labels[0]
        found = record["probabilities"]
        assert next(iter(found)) == record["label"]  # the most probable one first
        assert [found[name] for name in NAMES] == pytest.approx(prediction.scores.tolist(), abs=1e-6)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet"])
def test_every_row_of_a_file_has_a_prediction(tmp_path, run, kind, capsys):
    file, arguments = write(tmp_path, kind)
    output = tmp_path / "out.jsonl"
    assert main(["predict", str(run), "--input", str(file), "--output", str(output), *arguments]) == 0
    assert_same([json.loads(line) for line in output.read_text().splitlines()], expected(run))
    shown = capsys.readouterr()
    assert shown.out == "" and "8 predictions" in shown.err and "1 text was empty" in shown.err


def test_a_table(tmp_path, run):
    file, _ = write(tmp_path, "txt")
    output = tmp_path / "new" / "out.csv"
    assert main(["predict", str(run), "-i", str(file), "-o", str(output)]) == 0
    rows = list(csv.DictReader(output.open()))
    assert list(rows[0]) == ["text", "label", *NAMES] and [row["text"] for row in rows] == TEXTS
    for row, prediction, text in zip(rows, expected(run), TEXTS, strict=True):
        assert row["label"] == "".join(prediction.labels)
        if text:
            assert [float(row[name]) for name in NAMES] == pytest.approx(prediction.scores.tolist(), abs=1e-6)
    assert rows[6]["good"] == ""
    assert main(["predict", str(run), "-i", str(file), "-o", str(output), "--top-k", "1"]) == 0
    row = next(iter(csv.DictReader(output.open())))
    assert [row[name] != "" for name in NAMES] == [name == row["label"] for name in NAMES]


def test_standard_input_and_output(run, monkeypatch, capsys):
    lines = [text.encode() for text in TEXTS]
    lines.insert(3, b"\xff\xfe not text")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\r\n".join(lines))))
    assert main(["predict", str(run), "--input", "-"]) == 0
    shown = capsys.readouterr()
    texts = [*TEXTS[:3], "", *TEXTS[3:]]
    assert_same([json.loads(line) for line in shown.out.splitlines()], expected(run, texts), texts)
    assert "standard input:4" in shown.err and "1 text was empty" in shown.err


def test_texts_on_the_command_line(run, capsys):
    assert main(["predict", str(run), "the cat", " ", "--top-k", "2"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    (prediction,) = expected(run, ["the cat"])
    assert lines[0] == "the cat" and len([line for line in lines if "%" in line]) == 2
    assert lines[1].split()[:3] == ["*", f"{prediction.scores.max():.2%}", prediction.labels[0]]
    assert "no label" in lines[-1]


def test_several_labels_use_their_thresholds(tmp_path, capsys):
    for thresholds in ([0.0, 1.0, 0.0], [1.0, 0.0, 1.0]):
        saved_classifier(tmp_path, task="multi_label", calibration={"thresholds": thresholds})
        assert main(["predict", str(tmp_path), "-i", str(write(tmp_path, "txt")[0])]) == 0
        records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        names = [name for name, limit in zip(NAMES, thresholds, strict=True) if limit == 0]
        assert records[0]["labels"] == names and records[6]["labels"] is None
        scores, expected_scores = records[0]["probabilities"], expected(tmp_path)[0].scores
        assert [scores[name] for name in NAMES] == pytest.approx(expected_scores.tolist(), abs=1e-6)


def test_pairs_and_numbers(tmp_path, capsys):
    saved_classifier(tmp_path / "run", num_labels=1, label_names=None, task="regression")
    pairs = list(zip(texts_of(5), texts_of(5, seed=1), strict=True))
    file = tmp_path / "pairs.jsonl"
    rows = [{"q": one, "d": two} for one, two in pairs] + [{"q": "the cat", "d": ""}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["predict", str(tmp_path / "run"), "-i", str(file), "--text-column", "q", "--text-pair-column", "d"]
    assert main(command) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = expected(tmp_path / "run", pairs)
    assert [record["score"] for record in records[:5]] == pytest.approx([float(x.scores[0]) for x in found], abs=1e-6)
    assert records[5] == {"text": "the cat", "text_pair": "", "score": None}
    assert main([*command, "-o", str(tmp_path / "out.csv")]) == 0
    table = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert [row["text_pair"] for row in table[:5]] == [two for _, two in pairs]
    assert [float(row["score"]) for row in table[:5]] == [record["score"] for record in records[:5]]
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "run"), pairs[0][0], "--pair", pairs[0][1]]) == 0
    assert f"{found[0].scores[0]:.4f}" in capsys.readouterr().out


def test_what_is_cut_is_said(run, capsys):
    assert main(["predict", str(run), "the cat sat on the mat", "the", "--max-length", "5"]) == 0
    assert "1 text was longer than 5 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["a", "--input", "x.txt"],
        ["--input", "missing.txt"],
        ["a", "--top-k", "0"],
        ["a", "--max-length", "33"],
        ["a", "--output", "out.npy"],
        ["a", "--text-pair-column", "b"],
        ["--input", "-", "--pair", "b"],
        ["--input", "-", "--text-pair-column", "b"],
    ],
)
def test_wrong_arguments(run, arguments, capsys):
    assert main(["predict", str(run), *arguments]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize(("kind", "said"), [("encoder", "has no classifier"), ("decoder", "is a decoder")])
def test_a_model_that_classifies_nothing(tmp_path, kind, said, capsys):
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    save_hf(bert(**sizes, intermediate_size=24) if kind == "encoder" else gpt2(**sizes), tmp_path)
    assert main(["predict", str(tmp_path), "a"]) == 2
    assert said in capsys.readouterr().err
