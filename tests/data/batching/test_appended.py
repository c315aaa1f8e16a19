"""Rows of a corpus that text has been added to, and resuming over it."""

import json
import pickle
from functools import partial

import numpy as np
import pytest
import torch
import xxhash

from torchrecipes.data.batching import AppendedRows, Loader, MLMCollator, make_rows
from torchrecipes.data.batching.appended import rows_of_corpus
from torchrecipes.data.corpus import append_to_corpus, open_corpus, prepare_corpus
from torchrecipes.data.sources.records import Document, ReadStats
from torchrecipes.data.tokenizers import train_wordpiece
from torchrecipes.errors import UserError

SEQ_LEN, ROWS_PER_STEP = 16, 8
WORDS = ["red", "green", "blue", "black", "white"]


class Texts(list):
    name, num_bytes = "texts", 0

    def __init__(self, seed, count):
        draw = np.random.default_rng(seed)
        super().__init__(Document(" ".join(draw.choice(WORDS, draw.integers(1, 30))), "here") for _ in range(count))
        self.fingerprint = xxhash.xxh3_128_hexdigest(repr(self).encode())
        self.report = ReadStats(documents=count)


OLD, NEW, MORE = Texts(0, 60), Texts(1, 50), Texts(2, 20)
TOKENIZER = train_wordpiece(OLD, vocab_size=64)


@pytest.fixture(params=["concat", "best_fit", "none"])
def packing(request):
    return request.param


@pytest.fixture
def folder(tmp_path):
    prepare_corpus(tmp_path, OLD, TOKENIZER, 0, tokenizer_threads=0, shard_tokens=400)
    return tmp_path


def rows(folder, packing):
    of_corpus = partial(make_rows, packing, seq_len=SEQ_LEN, pad_id=TOKENIZER.pad_id, lookahead=1)
    return rows_of_corpus(open_corpus(folder / "train"), of_corpus)


def loader(folder, packing, **changes):
    settings = {"seed": 3, "global_batch_size": ROWS_PER_STEP, "micro_batch_size": ROWS_PER_STEP} | changes
    collator = MLMCollator(TOKENIZER, 0.2)
    return Loader(rows(folder, packing), collator, **settings)


def steps(loader, count):
    """Inputs and labels of so many steps."""
    batches = [loader.next_step() for _ in range(count)]
    return [torch.cat([batch.input_ids.flatten(), batch.masked_labels]) for step in batches for batch in step]


