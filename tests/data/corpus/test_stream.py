"""Streams: rows of a corpus that is still being written, and the process that writes it."""

import json
import os
import pickle
import select
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest

from tests.data.corpus.test_build import Positioned, Source, content, topics
from torchrecipes.data.batching import CausalLMCollator, Loader
from torchrecipes.data.batching.packing import BestFitDataset, PackedDataset, PaddedDataset
from torchrecipes.data.batching.streamed import StreamedRows
from torchrecipes.data.corpus import build, stream, tokenizer_process
from torchrecipes.data.corpus.cache import list_entries, use_folder
from torchrecipes.data.corpus.corpus import prepare_corpus
from torchrecipes.data.corpus.stream import Stream, open_stream
from torchrecipes.data.sources import files
from torchrecipes.data.tokenizers.load import train_wordpiece
from torchrecipes.errors import UserError

SEQ_LEN, BLOCK_ROWS, SHARD_TOKENS = 16, 20, 200


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(topics(), vocab_size=600)


@pytest.fixture(scope="module")
def written(tokenizer, tmp_path_factory):
    """A folder of the cache with a stream that has ended."""
    folder = tmp_path_factory.mktemp("written")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(build, "BATCH_CHARACTERS", 500)
        write(folder, Source(topics()), tokenizer)
    return folder


def write(folder, source, tokenizer, throttle=lambda _: None, **options):
    """Does the work of the tokenizer's process in this one."""
    settings = build.corpus_settings(source, tokenizer, 0.1, None, None, SHARD_TOKENS)
    folder.mkdir(exist_ok=True)
    (folder / "prepare.json").write_text(json.dumps(settings, indent=2) + "\n")
    build.build_corpus(folder, source, tokenizer, settings, tokenizer_threads=0, throttle=throttle, **options)


