"""Datasets in local folders: the corpus is that of the same text in files."""

import json

import numpy as np
import pytest

from torchrecipes.data.corpus.corpus import prepare_corpus
from torchrecipes.data.sources.hugging_face import DatasetSource, hf_dataset
from torchrecipes.data.sources.text_files import files
from torchrecipes.data.tokenizers.load import train_bpe
from torchrecipes.errors import UserError

library = pytest.importorskip("datasets")
TEXTS = [f"Document {i}: " + "all of it is text\r\nof two lines. " * (i % 7 + 1) for i in range(300)]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(library.config, "HF_DATASETS_OFFLINE", True)
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
        prepare_corpus(folders / name, each, tokenizer, validation_fraction=0, num_workers=2)[0]
        for name, each in (("made", source), ("wanted", expected))
    )
    assert made.num_tokens == wanted.num_tokens and made.num_documents == wanted.num_documents
    assert np.array_equal(made.read(0, made.num_tokens), wanted.read(0, wanted.num_tokens))
    assert np.array_equal(made.boundaries(0, made.num_tokens), wanted.boundaries(0, wanted.num_tokens))


def test_parts_are_the_whole_in_order(folders, monkeypatch):
    monkeypatch.setattr("torchrecipes.data.sources.hugging_face.PART", 64)
    source = hf_dataset(str(folders / "one"))
    parts = source.parts()
    assert [part.stop - part.start for part in parts] == [64, 64, 64, 64, 44]
    assert [text for part in parts for text in texts(part)] == texts(source)
    assert next(iter(parts[1])).source == f"{folders / 'one'}, train:65"


def test_a_split_and_the_first_rows(folders):
    assert len(texts(hf_dataset(str(folders / "several"), split="test"))) == 5
    for streaming in (False, True):
        assert texts(hf_dataset(str(folders / "one"), max_documents=3, streaming=streaming)) == [
            text.replace("\r\n", "\n") for text in TEXTS[:3]
        ]


def test_long_texts_are_cut_and_bad_rows_told(tmp_path):
    library.Dataset.from_dict({"text": ["a " * 150, None, "", "b"]}).save_to_disk(tmp_path / "rows")
    source = hf_dataset(str(tmp_path / "rows"), max_document_chars=100, on_bad_record="skip")
    assert "".join(texts(source)) == "a " * 150 + "b" and len(texts(source)) == 4
    assert sum(source.report.skipped.values()) == 2
    with pytest.raises(UserError, match="rows, train:2"):
        texts(hf_dataset(str(tmp_path / "rows")))


def test_the_fingerprint_is_that_of_content_and_options(folders):
    folder = str(folders / "one")
    assert hf_dataset(folder).fingerprint == hf_dataset(folder).fingerprint
    others = [hf_dataset(folder, max_documents=5), hf_dataset(folder, max_document_chars=100)]
    others.append(hf_dataset(folder, on_bad_record="skip"))
    assert len({hf_dataset(folder).fingerprint, *(other.fingerprint for other in others)}) == 4
    library.Dataset.from_dict({"text": TEXTS[:5]}).save_to_disk(folders / "parquet" / "deeper")
    before = hf_dataset(folder).fingerprint
    library.Dataset.from_dict({"text": TEXTS[:9]}).save_to_disk(folder)
    assert hf_dataset(folder).fingerprint != before


def test_a_slice_of_a_split_where_there_are_slices(folders):
    assert len(texts(hf_dataset(str(folders / "parquet"), split="train[:10%]"))) == 30


def test_nothing_is_held_while_streaming(folders):
    stream = iter(hf_dataset(str(folders / "parquet"), streaming=True))
    assert next(stream).text.startswith("Document 0") and isinstance(hf_dataset(str(folders / "one")), DatasetSource)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("several", {"split": "tets"}, "no split 'tets': did you mean test?"),
        ("one", {"text_column": "txt"}, "no column 'txt'; did you mean text?"),
        ("one", {"on_bad_record": "ignore"}, "on_bad_record is 'ignore'; it is one of stop, skip"),
        ("one", {"max_documents": 0}, "max_documents is 0"),
        ("one", {"max_document_chars": 9}, "the least is 100"),
        ("nowhere", {}, "cannot be (had|read)"),
        ("parquet", {"split": "test"}, "no split 'test'"),
        ("parquet", {"split": "train[:9]", "streaming": True}, "slice, which streaming=true has not: .*max_documents"),
        ("parquet/train.parquet", {}, "is a file. Give its folder, .*/parquet, or read .*sources.files data.source.pa"),
        ("one", {"split": "test"}, "split: .*/one holds one dataset without splits, so no 'test' either"),
        ("one", {"split": "train[:10%]"}, "split: .* no slice is read: .* set data.source.max_documents"),
        ("several", {"split": "train[:10%]"}, "split: .* no slice is read: .* set data.source.max_documents"),
        ("one", {"config": "x", "revision": "y"}, "^data.source.config, data.source.revision: .*save_to_disk.* Remove"),
        ("several", {"data_files": "*.arrow"}, "^data.source.data_files: .*save_to_disk"),
    ],
)
def test_wrong_input_is_one_message(folders, kind, settings, message):
    with pytest.raises(UserError, match=message) as found:
        hf_dataset(str(folders / kind), **settings)
    assert len(str(found.value).splitlines()) == 1


def test_a_name_on_the_hub_without_a_network_says_how_to_get_it():
    with pytest.raises(UserError, match=r"hf download --repo-type dataset someone/something --local-dir my_data"):
        hf_dataset("someone/something")
