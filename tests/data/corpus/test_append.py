"""Adding text to a corpus, and joining the parts of a job array."""

import json
import pickle

import numpy as np
import pytest
import xxhash

from torchrecipes.data.corpus import append, append_to_corpus, merge_parts, open_corpus, part_folder, prepare_corpus
from torchrecipes.data.sources import SourcePart
from torchrecipes.data.sources.records import Document, ReadStats
from torchrecipes.data.tokenizers import train_char
from torchrecipes.errors import UserError

FRACTION = 0.2


class Texts(list):
    def __init__(self, texts):
        super().__init__(Document(text, "here") for text in texts)
        self.name, self.num_bytes, self.report = "texts", 0, ReadStats(documents=len(self))
        self.fingerprint = xxhash.xxh3_128_hexdigest(repr(self).encode())


OLD = Texts(f"document number {i}" for i in range(60))
NEW = Texts(f"another text, its number is {i}" for i in range(40))
MORE = Texts(f"and more: {i}" for i in range(30))
TOKENIZER = train_char(Texts(document.text for source in (OLD, NEW, MORE) for document in source))


def held_out(text):
    return xxhash.xxh3_64_intdigest(text.encode()) < FRACTION * 2**64


def texts_of(corpus):
    starts, stops = corpus.spans(np.arange(corpus.num_documents))
    documents = (corpus.read(a, b)[1:-1] for a, b in zip(starts, stops, strict=True))
    return [TOKENIZER.decode(document.tolist()) for document in documents]


def made(folder, source=OLD, fraction=FRACTION, tokenizer=TOKENIZER, shard_tokens=200):
    return prepare_corpus(folder, source, tokenizer, fraction, shard_tokens=shard_tokens, tokenizer_threads=0)


def splits(folder):
    return {split: open_corpus(folder / split) for split in ("train", "validation")}


def content(folder):
    return {split: texts_of(corpus) for split, corpus in splits(folder).items()}


def expected(*sources):
    documents = [document.text for source in sources for document in source]
    return {
        "train": [text for text in documents if not held_out(text)],
        "validation": [text for text in documents if held_out(text)],
    }


def test_documents_are_added_to_both_splits_and_the_lineage_is_recorded(tmp_path):
    old = made(tmp_path)
    before = [corpus.fingerprint for corpus in old]
    records = append_to_corpus(tmp_path, NEW, TOKENIZER, tokenizer_threads=0)
    append_to_corpus(tmp_path, MORE, TOKENIZER, tokenizer_threads=0)
    assert content(tmp_path) == expected(OLD, NEW, MORE)
    assert not list(tmp_path.glob("addition-*"))
    train, validation = splits(tmp_path).values()
    for corpus, first, was in zip((train, validation), before, old, strict=True):
        corpus.verify()
        assert corpus.lineage[0] == first and len(set(corpus.lineage)) == 3
        assert corpus.lineage[-1] == corpus.fingerprint
        assert [addition["source"] for addition in corpus.additions] == [NEW.fingerprint, MORE.fingerprint]
        past = pickle.loads(pickle.dumps(corpus.before_additions(first)))
        assert texts_of(past) == texts_of(was) and past.statistics == was.statistics and past.fingerprint == first
    assert records["train"]["documents"] + records["validation"]["documents"] == len(NEW)
    assert records["train"]["documents"] == train.additions[0]["documents"]
    # What a run would call: the corpus is still that of its source.
    assert made(tmp_path)[0].fingerprint == train.fingerprint


def test_without_held_out_documents_everything_is_for_training(tmp_path):
    made(tmp_path, fraction=0)
    append_to_corpus(tmp_path, NEW, TOKENIZER)
    assert texts_of(open_corpus(tmp_path / "train")) == [document.text for source in (OLD, NEW) for document in source]
    assert not (tmp_path / "validation").exists()


def test_an_addition_may_hold_out_nothing(tmp_path):
    made(tmp_path)
    text = next(document.text for document in NEW if not held_out(document.text))
    records = append_to_corpus(tmp_path, Texts([text]), TOKENIZER)
    assert records["validation"]["documents"] == 0
    assert content(tmp_path)["train"][-1] == text
    assert content(tmp_path)["validation"] == expected(OLD)["validation"]


def test_the_same_text_is_refused_unless_asked_for(tmp_path):
    made(tmp_path)
    append_to_corpus(tmp_path, NEW, TOKENIZER)
    for source in (OLD, NEW):
        with pytest.raises(UserError) as caught:
            append_to_corpus(tmp_path, source, TOKENIZER)
        assert caught.value.code == "duplicate_addition"
    append_to_corpus(tmp_path, NEW, TOKENIZER, again=True)
    append_to_corpus(tmp_path, NEW, TOKENIZER, again=True)
    assert content(tmp_path) == expected(OLD, NEW, NEW, NEW)


