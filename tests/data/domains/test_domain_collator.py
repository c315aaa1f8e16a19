"""`DomainCollator` against a plain reference of what it says it hides, and exact counts over many names."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from torchrecipes.data.batching.rows import RowBlock
from torchrecipes.data.batching.shuffle import fold_in
from torchrecipes.data.domains import DomainCollator
from torchrecipes.data.domains.encoding import VOCABULARY, character_kinds
from torchrecipes.errors import UserError

TOKENIZER = SimpleNamespace(vocab_size=len(VOCABULARY))
PAD, UNK, CLS, SEP, MASK = range(5)
SUFFIXES = [".com", ".org", ".co.uk", ".xn--p1ai", ".s3.dualstack.eu-west-1.amazonaws.com"]
SUFFIX_SHARES = [0.5, 0.25, 0.15, 0.08, 0.02]


def made_up_names(count, seed=0):
    """Names as tuples: labels before the suffix, joined by dots, and the suffix."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz0123456789-"))
    labels = rng.choice([1, 2, 3], count, p=[0.8, 0.15, 0.05])
    lengths = iter(rng.geometric(0.12, labels.sum()).clip(1, 40).tolist())
    words = ["".join(letters[rng.integers(0, len(letters), next(lengths))]) for _ in range(labels.sum())]
    words = iter(words)
    return [
        (".".join(next(words) for _ in range(number)), suffix)
        for number, suffix in zip(labels, rng.choice(SUFFIXES, count, p=SUFFIX_SHARES), strict=True)
    ]


def rows_of(names, row_len):
    """A `RowBlock` of names in order, as `next_fit` makes it, and the names of each row."""
    rows, used = [], row_len
    for name in names:
        size = len("".join(name)) + 2
        if used + size > row_len:
            rows.append([])
            used = 0
        rows[-1].append(name)
        used += size
    tokens, entries = np.zeros((len(rows), row_len), dtype=np.int64), []
    for row, held in enumerate(rows):
        at = 0
        for label, suffix in held:
            ids = [CLS, *(VOCABULARY.index(c) if c in VOCABULARY else UNK for c in label + suffix), SEP]
            tokens[row, at : at + len(ids)] = ids
            entries.append((row * row_len + at, 1 + len(label) + 1, SUFFIXES.index(suffix)))
            at += len(ids)
        if at < row_len:
            entries.append((row * row_len + at, 0, 0))
    starts, suffix_starts, suffix_ids = np.array(entries).T
    columns = {"suffix_starts": suffix_starts.astype(np.uint8), "suffix_ids": suffix_ids.astype(np.uint16)}
    return RowBlock(tokens, starts, np.full(len(rows), row_len), None, columns), rows


def hide(collator, block, keys=None):
    """The tokens of a copy of the block, in which targets are hidden, and the fields that say which."""
    copy = RowBlock(block.tokens.copy(), block.boundaries, block.lengths, None, block.columns)
    hidden = collator(copy, fold_in(0, np.arange(len(block.tokens))) if keys is None else keys)
    fields = {name: value if name == "num_targets" else value.numpy() for name, value in hidden.fields().items()}
    return copy.tokens, SimpleNamespace(**fields)


def per_name(block, rows, hidden, made):
    """For every name: its label and suffix, places of its targets, tokens before and after, types, class and weight."""
    before, after, types = block.tokens.reshape(-1), hidden.reshape(-1), made.token_type_ids.reshape(-1)
    used = made.masked_labels >= 0
    assert len(np.unique(made.masked_positions)) == len(made.masked_positions)
    assert np.array_equal(made.masked_labels[used], before[made.masked_positions[used]])
    is_target = np.zeros(before.size, dtype=bool)
    is_target[made.masked_positions[used]] = True
    assert np.array_equal(before[~is_target], after[~is_target])
    classes = {}
    if made.class_labels is not None:
        assert ((made.class_labels >= 0) | (made.class_weights == 0)).all()
        fields = (made.class_positions, made.class_labels, made.class_weights)
        classes = {
            at: (label, weight) for at, label, weight in zip(*map(np.ndarray.tolist, fields), strict=True) if label >= 0
        }
        assert len(classes) == (made.class_labels >= 0).sum()
    starts = block.boundaries[before[block.boundaries] == CLS]
    for start, (label, suffix) in zip(starts.tolist(), (name for row in rows for name in row), strict=True):
        inside = slice(start, start + len(label + suffix) + 2)
        yield SimpleNamespace(
            label=label,
            suffix=suffix,
            row=start // block.tokens.shape[1],
            targets=np.flatnonzero(is_target[inside]),
            before=before[inside],
            after=after[inside],
            types=types[inside],
            classified=classes.get(start),
        )


