import json
from fractions import Fraction

import numpy as np
import pytest
import torch

from torchrecipes.data.batching.causal import CausalLMCollator
from torchrecipes.data.batching.loader import Loader, evaluation_batches
from torchrecipes.data.batching.mixture import BLOCK, MixtureRows
from torchrecipes.data.batching.rows import NUMBER_BITS, RowBlock
from torchrecipes.data.batching.shuffle import row_indices
from torchrecipes.errors import UserError

SEQ_LEN = 6


class Numbered:
    """`num_rows` rows of two documents; a token says which row of which source it is in."""

    seq_len, lookahead, pad_id, source_names, num_available = SEQ_LEN, 1, 0, (), float("inf")

    def __init__(self, num_rows, first_token, tokens_per_row=SEQ_LEN):
        self.num_rows, self.first_token, self.tokens_per_row = num_rows, first_token, tokens_per_row

    def identity(self):
        return {"corpus": str(self.first_token), "rows": self.num_rows}

    def check_trainable(self):
        pass

    def locate(self, positions, seed, shuffle=True):
        return row_indices(positions, self.num_rows, seed, shuffle)

    def rows(self, numbers):
        shape = len(numbers), SEQ_LEN + 1
        tokens = np.broadcast_to(np.where(numbers < 0, 0, self.first_token + numbers)[:, None], shape).copy()
        starts = np.arange(len(numbers)) * shape[1]
        second = starts[numbers >= 0] + 1 + numbers[numbers >= 0] % 4
        return RowBlock(tokens, np.sort(np.concatenate([starts, second])), np.where(numbers < 0, 0, shape[1]))


def part(name):
    return {"a": Numbered(700, 1000), "b": Numbered(90, 3000, 4.5), "c": Numbered(2500, 5000)}[name]


def parts(names="abc"):
    return {name: part(name) for name in names}


WEIGHTS = {"a": 0.37, "b": 0.0411, "c": 0.5889}
CHANGES = [(0, WEIGHTS), (2 * BLOCK, {"a": 1, "b": 1, "c": 2}), (3 * BLOCK - 5, {"a": 0, "b": 0.2, "c": 0.8})]


def slow_quotas(weights):
    """Largest remainders in exact arithmetic."""
    shares = {name: Fraction(weight) for name, weight in weights.items()}
    exact = {name: share * BLOCK / sum(shares.values()) for name, share in shares.items()}
    quotas = {name: int(value) for name, value in exact.items()}
    for name in sorted(exact, key=lambda name: quotas[name] - exact[name])[: BLOCK - sum(quotas.values())]:
        quotas[name] += 1
    return quotas


def sources_of(mixture, positions, seed=5):
    numbers, _ = mixture.locate(positions, seed)
    return numbers >> NUMBER_BITS


def test_every_block_has_its_quotas_and_every_source_its_own_order():
    mixture, blocks = MixtureRows(parts(), CHANGES), 6
    positions = np.arange(blocks * BLOCK)
    numbers, epochs = mixture.locate(positions, seed=5)
    of_block = sources_of(mixture, positions).reshape(blocks, BLOCK)
    for block, weights in enumerate([CHANGES[0][1]] * 2 + [CHANGES[1][1]] + [CHANGES[2][1]] * 3):
        expected = slow_quotas(weights)
        assert np.bincount(of_block[block], minlength=3).tolist() == [expected[name] for name in "abc"]
    assert not np.array_equal(of_block[0], of_block[1])  # slots of a block are drawn anew
    assert not np.array_equal(of_block[0], sources_of(mixture, positions[:BLOCK], seed=6))
    for index, source in enumerate(mixture.parts.values()):
        mine = numbers >> NUMBER_BITS == index
        alone, alone_epochs = source.locate(np.arange(mine.sum()), seed=5)
        assert np.array_equal(numbers[mine] - (index << NUMBER_BITS), alone)
        assert np.array_equal(epochs[mine], alone_epochs)