def test_another_tokenizer_is_refused(tmp_path):
    made(tmp_path)
    files = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        append_to_corpus(tmp_path, NEW, train_char(Texts(["abc"])))
    assert caught.value.code == "other_tokenizer"
    assert [path for path in sorted(tmp_path.rglob("*")) if path.name != ".lock"] == [
        path for path in files if path.name != ".lock"
    ]


@pytest.mark.parametrize("where", [".", "train", "nothing"])
def test_what_is_no_corpus_is_refused(tmp_path, where):
    if where == "train":
        made(tmp_path)
    else:
        (tmp_path / where).mkdir(exist_ok=True)
    with pytest.raises(UserError) as caught:
        append_to_corpus(tmp_path / where, NEW, TOKENIZER)
    assert caught.value.code == "no_corpus"


class Killed(BaseException):
    pass


def test_killed_at_any_write_the_corpus_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    """Every link, write and removal in turn is the one that does not happen."""
    calls = 0

    def dying(function, at):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == at:
                raise Killed
            return function(*args, **kwargs)

        return call

    outcomes = set()
    for at in range(1, 100):
        folder, calls = tmp_path / str(at), 0
        made(folder)
        with monkeypatch.context() as patch:
            patch.setattr(append, "write_atomically", dying(append.write_atomically, at))
            patch.setattr(append.os, "link", dying(append.os.link, at))
            patch.setattr(append.shutil, "rmtree", dying(append.shutil.rmtree, at))
            patch.setattr(append, "prepare_corpus", dying(append.prepare_corpus, at))
            try:
                append_to_corpus(folder, NEW, TOKENIZER, tokenizer_threads=0)
                break
            except Killed:
                pass
        found = content(folder)
        assert found in (expected(OLD), expected(OLD, NEW))
        outcomes.add(found == expected(OLD))
        made(folder)  # a run opens it
        records = append_to_corpus(folder, NEW, TOKENIZER, tokenizer_threads=0)
        assert records["train"]["source"] == NEW.fingerprint
        assert content(folder) == expected(OLD, NEW)
        for corpus in splits(folder).values():
            corpus.verify()
            assert len(corpus.additions) == 1
        assert not (folder / "pending.json").exists()
    assert outcomes == {True, False} and at > 8


def test_a_file_system_without_links_gets_copies(tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError

    made(tmp_path)
    monkeypatch.setattr(append.os, "link", refuse)
    append_to_corpus(tmp_path, NEW, TOKENIZER)
    assert content(tmp_path) == expected(OLD, NEW)


def make_parts(folder, count=3, source=OLD, **settings):
    for index in range(count):
        made(part_folder(folder, index, count), SourcePart(source, index, count), **settings)


def test_parts_join_to_the_corpus_of_the_whole_source(tmp_path):
    make_parts(tmp_path / "parts of")
    train, validation = merge_parts(tmp_path / "parts of")
    whole = made(tmp_path / "whole")
    assert sorted(texts_of(train)) == sorted(texts_of(whole[0]))
    assert sorted(texts_of(validation)) == sorted(texts_of(whole[1]))
    for corpus, other in zip((train, validation), whole, strict=True):
        corpus.verify()
        assert corpus.statistics == other.statistics
    # A run with this source opens it, and an addition of the same text is recognized.
    assert made(tmp_path / "parts of")[0].fingerprint == train.fingerprint
    with pytest.raises(UserError) as caught:
        append_to_corpus(tmp_path / "parts of", OLD, TOKENIZER)
    assert caught.value.code == "duplicate_addition"
    assert not (tmp_path / "parts of" / "parts").exists()


def test_parts_that_are_missing_unfinished_or_different_are_refused(tmp_path):
    with pytest.raises(UserError) as caught:
        merge_parts(tmp_path)
    assert caught.value.code == "missing_part"
    make_parts(tmp_path)
    account = part_folder(tmp_path, 1, 3) / "train" / "corpus.json"
    kept = account.read_bytes()
    account.unlink()
    with pytest.raises(UserError) as caught:
        merge_parts(tmp_path)
    assert caught.value.code == "missing_part" and "00001-of-00003" in caught.value.problem
    account.write_bytes(kept)
    settings = part_folder(tmp_path, 2, 3) / "prepare.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer": "another"}))
    with pytest.raises(UserError) as caught:
        merge_parts(tmp_path)
    assert caught.value.code == "other_corpus" and "tokenizer" in caught.value.problem
    made(part_folder(tmp_path, 0, 2), SourcePart(OLD, 0, 2))
    with pytest.raises(UserError) as caught:
        merge_parts(tmp_path)
    assert caught.value.code == "other_corpus"