def grow(written, folder, shards):
    """The folder as it is when so many shards of training text are complete; None: all, and the source has ended."""
    for name in ("train", "validation"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(written / "prepare.json", folder)
    for path in sorted((written / "train").glob("shard-*"))[:shards]:
        shutil.copy(path, folder / "train")
    for path in (written / "validation").glob("shard-*"):
        shutil.copy(path, folder / "validation")
    if shards is None:
        shutil.copy(written / "train" / "corpus.json", folder / "train")


def rows_of(folder, kind=PackedDataset, block_rows=BLOCK_ROWS, lookahead=1):
    make_rows = partial(kind, seq_len=SEQ_LEN, pad_id=0, lookahead=lookahead)
    return StreamedRows(Stream(folder), make_rows, SEQ_LEN, block_rows)


@pytest.mark.parametrize("kind", [PackedDataset, PaddedDataset, BestFitDataset])
def test_the_order_is_the_same_while_the_stream_grows_and_after_its_end(written, tmp_path, kind, monkeypatch):
    whole = rows_of(written, kind)
    total = whole.num_rows
    positions = np.arange(2 * total + 7)
    expected, epochs = whole.locate(positions, seed=3)
    assert np.array_equal(epochs, positions // total)
    blocks = np.cumsum(whole._sizes)
    assert len(blocks) > 4
    for epoch in (0, 1):  # every row once, and in the first epoch block after block
        now = expected[epochs == epoch]
        assert np.array_equal(np.sort(now), np.arange(total)) and not np.array_equal(now, np.arange(total))
    of_block = blocks.searchsorted(expected[:total], "right")
    assert np.array_equal(of_block, np.sort(of_block))
    order = blocks.searchsorted(expected[epochs == 1], "right")
    assert len(np.flatnonzero(np.diff(order))) == len(blocks) - 1 and not np.array_equal(order, np.sort(order))
    # Where the rows of a block are permuted, each place is as good as another.
    assert np.mean(expected[: blocks[0]] != np.arange(blocks[0])) > 0.5

    grow(written, tmp_path, 3)
    growing = rows_of(tmp_path, kind)
    standing = int(growing.num_available)
    assert 0 < standing < total
    assert np.array_equal(growing.locate(positions[:standing], seed=3)[0], expected[:standing])
    with pytest.raises(UserError) as error:
        growing.num_rows  # noqa: B018
    assert (error.value.code, error.value.key) == ("unfinished_stream", "epochs")
    assert "max_steps" in error.value.hint and "total_tokens" in error.value.hint

    shards = iter([*range(4, 100, 4)])

    def another(_seconds):  # time passes, and the tokenizer gets further
        count = next(shards)
        grow(written, tmp_path, count if count < len(whole.stream.shards) else None)

    monkeypatch.setattr(stream.time, "sleep", another)
    assert np.array_equal(growing.locate(positions, seed=3)[0], expected)
    assert growing.num_rows == total and growing.identity() == whole.identity() | {"corpus": tmp_path.name}

    def same(a, b):
        return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("tokens", "boundaries", "lengths"))

    some = np.concatenate([expected[5:30], [-1], expected[total : total + 20], [-1]])
    assert same(growing.rows(some), whole.rows(some))
    assert same(pickle.loads(pickle.dumps(growing)).rows(some), whole.rows(some))
    # The rows are those of a corpus that is one block.
    for block, (first, size) in enumerate(zip(blocks - whole._sizes, whole._sizes, strict=True)):
        shards = whole._blocks[block]
        alone = kind(whole.stream.corpus(shards.start, shards.stop), SEQ_LEN, pad_id=0, lookahead=1)
        assert alone.num_rows == size
        assert same(alone.rows(np.arange(size)), whole.rows(np.arange(first, first + size)))


def test_a_resumed_run_opens_only_the_block_that_it_continues_in(written, tmp_path, monkeypatch):
    grow(written, tmp_path, None)
    whole = rows_of(tmp_path)
    opened = []
    inner = stream.open_shards
    monkeypatch.setattr(stream, "open_shards", lambda *of: opened.append(of[1:3]) or inner(*of))
    again = rows_of(tmp_path)
    numbers, _ = again.locate(np.arange(150, 160), seed=0)
    assert np.array_equal(again.rows(numbers).tokens, whole.rows(numbers).tokens)
    assert len(opened) <= 3 and len(again._blocks) > 4  # the first, and the one or two in which the rows are
    again.rows(np.arange(again.num_rows))
    assert len(again._open) == 2  # memory stays flat


def test_the_loader_waits_for_no_more_than_it_needs(written, tmp_path, monkeypatch):
    grow(written, tmp_path, 3)
    monkeypatch.setattr(stream.time, "sleep", lambda _: pytest.fail("waits"))
    rows = rows_of(tmp_path)
    loader = Loader(rows, CausalLMCollator(1), seed=0, global_batch_size=2, micro_batch_size=2)
    whole = Loader(rows_of(written), CausalLMCollator(1), seed=0, global_batch_size=2, micro_batch_size=2)
    for _ in range(int(rows.num_available) // 2):
        assert loader.next_step()[0].input_ids.equal(whole.next_step()[0].input_ids)


def test_documents_for_validation_are_those_of_the_first_block(written, tokenizer):
    rows = rows_of(written)
    held_out = rows.held_out()
    assert held_out.num_documents > 0
    # As many as `prepare_corpus` finds in the same text: all before the place where the first block ends.
    train = rows.stream.corpus(0, len(rows._blocks[0]))
    read = train.statistics.seen + held_out.statistics.seen
    expected = [d.text for d in topics()[:read] if build._hash(d.text.encode()) < build.HASHES // 10]
    starts, stops = held_out.spans(np.arange(held_out.num_documents))
    found = [held_out.read(i, j).tolist() for i, j in zip(starts.tolist(), stops.tolist(), strict=True)]
    assert found == tokenizer.encode_batch(expected)
    again = pickle.loads(pickle.dumps(held_out))
    assert again.fingerprint == held_out.fingerprint and again.num_tokens == held_out.num_tokens


def test_a_stream_that_is_interrupted_at_every_shard_has_the_same_files(written, tokenizer, tmp_path, monkeypatch):
    class Stop(BaseException):
        pass

    monkeypatch.setattr(build, "BATCH_CHARACTERS", 500)
    write(tmp_path / "whole", Positioned(topics()), tokenizer)
    shards = 0
    while True:

        def throttle(count, before=shards):
            if count > before:
                raise Stop

        try:
            write(tmp_path / "part", Positioned(topics()), tokenizer, throttle)
            break
        except Stop:
            shards = len(list((tmp_path / "part" / "train").glob("shard-*")))
    assert shards > 5
    assert content(tmp_path / "part") == content(tmp_path / "whole")


# The process


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": d.text}) + "\n" for d in topics()))
    return path


def finished(opened):
    end = time.monotonic() + 60
    while not opened.finished:
        opened.wait()
        assert time.monotonic() < end
    return opened


def test_the_process_writes_what_prepare_corpus_writes_and_a_second_run_reads_it(tokenizer, text, tmp_path):
    source, options = files(str(text)), {"cache_dir": tmp_path / "cache", "shard_tokens": 500}
    first = open_stream(source, tokenizer, validation_fraction=0.1, **options)
    second = open_stream(source, tokenizer, validation_fraction=0.1, **options)  # its process waits for the first's
    assert first.folder == second.folder
    train, validation = prepare_corpus(tmp_path / "prepared", source, tokenizer, 0.1, shard_tokens=500)
    for opened in (finished(first), finished(second)):
        found = [opened.corpus(0, len(opened.shards))]
        found.append(opened.corpus(0, opened.num_validation_shards(len(opened.shards)), "validation"))
        for corpus, expected in zip(found, (train, validation), strict=True):
            assert corpus.fingerprint == expected.fingerprint
    (entry,) = list_entries(tmp_path / "cache")
    assert entry.in_use and entry.finished and entry.source == source.name and entry.num_tokens == train.num_tokens
    third = open_stream(source, tokenizer, validation_fraction=0.1, **options)
    assert third.process is None and third.finished
    other = open_stream(source, tokenizer, validation_fraction=0.2, **options)
    assert other.folder != first.folder
    finished(other)


def test_a_killed_process_is_started_again_and_then_given_up(tokenizer, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tokenizer_process, "RESTARTS", 1)
    opened = open_stream(files(str(text)), tokenizer, cache_dir=tmp_path, shard_tokens=500)
    killed = set()
    with pytest.raises(UserError) as error:
        while True:
            if opened.process.pid not in killed:
                killed.add(opened.process.pid)
                os.kill(opened.process.pid, signal.SIGKILL)
            opened.wait()
    assert error.value.code == "tokenizer_killed" and len(killed) == 2
    assert "starting it again" in capsys.readouterr().out
    finished(open_stream(files(str(text)), tokenizer, cache_dir=tmp_path, shard_tokens=500))


def test_a_bad_record_reaches_those_who_wait(tokenizer, text, tmp_path):
    with text.open("a") as file:
        file.write('{"body": 1}\n')
    opened = open_stream(files(str(text)), tokenizer, cache_dir=tmp_path, shard_tokens=500)
    with pytest.raises(UserError) as error:
        finished(opened)
    assert error.value.code == "bad_record"


def test_a_source_that_cannot_be_sent_is_refused(tokenizer, tmp_path):
    source = Source(topics(5))
    source.open_file = lambda: None
    with pytest.raises(UserError) as error:
        open_stream(source, tokenizer, cache_dir=tmp_path)
    assert (error.value.code, error.value.key) == ("not_picklable", "data.source")


TRAINER = """
import sys
from torchrecipes.data.corpus.stream import open_stream
from torchrecipes.data.sources import files
from torchrecipes.data.tokenizers.load import load_tokenizer

opened = open_stream(files(sys.argv[1]), load_tokenizer(sys.argv[2]), cache_dir=sys.argv[3], shard_tokens=500)
opened.want(0)
print(opened.process.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")
def test_the_process_ends_with_a_killed_parent(tokenizer, text, tmp_path):
    tokenizer.save(tmp_path / "tokenizer")
    command = [sys.executable, "-c", TRAINER, str(text), str(tmp_path / "tokenizer"), str(tmp_path / "cache")]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child = os.pidfd_open(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    poll = select.poll()
    poll.register(child, select.POLLIN)
    assert poll.poll(30_000)
    os.close(child)


def test_the_process_pauses_when_it_is_far_ahead(tmp_path):
    (tmp_path / "wanted").write_text("3")
    tokenizer_process._pause(tmp_path, 2)
    waits = []

    def sleep(_seconds):
        waits.append(1)
        (tmp_path / "wanted").write_text("9")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tokenizer_process.time, "sleep", sleep)
        tokenizer_process._pause(tmp_path, 3)
    assert waits == [1]
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "prepare.json").write_text("{}")
    opened = Stream(folder)
    for shards, wanted in ((5, 5), (3, 5), (8, 8)):
        opened.want(shards)
        assert (folder / "wanted").read_text() == str(wanted)


def test_a_block_may_have_more_shards_than_the_process_writes_ahead(tokenizer, text, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "SHARDS_AHEAD", 1)
    opened = open_stream(files(str(text)), tokenizer, cache_dir=tmp_path, shard_tokens=200)
    opened.want(1)
    make_rows = partial(PackedDataset, seq_len=SEQ_LEN, pad_id=0)
    rows = StreamedRows(opened, make_rows, SEQ_LEN, block_rows=100)
    rows.locate(np.arange(300), seed=0)
    assert len(rows._blocks[0]) > 3 and len(rows._blocks) > 2


def test_a_finished_stream_that_is_read_only_is_read(written, tmp_path, tokenizer, monkeypatch):
    settings = json.loads((written / "prepare.json").read_text())
    shutil.copytree(written, tmp_path / stream.cache_key(settings), ignore=shutil.ignore_patterns(".used"))
    inner = os.open

    def read_only(path, flags, *mode):
        if flags & (os.O_RDWR | os.O_WRONLY):
            raise PermissionError(13, "read only", str(path))
        return inner(path, flags, *mode)

    monkeypatch.setattr(os, "open", read_only)
    options = {"cache_dir": tmp_path, "validation_fraction": 0.1, "shard_tokens": SHARD_TOKENS}
    opened = open_stream(Source(topics()), tokenizer, **options)
    assert opened.finished and opened.process is None and opened.corpus(0, 1).num_tokens > 0


def test_a_folder_in_use_is_seen(tmp_path):
    held = use_folder(tmp_path)
    assert [entry.in_use for entry in list_entries(tmp_path.parent) if entry.key == tmp_path.name] == [True]
    os.close(held)
    assert [entry.in_use for entry in list_entries(tmp_path.parent) if entry.key == tmp_path.name] == [False]