def test_a_position_is_found_without_the_ones_before_it():
    mixture = MixtureRows(parts(), CHANGES, max_epochs={"b": 3})
    positions = np.arange(8 * BLOCK)
    together = np.stack(mixture.locate(positions, seed=1))
    chosen = np.random.default_rng(0).permutation(positions)[:200].reshape(20, 10)
    assert np.array_equal(np.stack(mixture.locate(chosen, seed=1)), together[:, chosen])
    far = np.array([10**12, 10**12 + 1])
    assert (mixture.locate(far, seed=1)[0] >= 0).all()


def test_slots_are_spread_evenly():
    mixture = MixtureRows(parts("ac"), {"a": 1, "c": 3})
    counts = (sources_of(mixture, np.arange(400 * BLOCK)) == 0).reshape(400, BLOCK).sum(0)
    assert abs(counts - 100).max() < 6 * 75**0.5  # binomial: 100 expected in 400 blocks


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
def test_weights_by_size(alpha):
    shares = {name: 1024 * rows.num_rows**alpha for name, rows in parts().items()}
    counts = np.bincount(sources_of(MixtureRows(parts(), alpha=alpha), np.arange(BLOCK)), minlength=3)
    assert counts.tolist() == [slow_quotas(shares)[name] for name in "abc"]


def test_epoch_caps_are_exact():
    mixture = MixtureRows(parts(), WEIGHTS, max_epochs={"a": 2.5, "b": 3})
    sources = sources_of(mixture, np.arange(12 * BLOCK))
    counts = np.bincount(sources, minlength=3)
    assert counts[0] == 2.5 * 700 and counts[1] == 3 * 90 and counts[2] == 12 * BLOCK - 1750 - 270
    first = slow_quotas(WEIGHTS)
    for block in sources.reshape(12, BLOCK)[:4]:  # "a" lasts for 4.6 blocks
        assert np.bincount(block, minlength=3).tolist() == [first[name] for name in "abc"]
    assert (sources[-BLOCK:] == 2).all()


def test_a_mixture_of_capped_sources_ends():
    mixture = MixtureRows(parts("ac"), {"a": 1, "c": 1}, max_epochs={"a": 1, "c": 1})
    last = 3200 // BLOCK * BLOCK
    numbers, _ = mixture.locate(np.arange(last + 10), seed=0)
    assert (numbers[:last] >= 0).all() and (numbers[last:] == -1).all()
    assert mixture.account(last)[0]["rows"] == 700
    with pytest.raises(UserError) as error:
        mixture.account(last + 1)
    assert (error.value.key, error.value.code) == ("data.source.max_epochs", "mixture_exhausted")
    loader = Loader(mixture, CausalLMCollator(1), seed=0, global_batch_size=1000, micro_batch_size=1000)
    loader.seek(3)
    loader.next_step()
    with pytest.raises(UserError) as error:
        loader.next_step()
    assert error.value.code == "mixture_exhausted"


def test_rows_are_those_of_the_sources():
    mixture = MixtureRows(parts())
    numbers, _ = mixture.locate(np.arange(50), seed=0)
    numbers[[3, 10]] = -1
    block = mixture.rows(numbers)
    pieces = np.split(block.tokens.reshape(-1), block.boundaries[1:])
    expected = []
    for number in numbers:
        source = "abc"[max(number, 0) >> NUMBER_BITS]
        alone = part(source).rows(np.array([number if number < 0 else number % (1 << NUMBER_BITS)]))
        expected += np.split(alone.tokens.reshape(-1), alone.boundaries[1:])
    assert [piece.tolist() for piece in pieces] == [piece.tolist() for piece in expected]
    assert block.source_ids.tolist() == [max(number, 0) >> NUMBER_BITS for number in numbers]
    assert (block.lengths == np.where(numbers < 0, 0, SEQ_LEN + 1)).all()


