"""Datasets in local folders: the corpus is that of the same text in files."""

import json
import os

import numpy as np
import pytest

from torchrecipes.data.corpus.corpus import prepare_corpus
from torchrecipes.data.sources.hugging_face import hf_dataset
from torchrecipes.data.sources.text_files import files
from torchrecipes.data.tokenizers.load import train_bpe
from torchrecipes.errors import UserError

library = pytest.importorskip("datasets")
constants = pytest.importorskip("huggingface_hub.constants")
TEXTS = [f"Document {i}: " + "all of it is text\r\nof two lines. " * (i % 7 + 1) for i in range(300)]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(library.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets_cache")


@pytest.fixture
def folders(tmp_path):
    """The same rows as `save_to_disk` writes them, in both of its forms, and as Parquet and JSON lines."""
    rows = library.Dataset.from_dict({"number": list(range(len(TEXTS))), "text": TEXTS})
    rows.save_to_disk(tmp_path / "one")
    library.DatasetDict({"train": rows, "test": rows.select(range(5))}).save_to_disk(tmp_path / "several")
    (tmp_path / "parquet").mkdir()
    rows.to_parquet(tmp_path / "parquet" / "train.parquet")
    (tmp_path / "lines").mkdir()
    with (tmp_path / "lines" / "train.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS)
    return tmp_path


def texts(source):
    return [document.text for document in source]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["one", "several", "parquet"])
def test_the_corpus_is_that_of_files(folders, kind, streaming):
    source = hf_dataset(str(folders / kind), streaming=streaming)
    expected = files(str(folders / "lines"))
    assert texts(source) == texts(expected)
    tokenizer = train_bpe(expected, vocab_size=300, causal=True)
    made, wanted = (
        prepare_corpus(folders / name, each, tokenizer, validation_fraction=0, tokenizer_threads=2)[0]
        for name, each in (("made", source), ("wanted", expected))
    )
    assert made.num_tokens == wanted.num_tokens and made.num_documents == wanted.num_documents
    assert np.array_equal(made.read(0, made.num_tokens), wanted.read(0, wanted.num_tokens))
    assert np.array_equal(made.boundaries(0, made.num_tokens), wanted.boundaries(0, wanted.num_tokens))


def test_a_split_and_the_first_rows(folders):
    assert len(texts(hf_dataset(str(folders / "several"), split="test"))) == 5
    for streaming in (False, True):
        assert texts(hf_dataset(str(folders / "one"), max_documents=3, streaming=streaming)) == [
            text.replace("\r\n", "\n") for text in TEXTS[:3]
        ]


def test_long_texts_are_cut_and_bad_rows_counted(tmp_path):
    library.Dataset.from_dict({"text": ["a " * 150, None, "", "b"]}).save_to_disk(tmp_path / "rows")
    source = hf_dataset(str(tmp_path / "rows"), max_document_chars=100, on_bad_record="skip")
    assert "".join(texts(source)) == "a " * 150 + "b" and len(texts(source)) == 4
    assert sum(source.report.skipped.values()) == 2
    with pytest.raises(UserError) as error:
        texts(hf_dataset(str(tmp_path / "rows")))
    assert error.value.code == "bad_record" and "rows, train:2" in str(error.value)


def test_the_fingerprint_is_that_of_content_and_options(folders):
    folder = str(folders / "one")
    assert hf_dataset(folder).fingerprint == hf_dataset(folder).fingerprint
    others = [hf_dataset(folder, max_documents=5), hf_dataset(folder, max_document_chars=100)]
    assert len({hf_dataset(folder).fingerprint, *(other.fingerprint for other in others)}) == 3
    same = [hf_dataset(folder, on_bad_record="skip"), hf_dataset(folder, streaming=True)]
    assert {other.fingerprint for other in same} == {hf_dataset(folder).fingerprint}
    for file in (folders / "one").iterdir():
        os.utime(file, ns=(1, 1))
    assert hf_dataset(folder).fingerprint == same[0].fingerprint, "touched"
    (folders / "one").rename(folders / "moved")
    assert hf_dataset(str(folders / "moved")).fingerprint == same[0].fingerprint
    (folders / "moved").rename(folders / "one")
    library.Dataset.from_dict({"text": TEXTS[:5]}).save_to_disk(folders / "parquet" / "deeper")
    before = hf_dataset(folder).fingerprint
    library.Dataset.from_dict({"text": TEXTS[:9]}).save_to_disk(folder)
    assert hf_dataset(folder).fingerprint != before


def test_a_slice_of_a_split_where_there_are_slices(folders):
    assert len(texts(hf_dataset(str(folders / "parquet"), split="train[:10%]"))) == 30


def test_nothing_is_held_while_streaming(folders):
    stream = iter(hf_dataset(str(folders / "parquet"), streaming=True))
    assert next(stream).text.startswith("Document 0")


@pytest.mark.parametrize(
    ("kind", "settings", "code", "key", "words"),
    [
        ("several", {"split": "tets"}, "no_such_split", "split", "test"),
        ("one", {"text_column": "txt"}, "no_such_column", "text_column", "'text'"),
        ("one", {"on_bad_record": "ignore"}, "invalid_value", "on_bad_record", "stop"),
        ("one", {"max_documents": 0}, "invalid_value", "max_documents", "0"),
        ("one", {"max_document_chars": 9}, "invalid_value", "max_document_chars", "9"),
        ("nowhere", {}, None, "name", "nowhere"),
        ("parquet", {"split": "test"}, "no_such_split", "split", "test"),
        ("parquet", {"split": "train[:9]", "streaming": True}, "invalid_value", "split", "max_documents"),
        ("parquet/train.parquet", {}, "invalid_value", "name", "sources.files"),
        ("one", {"split": "test"}, "invalid_value", "split", "test"),
        ("one", {"split": "train[:10%]"}, "invalid_value", "split", "max_documents"),
        ("several", {"split": "train[:10%]"}, "invalid_value", "split", "max_documents"),
        ("one", {"config": "x", "revision": "y"}, "invalid_value", "config", "config, revision"),
        ("several", {"data_files": "*.arrow"}, "invalid_value", "data_files", "save_to_disk"),
    ],
)
def test_wrong_input_is_one_message(folders, kind, settings, code, key, words):
    with pytest.raises(UserError) as found:
        hf_dataset(str(folders / kind), **settings)
    assert found.value.key == key and code in (found.value.code, None) and words in str(found.value)
    assert len(str(found.value).splitlines()) == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_files_with_other_columns_are_one_message_with_the_source_that_reads_them(tmp_path, streaming):
    folder = tmp_path / "mixed"
    folder.mkdir()
    more = {"a": {"id": 1}, "b": {"url": "u", "meta": {"a": 1}}}
    for name, keys in more.items():
        rows = (json.dumps({"text": f"{name} {i}"} | keys) + "\n" for i in range(300))
        (folder / f"{name}.jsonl").write_text("".join(rows))
    with pytest.raises(UserError) as error:
        list(hf_dataset(str(folder), streaming=streaming))
    assert error.value.code == "unreadable_dataset" and f"sources.files path={folder}" in error.value.hint
    assert len(texts(files(str(folder)))) == 600


def test_a_corrupt_file_is_one_message(folders):
    whole = (folders / "parquet" / "train.parquet").read_bytes()
    for content in (b"not parquet", whole[:-30], whole[:200] + bytes(400) + whole[600:]):
        (folders / "parquet" / "train.parquet").write_bytes(content)
        for streaming in (False, True):
            with pytest.raises(UserError) as error:
                list(hf_dataset(str(folders / "parquet"), streaming=streaming))
            assert error.value.code == "unreadable_dataset"


def test_a_name_on_the_hub_without_a_network_says_how_to_get_it():
    with pytest.raises(UserError) as error:
        hf_dataset("someone/something")
    assert error.value.code == "no_such_dataset"
    assert "hf download --repo-type dataset someone/something --local-dir my_data" in error.value.hint
