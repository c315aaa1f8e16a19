"""The steps for datatrove give what our own tools give."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from torchrecipes.data import load_tokenizer, prepare_corpus
from torchrecipes.data.cleaning import clean, read_steps
from torchrecipes.data.corpus import open_corpus
from torchrecipes.data.datatrove_pipeline import (
    CleanDocuments,
    CleanStage,
    MergeCorpus,
    ReadDocuments,
    WriteCorpus,
)
from torchrecipes.data.sources import files
from torchrecipes.data.tokenizers import train_bpe
from torchrecipes.errors import UserError

local = pytest.importorskip("datatrove.executor.local", reason="pip install 'torchrecipes[corpus]'")


@pytest.fixture
def texts(tmp_path):
    """Five files of JSON lines, and a tokenizer of them."""
    (tmp_path / "texts").mkdir()
    for name in range(5):
        rows = [{"text": f"document {number} of file {name}, " * (1 + number % 7)} for number in range(40)]
        path = tmp_path / "texts" / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_bpe(files(str(tmp_path / "texts")), vocab_size=300, causal=True).save(tmp_path / "tokenizer")
    return tmp_path / "texts"


def run(pipeline, folder, tasks, depends=None):
    """In this process: the executor's pool of other processes takes seconds to start."""
    executor = local.LocalPipelineExecutor(pipeline, tasks, 1, str(folder / f"logs{tasks}"), depends=depends)
    executor.run()
    return executor


def tokens(corpus):
    return np.array(corpus.read(0, corpus.num_tokens))


def test_two_tasks_give_the_corpus_of_one_process(texts, tmp_path):
    source = files(str(texts))
    write = WriteCorpus(tmp_path / "corpus", tmp_path / "tokenizer", causal=True, source=source, validation_fraction=0)
    first = run([ReadDocuments(source), write], tmp_path, 2)
    run([MergeCorpus(tmp_path / "corpus")], tmp_path, 1, first)
    tokenizer = load_tokenizer(tmp_path / "tokenizer", causal=True)
    merged = open_corpus(tmp_path / "corpus" / "train", tokenizer)
    merged.verify()
    own, _ = prepare_corpus(tmp_path / "own", source, tokenizer, 0)
    assert (merged.num_documents, len(merged.shards)) == (200, 2)
    assert np.array_equal(tokens(merged), tokens(own))
    assert np.array_equal(merged.boundaries(0, merged.num_tokens), own.boundaries(0, own.num_tokens))
    # A run with this source opens it instead of tokenizing again.
    opened, _ = prepare_corpus(tmp_path / "corpus", source, tokenizer, 0)
    assert opened.fingerprint == merged.fingerprint
    assert not list((tmp_path / "corpus").rglob("documents.jsonl.zst"))


def test_steps_of_others_may_stand_between_and_documents_are_held_out_by_hash(texts, tmp_path):
    source = files(str(texts))

    def shorter(data, rank, world_size):
        return (document for document in data if len(document.text) < 100)

    write = WriteCorpus(
        tmp_path / "corpus", tmp_path / "tokenizer", causal=True, source=source, validation_fraction=0.2
    )
    run([ReadDocuments(source), shorter, write], tmp_path, 2)
    MergeCorpus(tmp_path / "corpus")()
    kept = [document for document in source if len(document.text) < 100]
    train, validation = (open_corpus(tmp_path / "corpus" / split) for split in ("train", "validation"))
    assert train.num_documents + validation.num_documents == len(kept) < 200
    assert 5 < validation.num_documents < 0.5 * len(kept)


def test_merging_needs_every_part_and_one_task(texts, tmp_path):
    source = files(str(texts))
    write = WriteCorpus(tmp_path / "corpus", tmp_path / "tokenizer", causal=True, source=source)
    write(ReadDocuments(source)(None, 0, 2), 0, 2)
    for act, code in ((lambda: MergeCorpus(tmp_path / "corpus")(), "missing_part"),
                      (lambda: MergeCorpus(tmp_path / "corpus")(None, 0, 2), "one_task")):  # fmt: skip
        with pytest.raises(UserError) as caught:
            act()
        assert caught.value.code == code


def test_a_task_that_was_killed_while_tokenizing_does_not_read_again(texts, tmp_path, monkeypatch):
    source = files(str(texts))
    write = WriteCorpus(tmp_path / "corpus", tmp_path / "tokenizer", causal=True, source=source, validation_fraction=0)

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("torchrecipes.data.datatrove_pipeline.prepare_corpus", killed)
        with pytest.raises(KeyboardInterrupt):
            write(ReadDocuments(source)(None, 0, 1), 0, 1)
    write(iter(()), 0, 1)
    MergeCorpus(tmp_path / "corpus")()
    assert open_corpus(tmp_path / "corpus" / "train").num_documents == 200


def test_documents_are_cleaned_one_by_one(texts, tmp_path):
    source = files(str(texts))
    options = "min_words=20 min_stop_words=null min_alphabetic_words=null".split()
    step = CleanDocuments(["normalize", *(f"gopher_quality.{option}" for option in options)])
    kept = [document.text for document in step(ReadDocuments(source)(None, 1, 2), 1, 2)]
    assert 0 < len(kept) < 100 and all(len(text.split()) >= 20 for text in kept)
    with pytest.raises(UserError) as caught:
        CleanDocuments(["near_duplicates"])
    assert caught.value.code == "needs_all_documents"


def test_the_stages_give_the_documents_of_clean(texts, tmp_path):
    shutil.copy(texts / "0.jsonl", texts / "9.jsonl")
    source = files(str(texts))
    clean(source, tmp_path / "own", read_steps(), workers=0)
    executor = None
    for stage, tasks in (("filter", 2), ("merge", 1), ("remove", 2)):
        logs = tmp_path / f"logs-{stage}"
        executor = run([CleanStage(stage, source, tmp_path / "cleaned")], logs, tasks, executor)
    texts_of = [[one.text for one in files(str(tmp_path / name / "documents"))] for name in ("own", "cleaned")]
    assert texts_of[0] == texts_of[1] and len(texts_of[0]) == 200


def test_the_script_of_the_docs_makes_a_corpus(texts, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "data-at-scale.md").read_text(encoding="utf-8")
    script = re.search(r"^```py\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[1]
    texts.rename(tmp_path / "raw")
    monkeypatch.chdir(tmp_path)
    # All of it in this process; what was cleaned is one file, so it is tokenized by one task.
    script = (
        script.replace("workers=16", "workers=1")
        .replace(', "tokenize", 64)', ', "tokenize", 1)')
        .replace(", 64", ", 2")
    )
    exec(compile(script, "prepare.py", "exec"), {"__name__": "__main__"})
    corpus = open_corpus("corpus/train", load_tokenizer("tokenizer", causal=True))
    assert 150 < corpus.num_documents < 200