def test_the_account_adds_up():
    mixture = MixtureRows(parts(), CHANGES)
    lines = mixture.account(5 * BLOCK)
    counts = np.bincount(sources_of(mixture, np.arange(5 * BLOCK)), minlength=3).tolist()
    assert [line["rows"] for line in lines] == counts
    assert [line["tokens"] for line in lines] == [counts[0] * 6, round(counts[1] * 4.5), counts[2] * 6]
    assert [line["epochs"] for line in lines] == [counts[0] / 700, counts[1] / 90, counts[2] / 2500]
    assert sum(line["share"] for line in lines) == pytest.approx(1)
    assert len(mixture.describe(5 * BLOCK).splitlines()) == 3
    quotas = slow_quotas(WEIGHTS)
    assert mixture.tokens_per_row == pytest.approx((6 * (quotas["a"] + quotas["c"]) + 4.5 * quotas["b"]) / BLOCK)


def loader(mixture=None, **changes):
    settings = {"seed": 3, "global_batch_size": 96, "micro_batch_size": 96} | changes
    return Loader(mixture or MixtureRows(parts(), WEIGHTS), CausalLMCollator(1), **settings)


def tokens_of(batches):
    return torch.cat([torch.cat([b.input_ids, b.source_ids[:, None]], dim=1) for b in batches])