def equal(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


def test_a_run_that_began_after_the_addition_reads_it_like_any_corpus(folder, packing):
    append_to_corpus(folder, NEW, TOKENIZER, tokenizer_threads=0)
    grown = rows(folder, packing)
    assert isinstance(grown, AppendedRows)
    plain = make_rows(packing, grown.corpus, SEQ_LEN, TOKENIZER.pad_id, lookahead=1)
    positions = np.arange(3 * plain.num_rows).reshape(3, -1)
    for found, expected in zip(grown.locate(positions, 5), plain.locate(positions, 5), strict=True):
        assert (found == expected).all()
    assert grown.identity() == plain.identity()


def test_resuming_goes_on_in_a_new_epoch_over_all_of_it(folder, packing, capsys):
    before = loader(folder, packing)
    past = steps(before, 3)
    state = json.loads(json.dumps(before.state_dict()))
    old = rows(folder, packing)
    append_to_corpus(folder, NEW, TOKENIZER, tokenizer_threads=0)
    capsys.readouterr()
    after = loader(folder, packing)
    after.load_state_dict(state)
    out = capsys.readouterr().out
    assert "50 documents were added" in out and "from step 4 on" in out and "all 110 documents" in out
    now = after._data.dataset
    # Positions before the step are still those of the old corpus, masks included.
    numbers, epochs = now.locate(np.arange(24), seed=3)
    expected, old_epochs = old.locate(np.arange(24), seed=3)
    assert (numbers == expected).all() and (epochs == old_epochs).all()
    assert (now.rows(numbers).tokens == old.rows(expected).tokens).all()
    # From it on every row comes once, before any comes again; the epoch is one that was not there yet.
    n = now.num_rows
    numbers, epochs = now.locate(24 + np.arange(2 * n), seed=3)
    assert len(set(numbers[:n].tolist())) == n and set(numbers[:n].tolist()) == set(numbers[n:].tolist())
    assert set(epochs[:n].tolist()) == {old_epochs.max() + 1} and set(epochs[n:].tolist()) == {old_epochs.max() + 2}
    plain = make_rows(packing, now.corpus, SEQ_LEN, TOKENIZER.pad_id, lookahead=1)
    tokens = sorted(map(tuple, now.rows(numbers[:n]).tokens.tolist()))
    assert tokens == sorted(map(tuple, plain.rows(np.arange(n)).tokens.tolist()))
    assert past and not equal(steps(after, 1), steps(before, 1))


def test_rows_of_both_corpora_and_padding_in_one_call(folder, packing):
    before = loader(folder, packing)
    old = rows(folder, packing)
    steps(before, 2)
    append_to_corpus(folder, NEW, TOKENIZER, tokenizer_threads=0)
    after = loader(folder, packing)
    after.load_state_dict(before.state_dict())
    now = pickle.loads(pickle.dumps(after._data.dataset))  # as a worker gets it
    numbers, _ = now.locate(np.arange(8, 24), seed=3)
    mixed = np.concatenate([numbers, [-1]])
    block = now.rows(mixed)
    one_by_one = [now.rows(mixed[i : i + 1]) for i in range(len(mixed))]
    width = SEQ_LEN + 1
    assert (block.tokens == np.concatenate([part.tokens for part in one_by_one])).all()
    assert block.lengths.tolist() == [int(part.lengths[0]) for part in one_by_one]
    expected = np.concatenate([part.boundaries + i * width for i, part in enumerate(one_by_one)])
    assert (block.boundaries == expected).all()
    first = old.locate(np.arange(8, 16), seed=3)[0]
    assert (block.tokens[:8] == old.rows(first).tokens).all()


def test_resume_and_rollback_are_exact(folder, packing):
    run = loader(folder, packing)
    steps(run, 2)
    old_state = run.state_dict()
    append_to_corpus(folder, NEW, TOKENIZER, tokenizer_threads=0)
    run = loader(folder, packing)
    run.load_state_dict(old_state)
    first = steps(run, 2)
    state = json.loads(json.dumps(run.state_dict()))
    then = steps(run, 5)
    # Killed and resumed over the same corpus.
    again = loader(folder, packing)
    again.load_state_dict(state)
    assert equal(steps(again, 5), then)
    # From the old checkpoint once more.
    again = loader(folder, packing)
    again.load_state_dict(old_state)
    assert equal(steps(again, 7), first + then)
    # A rollback to before the addition continues with later rows of the new order.
    following = steps(run, 3)
    again.load_state_dict(old_state)
    assert again.step == 3 and equal(steps(again, 3), following)
    # A second addition, and a resume after that.
    state = json.loads(json.dumps(again.state_dict()))
    append_to_corpus(folder, MORE, TOKENIZER, tokenizer_threads=0)
    third = loader(folder, packing)
    third.load_state_dict(state)
    assert len(third.state_dict()["segments"]) == 3
    assert equal(steps(third, 1)[:0], [])
    numbers, _ = third._data.dataset.locate(np.arange(56), seed=3)
    before, _ = again._data.dataset.locate(np.arange(56), seed=3)
    assert (numbers == before).all()


def test_workers_and_ranks_see_the_same(folder):
    run = loader(folder, "concat")
    steps(run, 2)
    append_to_corpus(folder, NEW, TOKENIZER, tokenizer_threads=0)
    alone, worked = loader(folder, "concat"), loader(folder, "concat", num_workers=1)
    halves = [loader(folder, "concat", rank=rank, world_size=2, micro_batch_size=4) for rank in range(2)]
    for one in (alone, worked, *halves):
        one.load_state_dict(run.state_dict())
    for _ in range(3):
        (expected,) = alone.next_step()
        (from_worker,) = worked.next_step()
        parts = [half.next_step()[0].input_ids for half in halves]
        assert torch.equal(expected.input_ids, from_worker.input_ids)
        assert torch.equal(expected.input_ids, torch.cat(parts))


def test_what_is_no_addition_is_refused(folder, tmp_path_factory, packing):
    run = loader(folder, packing)
    steps(run, 2)
    state = run.state_dict()
    append_to_corpus(folder, NEW, TOKENIZER, tokenizer_threads=0)
    other = tmp_path_factory.mktemp("other")
    prepare_corpus(other, MORE, TOKENIZER, 0, tokenizer_threads=0)
    append_to_corpus(other, NEW, TOKENIZER, tokenizer_threads=0)
    grown = loader(folder, packing)
    grown.load_state_dict(state)
    steps(grown, 1)
    for target, saved in (
        (loader(other, packing), state),  # another corpus that has additions, too
        (loader(folder, packing), state | {"rows": "another packing"}),
        (loader(folder, packing), state | {"corpus": "unknown"}),
        (loader(folder, packing), grown.state_dict() | {"segments": [[0, "unknown"]]}),
        (loader(folder, packing, seed=4), state),
    ):
        with pytest.raises(UserError) as caught:
            target.load_state_dict(saved)
        assert caught.value.code == "other_data"
    # The corpus as it was does not continue what was trained on more.
    small = tmp_path_factory.mktemp("small")
    prepare_corpus(small, OLD, TOKENIZER, 0, tokenizer_threads=0, shard_tokens=400)
    with pytest.raises(UserError) as caught:
        loader(small, packing).load_state_dict(grown.state_dict())
    assert caught.value.code == "other_data"
    loader(small, packing).load_state_dict(state)
    # The same content, without the record of what it was before.
    account = folder / "train" / "corpus.json"
    account.write_text(json.dumps({**json.loads(account.read_text()), "additions": []}))
    with pytest.raises(UserError) as caught:
        loader(folder, packing).load_state_dict(grown.state_dict())
    assert caught.value.code == "other_data"
