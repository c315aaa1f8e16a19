"""Building a corpus: the same files however the work was done, and however often it was interrupted."""

import gzip
import json
import os
import pydoc_data.topics
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import xxhash

from torchrecipes import atomic_write
from torchrecipes.data import progress
from torchrecipes.data.corpus import build, shard_writer
from torchrecipes.data.corpus.build import check_corpus_dir
from torchrecipes.data.corpus.corpus import open_corpus, prepare_corpus
from torchrecipes.data.sources import files, line_reader
from torchrecipes.data.sources.records import BadRecord, Document, ReadStats, documents
from torchrecipes.data.tokenizers.load import load_tokenizer, train_bpe, train_char, train_wordpiece
from torchrecipes.errors import UserError


class Source(list):
    """Documents and bad records of a list."""

    name, num_bytes = "a list", 1000

    def __init__(self, items, fingerprint="source-1"):
        super().__init__(items)
        self.fingerprint = fingerprint

    def __iter__(self):
        self.report = ReadStats()
        return documents(super().__iter__(), self.report)


def topics(count=400) -> list[Document]:
    lines = [line for _, text in sorted(pydoc_data.topics.topics.items()) for line in text.splitlines() if line.strip()]
    return [Document(line, f"topics:{i}") for i, line in enumerate(lines[:count], 1)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(topics(), vocab_size=600)


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(build, "BATCH_CHARACTERS", 500)


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def tokens_of(corpus) -> list[list[int]]:
    starts, stops = corpus.spans(np.arange(corpus.num_documents))
    return [corpus.read(int(i), int(j)).tolist() for i, j in zip(starts, stops, strict=True)]


def test_documents_are_there_in_order_with_their_special_tokens(tokenizer, tmp_path, small_batches):
    texts = topics()
    train, validation = prepare_corpus(tmp_path, Source(texts), tokenizer, 0.1, shard_tokens=1000)
    is_validation = [xxhash.xxh3_64_intdigest(d.text.encode()) / 2**64 < 0.1 for d in texts]
    for corpus, wanted in ((train, False), (validation, True)):
        expected = [tokenizer.encode(d.text) for d, one in zip(texts, is_validation, strict=True) if one == wanted]
        assert tokens_of(corpus) == expected
        assert all(one[0] == tokenizer.cls_id and one[-1] == tokenizer.sep_id for one in expected)
        assert (corpus.num_documents, corpus.num_tokens) == (len(expected), sum(map(len, expected)))
        assert (corpus.shortest_document, corpus.longest_document) == (min(map(len, expected)), max(map(len, expected)))
        assert corpus.statistics.unknown == sum(one.count(tokenizer.unk_id) for one in expected)
    chosen = [d.text for d, one in zip(texts, is_validation, strict=True) if not one]
    assert train.statistics.characters == sum(map(len, chosen))
    assert train.statistics.bytes == sum(len(text.encode()) for text in chosen)
    assert len(train.shards) > 3 and 10 < validation.num_documents < 80


@pytest.mark.parametrize("shard_tokens", [1, 50, 1000, 10**6])
def test_shards_are_filled_up_to_the_limit_and_no_further(tokenizer, tmp_path, small_batches, shard_tokens):
    train, _ = prepare_corpus(tmp_path, Source(topics(150)), tokenizer, 0, shard_tokens=shard_tokens)
    lengths = [len(tokenizer.encode(d.text)) for d in topics(150)]
    expected, fill = [], []
    for length in lengths:  # as it would be done by hand
        if fill and sum(fill) + length > shard_tokens:
            expected.append(fill)
            fill = []
        fill.append(length)
    expected.append(fill)
    assert [np.diff(shard.document_offsets).tolist() for shard in train.shards] == expected


def test_files_are_equal_for_all_numbers_of_workers_and_sizes_of_batches(tokenizer, tmp_path, monkeypatch):
    items = [
        *topics(),
        Document("\u200b", "empty"),
        *topics(10),
        BadRecord("f:3", "no text"),
        Document("\u200b", "e"),
    ]
    found = []
    for workers, batch in ((0, 1), (0, 1 << 18), (1, 500), (2, 300), (3, 5000)):
        monkeypatch.setattr(build, "BATCH_CHARACTERS", batch)
        folder = tmp_path / f"{workers}-{batch}"
        prepare_corpus(folder, Source(items), tokenizer, 0.1, tokenizer_threads=workers, shard_tokens=700)
        found.append(content(folder))
    assert all(one == found[0] for one in found[1:])
    assert {"prepare.json", "train/corpus.json", "validation/corpus.json"} <= set(found[0])
    assert not [name for name in found[0] if name.endswith(".tmp")]


def test_work_ahead_is_bounded():
    read = done = most = 0

    def items():
        nonlocal read, most
        for i in range(100):
            read += 1
            most = max(most, read - done)
            yield i

    for item, result in build.in_order(lambda i: i * i, items(), threads=3):
        assert result == item * item == done * done
        done += 1
    assert done == 100 and most <= 2 * 3 + 2


def test_a_prepared_corpus_is_opened_and_nothing_is_read(tokenizer, tmp_path, capsys):
    class Unreadable(Source):
        def __iter__(self):
            raise AssertionError("read")

    first = prepare_corpus(tmp_path, Source(topics()), tokenizer, 0.1)
    assert "train:" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = prepare_corpus(tmp_path, Unreadable([]), tokenizer, 0.1)
    assert [one.fingerprint for one in again] == [one.fingerprint for one in first]
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert capsys.readouterr().out == ""


def test_a_validation_source_of_its_own(tokenizer, tmp_path):
    texts, others = topics(100), topics(300)[200:]
    validation_source = Source([BadRecord("v:1", "no text"), *others], "source-2")
    train, validation = prepare_corpus(tmp_path, Source(texts), tokenizer, validation_source=validation_source)
    assert tokens_of(train) == tokenizer.encode_batch([d.text for d in texts])
    assert tokens_of(validation) == tokenizer.encode_batch([d.text for d in others])
    assert "skipped 1: no text\n    v:1" in validation.summary() and "no text" not in train.summary()


def test_no_validation(tokenizer, tmp_path):
    train, validation = prepare_corpus(tmp_path, Source(topics(20)), tokenizer, validation_fraction=0)
    assert validation is None and train.num_documents == 20 and not (tmp_path / "validation").exists()


def test_equal_texts_are_on_the_same_side_in_the_expected_share():
    texts = [f"document number {i}" for i in range(20_000)]
    share = np.mean([xxhash.xxh3_64_intdigest(text.encode()) < int(0.05 * 2**64) for text in texts])
    assert abs(share - 0.05) < 5 * (0.05 * 0.95 / 20_000) ** 0.5


def test_skipped_records_are_counted_and_printed(tokenizer, tmp_path, capsys):
    bad = [BadRecord(f"f.jsonl:{i}", "no key 'text'", "keys: body") for i in range(7)]
    items = [*topics(50), *bad, Document("\u200b", "invisible"), BadRecord("g.txt:1", "not UTF-8")]
    train, _ = prepare_corpus(tmp_path, Source(items), tokenizer, 0.1)
    message = capsys.readouterr().out
    assert train.summary() in message
    for line in (
        "skipped 7: no key 'text'",
        "f.jsonl:0: keys: body",
        "and 2 more",
        "skipped 1: not UTF-8",
    ):
        assert line in message
    assert "skipped 1: documents that have no tokens of their own" in train.summary()
    assert open_corpus(tmp_path / "train").summary() == train.summary()


def test_uint16_up_to_65536_ids_and_uint32_above(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t")
    for multiple, dtype in ((65536, np.uint16), (65537, np.uint32)):
        wide = load_tokenizer(tmp_path / "t", pad_vocab_to_multiple_of=multiple)
        train, _ = prepare_corpus(tmp_path / str(multiple), Source(topics(20)), wide, 0)
        assert train.dtype == dtype and train.read(0, 5).dtype == dtype
        assert tokens_of(train) == [tokenizer.encode(d.text) for d in topics(20)]


def test_progress_in_plain_lines_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", 0)
    now = iter([100.0, 101.0, 101.0, 104.0, 104.0, 1e6, 1e6])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    shown = progress.Progress("tokenizing", total_bytes=10_000_000)
    shown.add(3, 1_000_000, 250_000)
    shown.add(1, 1_000_000, 150_000, skipped_bytes=4_000_000)
    shown.add(1, 8_000_000, 1)
    assert capsys.readouterr().err.splitlines() == [
        "tokenizing: 3 documents, 250.0 k tokens, 250.0 k tokens/s, 1.0 MB/s, 0:00:09 left",
        "tokenizing: 4 documents, 400.0 k tokens, 100.0 k tokens/s, 0.5 MB/s, 0:00:08 left",
        "tokenizing: 5 documents, 400.0 k tokens, 0.0 k tokens/s, 0.0 MB/s",
    ]


def test_a_library_that_shows_nothing_is_timed_for_it(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.05)
    with progress.waiting_for("training the vocabulary"):
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 3 and all(line.startswith("training the vocabulary") for line in lines)
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


# Interruptions


class Died(BaseException):
    """What Ctrl+C or a power failure is to the code."""


def test_interrupted_at_every_write_it_continues_to_the_same_files(tokenizer, tmp_path, small_batches, monkeypatch):
    def build(folder, workers):
        prepare_corpus(folder, Source(topics(160)), tokenizer, 0.1, tokenizer_threads=workers, shard_tokens=200)

    build(tmp_path / "whole", 0)
    expected = content(tmp_path / "whole")
    synced = os.fsync
    writes = 0

    for call in ("before", "after"):
        for die_at in range(1, 100):
            writes = 0

            def fsync(file, call=call, die_at=die_at):
                nonlocal writes
                writes += 1
                if writes == die_at and call == "before":
                    raise Died
                synced(file)
                if writes == die_at:
                    raise Died

            folder = tmp_path / f"{call}-{die_at}"
            try:
                with monkeypatch.context() as patched:
                    patched.setattr(atomic_write.os, "fsync", fsync)
                    build(folder, workers=die_at % 3)
            except Died:
                left = {name for name in content(folder) if name.endswith("safetensors")}
                build(folder, workers=1)
                found = content(folder)
                assert found == expected and all(name in found for name in left)
            else:
                break
    assert die_at > 20  # it was interrupted often


SCRIPT = """
import pydoc_data.topics, sys
sys.path.insert(0, sys.argv[1])
from test_build import Source, topics, build
from torchrecipes.data.corpus.corpus import prepare_corpus
from torchrecipes.data.tokenizers.load import load_tokenizer

class Told(Source):
    def __iter__(self):
        for item in super().__iter__():
            print("read", flush=True)
            yield item

build.BATCH_CHARACTERS = 300
tokenizer = load_tokenizer(sys.argv[2] + "/tokenizer")
source, workers = Told(topics(300)), int(sys.argv[3])
prepare_corpus(sys.argv[2] + "/corpus", source, tokenizer, 0.1, tokenizer_threads=workers, shard_tokens=300)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_at_random_instants_it_continues_to_the_same_files(tokenizer, tmp_path, number, small_batches):
    tokenizer.save(tmp_path / "tokenizer")
    prepare_corpus(tmp_path / "whole", Source(topics(300)), tokenizer, 0.1, shard_tokens=300)
    draw, shards = random.Random(int(number)), []
    for attempt, lines in enumerate(sorted(draw.sample(range(1, 300), 3))):
        command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(tmp_path), str(attempt)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(lines):
            process.stdout.readline()
        process.send_signal(number)
        process.stdout.close()
        assert process.wait() != 0
        shards.append(len(list((tmp_path / "corpus").rglob("shard-*"))))
    prepare_corpus(tmp_path / "corpus", Source(topics(300)), tokenizer, 0.1, shard_tokens=300)
    assert content(tmp_path / "corpus") == content(tmp_path / "whole")
    assert sorted(shards) == shards and shards[-1] > 0  # and it did go on


def test_ctrl_c_says_what_is_kept(tokenizer, tmp_path, small_batches, capsys):
    class Interrupted(Source):
        def __iter__(self):
            for number, item in enumerate(super().__iter__()):
                if number == 150:
                    raise KeyboardInterrupt
                yield item

    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(tmp_path, Interrupted(topics(160)), tokenizer, 0.1, tokenizer_threads=0, shard_tokens=300)
    kept = len(list(tmp_path.rglob("shard-*")))
    assert kept > 0 and f"{kept} complete shards are kept in {tmp_path}" in capsys.readouterr().err


def test_documents_of_complete_shards_are_not_tokenized_again(tokenizer, tmp_path, small_batches, monkeypatch):
    source = Source(topics(200))
    prepare_corpus(tmp_path / "whole", source, tokenizer, 0.1, shard_tokens=500)
    prepare_corpus(tmp_path / "part", source, tokenizer, 0.1, shard_tokens=500)
    shards = sorted((tmp_path / "part" / "train").glob("shard-*"))
    for path in [*shards[3:], tmp_path / "part" / "train" / "corpus.json"]:
        path.unlink()
    tokenized = []
    inner = build._tokenize
    monkeypatch.setattr(
        build, "_tokenize", lambda documents, *rest: tokenized.extend(documents) or inner(documents, *rest)
    )
    train, validation = prepare_corpus(tmp_path / "part", source, tokenizer, 0.1, shard_tokens=500)
    assert len(tokenized) == sum(
        corpus.num_documents - corpus.shards[3].document_offset for corpus in (train, validation)
    )
    assert content(tmp_path / "part") == content(tmp_path / "whole")


class Positioned(Source):
    """Reads on from a position; `read_items` holds the place of every item that was read."""

    def __init__(self, items):
        super().__init__(items)
        self.read_items, self.place = [], 0

    def __iter__(self):
        return self.read()

    def read(self, position=None):
        self.report = ReadStats()
        return documents(self._items(position["item"] if position else 0), self.report)

    def _items(self, first):
        for i in range(first, len(self)):
            self.read_items.append(i)
            self.place = i + 1
            yield self[i]

    def position(self):
        return {"item": self.place}


def test_an_interrupted_source_with_positions_is_never_read_from_its_start(
    tokenizer, tmp_path, small_batches, monkeypatch
):
    items = []
    for i, document in enumerate(topics(300)):
        items.append(BadRecord(f"f:{i}", f"bad {i % 2}", "x") if i % 7 == 0 else document)
        if i % 5 == 0:
            items.append(Document("\u200b", f"empty {i}"))
    prepare_corpus(tmp_path / "whole", Positioned(items), tokenizer, 0.1, shard_tokens=200)
    synced = os.fsync
    writes, read, calls = 0, [], 0

    def fsync(file):
        nonlocal writes
        writes += 1
        if writes == 9:
            raise Died
        synced(file)

    monkeypatch.setattr(atomic_write.os, "fsync", fsync)
    while True:
        source, writes, calls = Positioned(items), 0, calls + 1
        try:
            prepare_corpus(tmp_path / "part", source, tokenizer, 0.1, tokenizer_threads=0, shard_tokens=200)
            break
        except Died:
            read.append(source.read_items)
    read.append(source.read_items)
    assert calls > 5
    assert content(tmp_path / "part") == content(tmp_path / "whole")
    # What was read twice: the documents of one shard and of one batch at most; the first call looked for a document
    # for validation, too.
    assert all(one[0] > before[0] for before, one in pairwise(read[1:]))
    assert sum(len(set(one)) for one in read) < len(items) + calls * 40
    assert all(min(one) > 0 for one in read[2:])


@pytest.mark.parametrize("kind", ["line", "jsonl", "jsonl.gz"])
def test_the_places_in_a_file_do_not_depend_on_interruptions(tokenizer, tmp_path, small_batches, monkeypatch, kind):
    monkeypatch.setattr(line_reader, "BLOCK", 1 << 12)
    texts = [d.text for d in topics(400)]
    lines = texts if kind == "line" else [json.dumps({"text": text}) for text in texts]
    content_of = "\n".join(lines).encode()
    for number in (1, 2):
        path = tmp_path / f"{number}.{'txt' if kind == 'line' else kind}"
        path.write_bytes(gzip.compress(content_of) if kind.endswith("gz") else content_of)
    source = files(str(tmp_path / "*.*"), sample_by="line" if kind == "line" else "document")
    prepare_corpus(tmp_path / "whole", source, tokenizer, 0.1, shard_tokens=500)
    inner, shards = shard_writer.ShardWriter.add, []

    def die(self, *batch):
        inner(self, *batch)
        if sum(self.num_shards.values()) > sum(shards[-1].values() if shards else [0]):
            shards.append(self.num_shards)
            raise Died

    monkeypatch.setattr(shard_writer.ShardWriter, "add", die)
    while True:
        try:
            prepare_corpus(tmp_path / "part", source, tokenizer, 0.1, tokenizer_threads=0, shard_tokens=500)
            break
        except Died:
            pass
    assert len(shards) > 10
    assert content(tmp_path / "part") == content(tmp_path / "whole")


def test_what_a_killed_process_left_unfinished_is_removed(tokenizer, tmp_path):
    source = Source(topics(200))
    prepare_corpus(tmp_path, source, tokenizer, 0.1, shard_tokens=500)
    whole = content(tmp_path)
    (tmp_path / "train" / "corpus.json").unlink()
    (tmp_path / "train" / ".shard-00001.safetensors.77.tmp").write_bytes(b"half")
    shard = tmp_path / "train" / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])  # not from a kill: a disk that lies
    prepare_corpus(tmp_path, source, tokenizer, 0.1, shard_tokens=500)
    assert content(tmp_path) == whole


def test_two_processes_at_the_same_folder(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer")
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(tmp_path), "1"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    out = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], out
    assert sum(text.count("train:") for text, _ in out) == 1  # one did the work, the other opened it
    open_corpus(tmp_path / "corpus" / "train").verify()


def test_no_warning_when_a_process_is_forked_afterwards(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer")
    script = SCRIPT + "\nimport os\nif (pid := os.fork()) == 0:\n    os._exit(0)\nos.waitpid(pid, 0)\n"
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path), "2"]
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "huggingface/tokenizers" not in done.stderr


# What is refused


def test_other_settings_sources_and_tokenizers_are_refused_with_the_difference(tokenizer, tmp_path):
    source = Source(topics(100))
    prepare_corpus(tmp_path, source, tokenizer, 0.1)
    other = train_bpe(topics(100), vocab_size=400)
    for arguments, values in (
        ((source, other, 0.1), (tokenizer.fingerprint, other.fingerprint)),
        ((source, tokenizer, 0.2), ("{'fraction': 0.1}", "{'fraction': 0.2}")),
        ((source, tokenizer, 0.1, source), ("validation", "source-1")),
        ((source, tokenizer, 0.1, None, 0, 77), ("67108864", "77")),
        ((Source([], "source-2"), tokenizer, 0.1), ("source-1", "source-2")),
    ):
        with pytest.raises(UserError) as error:
            prepare_corpus(tmp_path, *arguments)
        assert (error.value.code, error.value.key) == ("other_corpus", "data.corpus_dir")
        remedy = "data.validation_fraction=0.1" if arguments[2] == 0.2 else str(tmp_path)
        assert remedy in error.value.hint and all(value in error.value.problem for value in values)


def test_an_unfinished_corpus_of_other_settings_is_not_continued(tokenizer, tmp_path, small_batches, monkeypatch):
    finish = shard_writer.ShardWriter.finish
    monkeypatch.setattr(shard_writer.ShardWriter, "finish", lambda *_: (_ for _ in ()).throw(Died))
    with pytest.raises(Died):
        prepare_corpus(tmp_path, Source(topics(100)), tokenizer, 0.1, shard_tokens=300)
    monkeypatch.setattr(shard_writer.ShardWriter, "finish", finish)
    with pytest.raises(UserError) as error:
        prepare_corpus(tmp_path, Source(topics(100)), tokenizer, 0.1, shard_tokens=301)
    assert error.value.code == "other_corpus" and "300" in str(error.value)
    for content in ("{", "3", "[1]", None):
        if content is None:
            (tmp_path / "prepare.json").unlink()
        else:
            (tmp_path / "prepare.json").write_text(content)
        with pytest.raises(UserError) as error:
            prepare_corpus(tmp_path, Source(topics(100)), tokenizer, 0.1, shard_tokens=300)
        assert error.value.code == "corrupt_corpus" and "prepare.json" in str(error.value)


def test_no_documents(tokenizer, tmp_path):
    for items, word in (
        ([], "a list"),
        ([BadRecord("f:1", "no key 'text'")], "no key 'text'"),
        ([Document("\u200b", "x"), Document("\u200b\u200b", "y")], "all 2 documents"),
    ):
        with pytest.raises(UserError) as error:
            prepare_corpus(tmp_path, Source(items), tokenizer, 0)
        assert error.value.code == "no_documents" and word in str(error.value)
    train, _ = prepare_corpus(tmp_path, Source(topics(5), "source-2"), tokenizer, 0)  # nothing is in the way
    assert train.num_documents == 5


def test_the_first_documents_are_for_validation(tokenizer, tmp_path, small_batches):
    texts = topics(60)
    train, validation = prepare_corpus(tmp_path, Source(texts), tokenizer, 0.1, eval_samples=7, shard_tokens=100)
    assert tokens_of(validation) == tokenizer.encode_batch([d.text for d in texts[:7]])
    assert tokens_of(train) == tokenizer.encode_batch([d.text for d in texts[7:]])
    with pytest.raises(UserError) as error:
        prepare_corpus(tmp_path, Source(texts), tokenizer, 0.1, eval_samples=8, shard_tokens=100)
    assert error.value.code == "other_corpus"
    with pytest.raises(UserError) as error:
        prepare_corpus(tmp_path / "all", Source(texts), tokenizer, eval_samples=60)
    assert (error.value.code, error.value.key) == ("no_training_documents", "data.eval_samples")


@pytest.mark.parametrize("count", [2, 5, 60])
def test_at_least_one_document_is_for_validation(tokenizer, tmp_path, small_batches, count):
    texts = [document.text for document in topics(count)]
    held_out = min(texts, key=lambda text: xxhash.xxh3_64_intdigest(text.encode()))
    train, validation = prepare_corpus(tmp_path, Source(topics(count)), tokenizer, 1e-9, shard_tokens=100)
    assert tokens_of(validation) == [tokenizer.encode(held_out)]
    assert tokens_of(train) == [tokenizer.encode(text) for text in texts if text != held_out]
    assert "data.validation_fraction" in validation.summary() and "warning" not in train.summary()


def test_an_interrupted_corpus_keeps_the_one_document_for_validation(tokenizer, tmp_path, small_batches):
    for folder in ("whole", "part"):
        prepare_corpus(tmp_path / folder, Source(topics(60)), tokenizer, 1e-9, shard_tokens=100)
    for path in [*sorted((tmp_path / "part/train").glob("shard-*"))[5:], *(tmp_path / "part").rglob("corpus.json")]:
        path.unlink()
    prepare_corpus(tmp_path / "part", Source(topics(60)), tokenizer, 1e-9, shard_tokens=100)
    assert content(tmp_path / "part") == content(tmp_path / "whole")


@pytest.mark.parametrize("texts", [["one text"], ["the same"] * 3])
def test_one_document_cannot_be_split_and_the_remedies_are_named(tokenizer, tmp_path, texts):
    source = Source([Document(text, "x") for text in texts])
    with pytest.raises(UserError) as error:
        prepare_corpus(tmp_path, source, tokenizer, 0.1)
    assert error.value.code == "one_document" and error.value.key == "data.validation_fraction"
    for remedy in ("sample_by", "text_span", "data.eval_sets.validation", "data.validation_fraction=0 eval_every=null"):
        assert remedy in error.value.hint
    with pytest.raises(UserError) as early:
        check_corpus_dir(tmp_path / "not_yet", source, 0.1)
    assert early.value.code == "one_document"
    check_corpus_dir(tmp_path / "not_yet", source, 0)
    train, _ = prepare_corpus(tmp_path, source, tokenizer, 0)
    assert train.num_documents == len(texts)


def test_a_fraction_that_leaves_nothing_to_train_on(tokenizer, tmp_path):
    with pytest.raises(UserError) as error:
        prepare_corpus(tmp_path, Source(topics(60)), tokenizer, 1 - 1e-9)
    assert error.value.code == "no_training_documents"
    train, _ = prepare_corpus(tmp_path, Source(topics(60)), tokenizer, 0.3)  # nothing is in the way
    assert train.num_documents > 0


def test_short_documents_are_reported_for_long_rows(tokenizer, tmp_path, capsys):
    source = Source(topics(20))
    train, _ = prepare_corpus(tmp_path, source, tokenizer, 0, seq_len=1024)
    assert "sample_by" in capsys.readouterr().out
    mean = train.num_tokens / train.num_documents
    assert "sample_by" not in train.summary() and "sample_by" not in train.summary(int(8 * mean))
    assert "sample_by" in train.summary(int(8 * mean) + 8)


def test_an_unknown_token_that_begins_documents_is_not_unknown_text(tmp_path):
    train_bpe(topics(), vocab_size=400, causal=True).save(tmp_path / "gpt2_like")
    config = tmp_path / "gpt2_like" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"unk_token": "<|endoftext|>"}))
    tokenizer = load_tokenizer(tmp_path / "gpt2_like", causal=True)
    assert tokenizer.unk_id == tokenizer.bos_id is not None
    train, _ = prepare_corpus(tmp_path / "corpus", Source(topics(20)), tokenizer, 0)
    assert train.statistics.unknown == 0 and "limit_alphabet" not in train.summary()


def test_much_unknown_text_is_reported_with_the_remedy(tmp_path):
    tokenizer = train_char(Source(topics(20)), limit_alphabet=3, causal=True)
    train, _ = prepare_corpus(tmp_path / "corpus", Source(topics(20)), tokenizer, 0)
    assert "limit_alphabet" in train.summary()


@pytest.mark.parametrize(("key", "value"), [("validation_fraction", 1.5), ("tokenizer_threads", -1)])
def test_impossible_settings(tokenizer, tmp_path, key, value):
    with pytest.raises(UserError) as error:
        prepare_corpus(tmp_path, Source(topics(5)), tokenizer, **{key: value})
    assert error.value.key == f"data.{key}" and str(value) in str(error.value)
    with pytest.raises(ValueError, match="shard_tokens"):
        prepare_corpus(tmp_path, Source(topics(5)), tokenizer, shard_tokens=0)


def test_a_text_that_is_no_unicode_is_named(tokenizer, tmp_path):
    with pytest.raises(UserError) as error:
        prepare_corpus(tmp_path, Source([*topics(5), Document("a \ud800 b", "f.txt:7")]), tokenizer, 0)
    assert error.value.code == "bad_record" and "f.txt:7" in str(error.value)


def test_a_full_disk_is_reported_and_the_next_call_continues(tokenizer, tmp_path, small_batches, monkeypatch):
    source, synced, writes = Source(topics(100)), os.fsync, []

    def full(file):
        writes.append(file)
        if len(writes) > 8:
            raise OSError(28, "No space left on device")
        synced(file)

    monkeypatch.setattr(atomic_write.os, "fsync", full)
    with pytest.raises(UserError) as error:
        prepare_corpus(tmp_path, source, tokenizer, 0.1, shard_tokens=200)
    assert error.value.code == "not_writable" and "No space left on device" in str(error.value)
    monkeypatch.undo()
    assert any((tmp_path / "train").glob("shard-*")) and not any(tmp_path.rglob("*.tmp"))
    train, _ = prepare_corpus(tmp_path, source, tokenizer, 0.1, shard_tokens=200)
    assert tokens_of(train)[0] == tokenizer.encode(source[0].text)


def test_a_folder_that_cannot_be_made(tokenizer, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError) as error:
        prepare_corpus(tmp_path / "file" / "corpus", Source(topics(5)), tokenizer, 0)
    assert error.value.code == "not_writable"


def test_a_folder_that_cannot_be_written_is_reported_before_anything_is_made(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    corpus = tmp_path / "corpus"
    check_corpus_dir(tmp_path / "not" / "there" / "yet")
    for folder in (tmp_path / "file" / "corpus", corpus):
        with monkeypatch.context() as patched, pytest.raises(UserError) as error:
            patched.setattr(atomic_write.os, "access", lambda *_: False)
            check_corpus_dir(folder)
        assert (error.value.code, error.value.key) == ("not_writable", "data.corpus_dir")
        assert not corpus.exists()
    prepare_corpus(corpus, Source(topics(5)), tokenizer, 0)
    monkeypatch.setattr(atomic_write.os, "access", lambda *_: False)
    check_corpus_dir(corpus)  # it is only read

    class Unread(Source):
        def __iter__(self):
            raise AssertionError("read")

    with pytest.raises(UserError) as error:
        train_bpe(Unread([]), vocab_size=300, folder=tmp_path / "t")
    assert error.value.code == "not_writable"


def test_settings_are_readable(tokenizer, tmp_path):
    prepare_corpus(tmp_path, Source(topics(50)), tokenizer, 0.1)
    account = json.loads((tmp_path / "train" / "corpus.json").read_text())
    assert account["settings"] == json.loads((tmp_path / "prepare.json").read_text())
    assert account["tokenizer"]["fingerprint"] == tokenizer.fingerprint