RAISED = {"a": 0.7, "b": 0.1, "c": 0.2}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_weight_change_is_exact_on_resume_ranks_and_workers(workers):
    plain, states, expected = loader(), {}, []
    for step in range(1, 40):
        if step == 14:
            first = plain.set_source_weights(RAISED)
            assert first == -(-2048 // 96)  # 13 * 96 = 1248 rows were read, the next block starts at 2048
        states[step] = json.loads(json.dumps(plain.state_dict()))
        expected.append(tokens_of(plain.next_step()))
    sources = torch.cat(expected)[:, -1]
    counts = [torch.bincount(sources[i : i + BLOCK], minlength=3).tolist() for i in (0, BLOCK, 2 * BLOCK)]
    quotas = [[slow_quotas(weights)[name] for name in "abc"] for weights in (WEIGHTS, WEIGHTS, RAISED)]
    assert counts == quotas
    for start in (9, 16, 30):  # before the change, after the call and before it applies, after it
        ranks = [loader(rank=r, world_size=3, micro_batch_size=8, num_workers=workers) for r in range(3)]
        for rank in ranks:
            rank.load_state_dict(states[start])
        for step in range(start, 33):
            if start < 14 == step:
                assert {rank.set_source_weights(RAISED) for rank in ranks} == {first}
            found = torch.cat([tokens_of(rank.next_step()) for rank in ranks])
            assert torch.equal(found, expected[step - 1])


def test_a_rollback_reads_on_and_brings_the_old_weights_back():
    rolled = loader()
    for _ in range(3):
        rolled.next_step()
    state = rolled.state_dict()
    rolled.set_source_weights(RAISED)
    read = [tokens_of(rolled.next_step()) for _ in range(20)]  # rows 288 to 2208: beyond the change at 1024
    rolled.load_state_dict(state)
    read += [tokens_of(rolled.next_step()) for _ in range(20)]  # rows 2208 to 4128
    sources = torch.cat(read)[:, -1]
    counts = [torch.bincount(sources[i - 288 : i - 288 + BLOCK], minlength=3).tolist() for i in (1024, 2048, 3072)]
    quotas = [[slow_quotas(weights)[name] for name in "abc"] for weights in (RAISED, RAISED, WEIGHTS)]
    assert counts == quotas
    c_rows = torch.cat(read)[sources == 2][:, 0]
    assert len(c_rows.unique()) == len(c_rows)  # none was read twice, in less than an epoch
    resumed = loader()
    resumed.load_state_dict(json.loads(json.dumps(rolled.state_dict())))
    assert torch.equal(tokens_of(resumed.next_step()), tokens_of(rolled.next_step()))


def test_other_parts_and_weights_are_refused_on_resume_unless_added_by_name():
    first = loader(MixtureRows(parts("ab"), {"a": 3, "b": 1}))
    for _ in range(3):
        first.next_step()
    state = json.loads(json.dumps(first.state_dict()))
    half = {"a": 1, "b": 1, "c": 2}
    for other in (
        MixtureRows(parts("ab"), {"a": 1, "b": 1}),
        MixtureRows(parts("ab"), {"a": 3, "b": 1}, max_epochs={"a": 9}),
        MixtureRows(parts("abc"), half),
        MixtureRows(parts("abc"), half, added=["a"]),
        MixtureRows({"a": part("c"), "b": part("b")}, {"a": 3, "b": 1}),
        MixtureRows(parts("bc"), {"b": 1, "c": 1}, added=["c"]),
        MixtureRows(parts("bac"), half, added=["c"]),
    ):
        with pytest.raises(UserError) as error:
            loader(other).load_state_dict(state)
        assert error.value.code == "other_data"
    joined = loader(MixtureRows(parts("cab"), half, added=["c"]))
    joined.load_state_dict(state)
    rows, old = [], []
    for _ in range(19):
        rows.append(tokens_of(joined.next_step()))
        old.append(tokens_of(first.next_step()))
    rows, old = torch.cat(rows), torch.cat(old)
    assert torch.equal(rows[: BLOCK - 288, :-1], old[: BLOCK - 288, :-1])
    assert torch.bincount(rows[BLOCK - 288 :, -1][:BLOCK], minlength=3).tolist() == [512, 256, 256]
    for index, token in ((1, 1000), (2, 3000)):  # the old sources continue where they were
        mine = rows[rows[:, -1] == index][:, 0]
        first_seen = part("ab"[index - 1]).locate(np.arange(10**4), seed=3)[0] + token
        skipped = int(np.flatnonzero(first_seen == int(mine[0]))[0])
        assert mine.tolist() == first_seen[skipped : skipped + len(mine)].tolist()


def test_evaluation_reads_a_mixture():
    mixture = MixtureRows(parts("ab"), {"a": 1, "b": 1})
    batches = list(evaluation_batches(mixture, CausalLMCollator(1), 8, limit=40))
    assert sum(len(batch.source_ids) for batch in batches) == 40 and batches[0].source_names == ("a", "b")


def test_weights_of_one_source_need_a_mixture():
    single = Loader(part("a"), CausalLMCollator(1), seed=0, global_batch_size=2, micro_batch_size=2)
    assert single.next_step()[0].source_ids is None
    with pytest.raises(TypeError, match="Numbered"):
        single.set_source_weights({"a": 1})


@pytest.mark.parametrize(
    ("weights", "options", "key", "code"),
    [
        ({"a": 1, "b": 1}, {}, "data.source.weights", "weights"),
        ({"a": 1, "b": 1, "c": 1, "d": 1}, {}, "data.source.weights", "weights"),
        ({"a": 1, "b": -1, "c": 1}, {}, "data.source.weights", "weights"),
        ({"a": 1, "b": float("nan"), "c": 1}, {}, "data.source.weights", "weights"),
        ({"a": 0, "b": 0, "c": 0}, {}, "data.source.weights", "weights"),
        ([(5, WEIGHTS)], {}, "data.source.weights", "weights"),
        ([(0, WEIGHTS), (10, WEIGHTS), (20, WEIGHTS)], {}, "data.source.weights", "weights"),
        ({"a": 1, "b": 0.0002, "c": 1}, {}, "data.source.weights", "small_weight"),
        (WEIGHTS, {"max_epochs": {"d": 1}}, "data.source.max_epochs", "max_epochs"),
        (WEIGHTS, {"max_epochs": {"a": 0}}, "data.source.max_epochs", "max_epochs"),
    ],
)
def test_wrong_weights_are_refused(weights, options, key, code):
    with pytest.raises(UserError) as error:
        MixtureRows(parts(), weights, **options)
    assert (error.value.key, error.value.code) == (key, code)
