import math
from types import SimpleNamespace

import numpy as np
import pytest

from torchrecipes.data.batching.mlm import MLMCollator
from torchrecipes.data.batching.shuffle import fold_in
from torchrecipes.errors import UserError

VOCAB = 500
SPECIAL = [0, 1, 2, 3, 4, 499]  # 499 stands for an inert row
MASK, PAD = 4, 0
TOKENIZER = SimpleNamespace(vocab_size=VOCAB, special_ids=SPECIAL, mask_id=MASK)


def rows(count, row_len, seed=0):
    tokens = np.random.default_rng(seed).integers(5, 499, (count, row_len))
    tokens[:, 0], tokens[:, -1] = 2, 3
    return tokens


def apply(masking, tokens, seed=0):
    """(inputs, mask of targets, labels at targets in flat order) after masking a copy of `tokens`."""
    inputs = tokens.copy()
    positions, labels, num_targets = masking(inputs, fold_in(seed, np.arange(len(tokens))))
    used = labels >= 0
    assert used.sum() == num_targets
    assert (labels[~used] == -100).all()
    assert len(np.unique(positions)) == len(positions)
    slots = len(positions) // len(tokens)
    assert np.array_equal(positions // tokens.shape[1], np.repeat(np.arange(len(tokens)), slots))  # of the row's own
    is_target = np.zeros(tokens.size, dtype=bool)
    is_target[positions[used]] = True
    assert np.array_equal(labels[used], tokens.reshape(-1)[positions[used]])
    return inputs, is_target.reshape(tokens.shape), positions, labels


@pytest.mark.parametrize("p", [0.15, 0.2, 0.4])
def test_shares_are_exact_over_a_corpus(p):
    tokens = rows(20_000, 64)
    inputs, is_target, _, _ = apply(MLMCollator(TOKENIZER, p), tokens)
    ordinary = tokens >= 5
    n = ordinary.sum()
    masked = (inputs == MASK).sum() / n
    changed = ((inputs != tokens) & (inputs != MASK)).sum() / n
    kept = (is_target & (inputs == tokens)).sum() / n
    # Rounding at random: the error of a mean of 20,000 rows, in tokens, is below 0.5 / sqrt(20,000).
    error = 5 * 0.5 / math.sqrt(20_000) / 62
    assert is_target.sum() / n == pytest.approx(p, abs=error)
    assert masked == pytest.approx(0.8 * p, abs=error)
    # A random replacement is the same token once in 493 times.
    assert changed == pytest.approx(0.1 * p * 492 / 493, abs=error)
    assert kept == pytest.approx(0.1 * p * 494 / 493, abs=error)


def test_every_position_and_every_replacement_is_equally_likely():
    tokens = rows(50_000, 32)
    inputs, is_target, _, _ = apply(MLMCollator(TOKENIZER, 0.2), tokens)
    counts = is_target[:, 1:-1].sum(0)
    expected = counts.mean()
    # Chosen without replacement: the variance is (1 - p) of the binomial one.
    assert ((counts - expected) ** 2 / expected / 0.8).sum() < 29 + 6 * math.sqrt(58)
    replaced = inputs[(inputs != tokens) & (inputs != MASK)]
    counts = np.bincount(replaced, minlength=VOCAB)
    assert counts[SPECIAL].sum() == 0
    counts = np.delete(counts, SPECIAL)
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 493 + 6 * math.sqrt(2 * 493)


def test_special_tokens_and_padding_are_never_touched():
    tokens = rows(200, 40)
    tokens[:, 25:] = PAD
    tokens[:, 10] = 499
    inputs, is_target, _, _ = apply(MLMCollator(TOKENIZER, 0.3), tokens)
    special = np.isin(tokens, SPECIAL)
    assert not (is_target & special).any()
    assert np.array_equal(inputs[special], tokens[special])


def test_mask_all_hides_every_target():
    tokens = rows(100, 40)
    inputs, is_target, _, _ = apply(MLMCollator(TOKENIZER, 0.2, mask_all=True), tokens)
    assert (inputs[is_target] == MASK).all()
    assert np.array_equal(inputs[~is_target], tokens[~is_target])


def test_a_row_with_one_ordinary_token_has_a_target_and_one_without_has_none():
    tokens = np.full((3, 16), PAD)
    tokens[0, 7] = 42
    tokens[2, :5] = 43
    masking = MLMCollator(TOKENIZER, 0.1)
    for seed in range(200):
        _, is_target, _, _ = apply(masking, tokens, seed)
        assert is_target[0].nonzero()[0].tolist() == [7]
        assert not is_target[1].any() and is_target[2].sum() == 1


def test_slots_are_fixed_and_enough():
    for row_len in (1, 2, 3, 7, 100):
        for p in (0.01, 0.5, 0.99):
            masking = MLMCollator(TOKENIZER, p)
            tokens = np.full((50, row_len), 9)
            _, _, positions, _ = apply(masking, tokens)
            assert len(positions) == 50 * math.ceil(p * row_len)


def test_a_rows_mask_depends_on_its_key_alone():
    tokens, keys, masking = rows(8, 64), fold_in(5, np.arange(8)), MLMCollator(TOKENIZER, 0.2)
    together = tokens.copy()
    masking(together, keys)
    for row in range(8):
        alone = tokens[row : row + 1].copy()
        masking(alone, keys[row : row + 1])
        assert np.array_equal(alone[0], together[row])
    other = tokens.copy()
    masking(other, fold_in(6, np.arange(8)))
    assert not np.array_equal(other, together)


@pytest.mark.parametrize("p", [0, 1, -0.1, 15])
def test_a_share_that_is_none_is_refused(p):
    with pytest.raises(UserError) as error:
        MLMCollator(TOKENIZER, p)
    assert (error.value.key, error.value.code) == ("mlm_probability", "out_of_range")


def test_a_tokenizer_without_a_mask_is_refused():
    with pytest.raises(UserError) as error:
        MLMCollator(SimpleNamespace(vocab_size=5, special_ids=[], mask_id=None))
    assert error.value.code == "no_mask_token"


def test_an_example_batch_has_the_shapes_of_real_ones():
    batch = MLMCollator(TOKENIZER, 0.2).example_batch(3, 32)
    assert batch.input_ids.shape == batch.position_ids.shape == (3, 32) and batch.cu_seqlens is None
    assert len(batch.masked_positions) == len(batch.masked_labels) == 3 * 7  # ceil(0.2 * 32)
    assert batch.num_targets == (batch.masked_labels >= 0).sum() > 0
