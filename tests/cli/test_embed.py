import gzip
import io
import json

import numpy as np
import pytest

from torchrecipes.cli.main import main
from torchrecipes.data.sources import Document
from torchrecipes.data.tokenizers import train_wordpiece
from torchrecipes.evaluation import TextEncoder
from torchrecipes.models import EmbeddingModel, bert, gpt2, load_embedding_model, save_hf

TEXTS = ["a cat sat on a mat", "", "two birds", "the cat saw the birds in the tree by the sea", "a"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    tokenizer = train_wordpiece([Document(" ".join(TEXTS) * 3, "here")], vocab_size=80)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    encoder = bert(vocab_size=tokenizer.vocab_size, **sizes, max_position_embeddings=32, initializer_range=0.3)
    save_hf(EmbeddingModel(encoder, prompts={"query": "the "}), folder, tokenizer)
    return folder, tokenizer


def expected(run, prompt=""):
    folder, tokenizer = run
    return TextEncoder(load_embedding_model(folder, report=lambda line: None), tokenizer).encode(TEXTS, prompt)


def write(folder, kind):
    """The texts in a file of some kind, and further arguments to read it."""
    file = folder / f"texts.{kind}"
    if kind in ("txt", "txt.gz"):
        content = "\r\n".join(TEXTS).encode()
        file.write_bytes(gzip.compress(content) if kind == "txt.gz" else content)
    elif kind == "jsonl":
        rows = [{"text": text} for text in TEXTS]
        rows[1] = {"text": None}
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        file.write_text("id,body\n" + "".join(f'{number},"{text}"\n' for number, text in enumerate(TEXTS)))
        return file, ["--text-column", "body"]
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": TEXTS}), file)
    return file, []


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl", "csv", "parquet"])
def test_every_row_of_a_file_has_a_row_of_embeddings(tmp_path, run, kind, capsys):
    file, arguments = write(tmp_path, kind)
    output = tmp_path / "out.npy"
    command = ["embed", str(run[0]), "--input", str(file), "-o", str(output), "--prompt", "query", *arguments]
    assert main([*command, "--device", "cpu", "--precision", "fp32"]) == 0
    found = np.load(output, mmap_mode="r")
    assert found.dtype == np.float32 and np.abs(found - expected(run, "query")).max() <= 1e-6
    shown = capsys.readouterr()
    assert "5 texts" in shown.out and "1 text was empty" in shown.err
    assert [path.name for path in tmp_path.glob(".*")] == []


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_standard_input_and_files_that_hold_the_texts(tmp_path, run, monkeypatch, suffix):
    lines = "\n".join(TEXTS).encode() + b"\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
    output = tmp_path / f"out.{suffix}"
    assert main(["embed", str(run[0]), "-i", "-", "-o", str(output), "--dim", "5", "--max-length", "6"]) == 0
    if suffix == "jsonl":
        rows = [json.loads(line) for line in output.read_text().splitlines()]
    else:
        from pyarrow import parquet

        rows = parquet.read_table(output).to_pylist()
    assert [row["text"] for row in rows] == TEXTS
    found = np.array([row["embedding"] for row in rows], np.float32)
    whole = expected(run)[[0, 2, 4], :5]  # the short ones
    short = found[[0, 2, 4]]
    assert np.abs(np.linalg.norm(found, axis=1) - 1).max() <= 1e-5
    assert np.abs(short[1:] - (whole / np.linalg.norm(whole, axis=1, keepdims=True))[1:]).max() <= 1e-5


def test_texts_as_arguments_are_printed(run, capsys):
    assert main(["embed", str(run[0]), *[text for text in TEXTS if text], "--prompt", "query"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == [text for text in TEXTS if text]
    found = np.array([row["embedding"] for row in rows], np.float32)
    assert np.abs(found - expected(run, "query")[[0, 2, 3, 4]]).max() <= 1e-6


def test_a_file_with_no_texts_gives_no_rows(tmp_path, run):
    (tmp_path / "empty.jsonl").write_text("\n")
    assert main(["embed", str(run[0]), "-i", str(tmp_path / "empty.jsonl"), "-o", str(tmp_path / "out.npy")]) == 0
    assert np.load(tmp_path / "out.npy").shape == (0, 16)


def test_the_folder_of_the_output_is_made(tmp_path, run):
    output = tmp_path / "new" / "folder" / "out.npy"
    assert main(["embed", str(run[0]), "a text", "-o", str(output)]) == 0
    assert np.load(output).shape == (1, 16)


def test_a_closed_standard_input_is_a_mistake(tmp_path, run, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", None)  # Python's, where the shell has closed it
    assert main(["embed", str(run[0]), "-i", "-", "-o", str(tmp_path / "out.npy")]) == 2
    assert "--input" in capsys.readouterr().err


def test_mistakes(tmp_path, run, capsys):
    folder = str(run[0])
    file, _ = write(tmp_path, "jsonl")
    (tmp_path / "bad.jsonl").write_text('{"text": 5}\n')
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    save_hf(gpt2(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2), tmp_path / "gpt2")
    output = ["-o", str(tmp_path / "out.npy")]
    for arguments, words in (
        ([folder], "--input"),
        ([folder, "a text", "--input", str(file)], "--input"),
        ([folder, "--input", str(file)], "--output"),
        ([folder, "--input", str(file), "-o", "x.txt"], "--output"),
        ([folder, "--input", str(tmp_path / "none.txt"), *output], "--input"),
        ([folder, "--input", str(tmp_path / "bad.jsonl"), *output], "bad.jsonl:1"),
        ([folder, "--input", str(tmp_path / "latin.txt"), *output], "latin.txt:1"),
        ([folder, "a", "--prompt", "title"], "--prompt"),
        ([folder, "a", "--dim", "17"], "--dim"),
        ([folder, "a", "--dim", "0"], "--dim"),
        ([folder, "a", "--max-length", "33"], "--max-length"),
        ([str(tmp_path / "gpt2"), "a"], "decoder"),
    ):
        assert main(["embed", *arguments]) == 2, arguments
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out.npy").exists() and not list(tmp_path.glob(".*"))
    (tmp_path / "other.jsonl").write_text('{"body": "a"}\n' * 9)
    assert main(["embed", folder, "--input", str(tmp_path / "other.jsonl"), *output]) == 2
    printed = capsys.readouterr().err
    assert "--text-column" in printed and "on_bad_record" not in printed  # which this verb does not have
    assert printed.count("no key 'text'") == 1 and "8 more" in printed


def test_a_folder_with_its_pooling_reports_nothing(run, capsys):
    assert main(["embed", str(run[0]), "a text"]) == 0
    assert not capsys.readouterr().err