@pytest.fixture(scope="module")
def many():
    return rows_of(made_up_names(20_000), 512)


def is_rounded(value, exact):
    return value in (math.floor(exact), math.ceil(exact))


def close(total, exact, count):
    """Whether a sum of numbers that are rounded at random, each by less than 1, is as good as exact."""
    return abs(total - exact) < 5 * 0.5 * math.sqrt(count)


@pytest.mark.parametrize("mask_all", [False, True])
def test_counts_are_exact(many, mask_all):
    block, rows = many
    sums, hidden_of_row = np.zeros(4), np.zeros(len(rows))
    names = list(per_name(block, rows, *hide(DomainCollator(TOKENIZER, mask_all=mask_all), block)))
    for name in names:
        end = len(name.label) + 2  # of `[CLS]`, the characters before the suffix and its dot
        characters = name.targets[name.targets < end]
        exact = 0.3 * (end - 1)
        assert len(characters) >= 1 and is_rounded(len(characters), max(1, exact))
        kept = (name.after[characters] != MASK).sum()
        assert is_rounded(kept, 0 if mask_all else 0.1 * len(characters))
        sums += len(characters), max(1, exact), kept, 0.1 * len(characters)
        suffix = np.arange(end, end + len(name.suffix) - 1)
        hidden = name.classified is not None
        assert name.targets[name.targets >= end].tolist() == (suffix.tolist() if hidden else [])
        assert not hidden or (name.after[suffix] == MASK).all()
        text = np.frombuffer((name.label + name.suffix).encode(), np.uint8)
        kinds = character_kinds(text, np.array([len(text)]), np.array([end - 1]))
        suffix_id = 0 if hidden else SUFFIXES.index(name.suffix)
        assert name.types.tolist() == [4 * suffix_id, *(4 * suffix_id + kinds), 4 * suffix_id]
        if hidden:
            hidden_of_row[name.row] += 1
            assert name.classified == (SUFFIXES.index(name.suffix), pytest.approx(len(characters)))
    assert close(sums[0], sums[1], len(names)) and (mask_all or close(sums[2], sums[3], len(names)))
    assert all(is_rounded(count, 0.1 * len(row)) for count, row in zip(hidden_of_row, rows, strict=True))
    assert close(hidden_of_row.sum(), 0.1 * len(names), len(rows))


def test_a_rows_targets_depend_on_its_key_and_its_names_alone(many):
    block, _ = many
    keys, collator = fold_in(3, np.arange(len(block.tokens))), DomainCollator(TOKENIZER, mask_labels=0.3)
    hidden, made = hide(collator, block, keys)
    slots, classes = collator.slots(512), collator.class_slots(512)
    for row in (0, 7, len(block.tokens) - 1):
        entries = block.boundaries // 512 == row
        columns = {name: values[entries] for name, values in block.columns.items()}
        alone = RowBlock(block.tokens[row : row + 1], block.boundaries[entries] - row * 512, None, None, columns)
        tokens, found = hide(collator, alone, keys[row : row + 1])
        assert np.array_equal(tokens[0], hidden[row])
        assert np.array_equal(found.masked_positions, made.masked_positions[row * slots :][:slots] - row * 512)
        assert np.array_equal(found.class_positions, made.class_positions[row * classes :][:classes] - row * 512)
        assert np.array_equal(found.token_type_ids[0], made.token_type_ids[row])
    assert not np.array_equal(hide(collator, block, keys + np.uint64(1))[0], hidden)


OUT_OF_RANGE = {"mlm_probability": 1, "kept": -0.1, "suffix_probability": 2, "suffix_weight": -1, "mask_labels": 1.5}


@pytest.mark.parametrize(("key", "value"), [*OUT_OF_RANGE.items()])
def test_shares_that_are_none_are_refused(key, value):
    with pytest.raises(UserError) as error:
        DomainCollator(TOKENIZER, **{key: value})
    assert (error.value.key, error.value.code) == (key, "out_of_range")


def test_another_tokenizer_is_refused():
    with pytest.raises(UserError) as error:
        DomainCollator(SimpleNamespace(vocab_size=512))
    assert (error.value.key, error.value.code) == ("tokenizer", "no_domain_names")
