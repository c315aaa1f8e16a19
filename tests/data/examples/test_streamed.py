"""Streamed examples: the windows of a source in its order, and the same batches however a run was interrupted."""

import csv
import json
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from torchrecipes.data.batching import Loader, PairCollator, StreamedExampleRows
from torchrecipes.data.examples import StreamedExamples, labeled_texts, pairs, prepare_examples, streamed
from torchrecipes.data.sources import hf_dataset
from torchrecipes.data.tokenizers import train_wordpiece
from torchrecipes.errors import UserError

COUNT, WINDOW = 50, 16


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "a.jsonl"
    rows = [{"query": f"what is {i}", "positive": f"it is {'big ' * (i % 5)}{i}"} for i in range(COUNT)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def tokenizer(path):
    return train_wordpiece(pairs(path).as_documents(), vocab_size=100)


def stream(path, tokenizer, **options):
    return StreamedExamples(pairs(path), tokenizer, max_length=16, window=WINDOW, **options)


def same(block, other):
    return all(np.array_equal(a, b) if a is not None else b is None for a, b in zip(block, other, strict=True))


@pytest.mark.parametrize("prompts", [None, {"query": "what "}])
def test_windows_are_the_corpus_in_pieces(path, tokenizer, tmp_path, monkeypatch, prompts):
    monkeypatch.setattr(streamed, "BATCH", 5)
    corpus, _ = prepare_examples(tmp_path, pairs(path), tokenizer, max_length=16, prompts=prompts)
    examples = stream(path, tokenizer, prompts=prompts)
    assert not examples.finished
    for window, size in ((0, 16), (1, 16), (3, 2), (2, 16), (0, 16)):  # forward, beyond, and back
        assert examples.size(window) == size
        assert same(examples.read(window), corpus.read(window * WINDOW + np.arange(size)))
    assert examples.finished and examples.sizes == [16, 16, 16, 2] and examples.size(4) == 0
    numbers = np.array([49, 0, 17, 3, 40])
    assert same(examples.examples(numbers), corpus.read(numbers))
    assert examples.example_lengths(numbers).tolist() == corpus.example_lengths[numbers].tolist()
    for wrong in ([50], [-1], [999]):
        with pytest.raises(IndexError):
            examples.examples(wrong)


class Counting:
    """Records that count how many were read, and from where."""

    def __init__(self, records, positions=True):
        self.inner, self.reads, self.positions = records, [], positions
        self.name, self.num_bytes, self.fingerprint = records.name, records.num_bytes, records.fingerprint

    @property
    def report(self):
        return self.inner.report

    def read(self, position=None):
        self.reads.append([position, 0])
        for record in self.inner.read(position):
            self.reads[-1][1] += 1
            yield record

    def position(self):
        return self.inner.position() if self.positions else None


@pytest.mark.parametrize("positions", [True, False])
def test_a_window_is_read_without_those_before_it(path, tokenizer, tmp_path, positions):
    stream(path, tokenizer, folder=tmp_path).size(9)
    source = pairs(path)
    source.records = Counting(source.records, positions)
    if not positions:  # the places that it notes have none either
        other = pairs(path)
        other.records = Counting(other.records, False)
        for table in tmp_path.glob("*"):
            table.unlink()
        StreamedExamples(other, tokenizer, max_length=16, window=WINDOW, folder=tmp_path).size(9)
    again = StreamedExamples(source, tokenizer, max_length=16, window=WINDOW, folder=tmp_path)
    assert again.sizes == [16, 16, 16, 2] and again.texts_per_example == 2
    block = again.read(2)
    again.size(3)
    again.read(3)  # the thread that makes the next window ready is done
    assert same(block, stream(path, tokenizer).read(2))
    assert [count for _, count in source.records.reads] == ([18] if positions else [50])


def test_every_example_comes_once_in_an_epoch_and_in_another_order_in_the_next(path, tokenizer):
    rows = StreamedExampleRows(stream(path, tokenizer), 16, tokenizer.pad_id)
    numbers, epochs = rows.locate(np.arange(2 * COUNT), seed=3)
    assert epochs.tolist() == [0] * COUNT + [1] * COUNT
    first, second = numbers[:COUNT].tolist(), numbers[COUNT:].tolist()
    assert sorted(first) == sorted(second) == list(range(COUNT)) and first != second and first != sorted(first)
    assert sorted(first[:WINDOW]) == list(range(WINDOW)) and rows.num_rows == COUNT
    unshuffled, _ = rows.locate(np.arange(COUNT + 2), seed=3, shuffle=False)
    assert unshuffled.tolist() == [*range(COUNT), 0, 1]


def loader(path, tokenizer, folder=None, rank=0, world_size=1, num_workers=0):
    rows = StreamedExampleRows(stream(path, tokenizer, folder=folder), 16, tokenizer.pad_id)
    return Loader(
        rows, PairCollator(tokenizer), seed=1, global_batch_size=8, micro_batch_size=4, rank=rank,
        world_size=world_size, num_workers=num_workers,
    )  # fmt: skip


def hashes(batches):
    return [batch.examples.hashes.tolist() for batch in batches]


def test_a_run_that_is_resumed_sees_the_same_batches(path, tokenizer, tmp_path):
    whole = loader(path, tokenizer)
    steps = [hashes(whole.next_step()) for _ in range(15)]  # more than two epochs
    first = loader(path, tokenizer, tmp_path)
    assert [hashes(first.next_step()) for _ in range(5)] == steps[:5]
    second = loader(path, tokenizer, tmp_path)
    second.load_state_dict(first.state_dict())
    assert [hashes(second.next_step()) for _ in range(10)] == steps[5:]
    ranks = [loader(path, tokenizer, rank=rank, world_size=2) for rank in range(2)]
    for step in steps[:4]:
        both = [h for rank in ranks for batch in hashes(rank.next_step()) for h in batch]
        assert sorted(both) == sorted(h for batch in step for h in batch)
    other = StreamedExampleRows(StreamedExamples(pairs(path), tokenizer, max_length=16, window=8), 16, tokenizer.pad_id)
    assert other.identity() != first.state_dict().items() and other.identity()["corpus"] != whole.state_dict()["corpus"]


def test_workers_read_for_themselves(path, tokenizer):
    inside, workers = loader(path, tokenizer), loader(path, tokenizer, num_workers=1)
    inside.next_step()
    for _ in range(3):
        workers.seek(inside.step)
        assert hashes(workers.next_step()) == hashes(inside.next_step())
    examples = pickle.loads(pickle.dumps(stream(path, tokenizer)))
    assert (
        torch.from_numpy(examples.read(1).text_hashes).tolist() == stream(path, tokenizer).read(1).text_hashes.tolist()
    )


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes are not forked here")
def test_a_fork_in_the_middle_of_a_window_reads_for_itself(path, tokenizer):
    examples = stream(path, tokenizer)
    expected = examples.read(1)

    def child():
        assert same(examples.read(1), expected)

    process = multiprocessing.get_context("fork").Process(target=child)
    with examples._lock:  # as if the thread were reading
        process.start()
    process.join(20)
    process.kill()
    assert process.exitcode == 0


def test_a_streamed_hugging_face_dataset(path, tokenizer, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "data"))
    source = pairs(dataset=str(tmp_path / "data"), streaming=True)
    assert isinstance(source.records, hf_dataset)
    examples = StreamedExamples(source, tokenizer, max_length=16, window=WINDOW, folder=tmp_path / "places")
    assert same(examples.read(2), stream(path, tokenizer).read(2))
    again = StreamedExamples(source, tokenizer, max_length=16, window=WINDOW, folder=tmp_path / "places")
    assert same(again.read(1), stream(path, tokenizer).read(1))


def test_what_is_wrong_is_told_where_it_is_asked_for(tokenizer, tmp_path):
    def labeled(rows, **options):
        with (tmp_path / "a.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["text", "label"], *rows])
        return labeled_texts(str(tmp_path / "a.csv"), **options)

    options = {"max_length": 16, "window": 2}
    with pytest.raises(UserError) as error:
        StreamedExamples(labeled([["it", "a"]]), tokenizer, **options)
    assert (error.value.code, error.value.key) == ("no_label_names", "label_names")
    with pytest.raises(UserError) as error:
        StreamedExamples(labeled([]), tokenizer, label_names=["a"], **options).read(0)
    assert error.value.code == "no_examples"
    rows = [["it", "a"], ["is", "a"], ["big", "c"], ["what", "a"]]
    examples = StreamedExamples(labeled(rows), tokenizer, label_names=["b", "a"], **options)
    assert examples.read(0).labels.tolist() == [1, 1]
    for _ in range(2):  # the thread has met it already, and the caller gets it all the same
        with pytest.raises(UserError) as error:
            examples.read(1)
        assert error.value.code == "unknown_label" and "a.csv:4" in error.value.problem
    skipping = StreamedExamples(labeled(rows, on_bad_record="skip"), tokenizer, label_names=["b", "a"], **options)
    assert skipping.size(1) == 1 and skipping.finished
    with pytest.raises(UserError) as error:
        StreamedExamples(labeled(rows), tokenizer, max_length=16, window=0, label_names=["a"])
    assert error.value.key == "window"
    rows = StreamedExampleRows(StreamedExamples(pairs_of(tmp_path, 5), tokenizer, **options), 16, 0)
    with pytest.raises(UserError) as error:
        _ = rows.num_rows
    assert error.value.code == "unfinished_stream"


def pairs_of(folder, count):
    (folder / "b.jsonl").write_text('{"query": "what", "positive": "is"}\n' * count)
    return pairs(str(folder / "b.jsonl"))
