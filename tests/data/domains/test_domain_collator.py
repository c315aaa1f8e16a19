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

TOKENIZER = SimpleNamespace(vocab_size=len(VOCABULARY), domain=object())
PAD, UNK, CLS, SEP, MASK = range(5)
DOT = VOCABULARY.index(".")
SUFFIXES = [".com", ".org", ".co.uk", ".xn--p1ai", ".s3.dualstack.eu-west-1.amazonaws.com", ".o_g"]
SUFFIX_SHARES = [0.5, 0.2, 0.1, 0.04, 0.12, 0.04]


def made_up_names(count, seed=0):
    """Names as tuples: labels before the suffix, joined by dots, and the suffix."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz0123456789-"))
    labels = rng.choice([1, 2, 3], count, p=[0.8, 0.15, 0.05])
    lengths = iter(rng.geometric(0.06, labels.sum()).clip(1, 40).tolist())
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
    return rows_of(made_up_names(8_000), 512)


def kinds_of(text, suffix_start, tokens):
    """The kinds of a name's characters; a hidden dot before the suffix is a character like others."""
    shown = "".join("?" if i < suffix_start and tokens[i + 1] == MASK else one for i, one in enumerate(text))
    kinds = character_kinds(np.frombuffer(shown.encode(), np.uint8), np.array([len(shown)]), np.array([suffix_start]))
    if suffix_start and shown[suffix_start - 1] == "?":
        kinds[suffix_start - 1] = 0
    return kinds


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
        suffix = suffix[name.before[suffix] != UNK]
        hidden = name.classified is not None
        assert name.targets[name.targets >= end].tolist() == (suffix.tolist() if hidden else [])
        assert not hidden or (name.after[suffix] == MASK).all()
        kinds = kinds_of(name.label + name.suffix, end - 1, name.after)
        suffix_id = 0 if hidden else SUFFIXES.index(name.suffix)
        assert name.types.tolist() == [4 * suffix_id, *(4 * suffix_id + kinds), 4 * suffix_id]
        if hidden:
            hidden_of_row[name.row] += 1
            assert name.classified == (SUFFIXES.index(name.suffix), pytest.approx(len(characters)))
    assert close(sums[0], sums[1], len(names)) and (mask_all or close(sums[2], sums[3], len(names)))
    assert all(is_rounded(count, 0.1 * len(row)) for count, row in zip(hidden_of_row, rows, strict=True))
    assert close(hidden_of_row.sum(), 0.1 * len(names), len(rows))


def splitmix64(x):
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = ((x ^ x >> shift) * factor) % 2**64
    return x ^ x >> 31


def random_bits(key, row_len):
    """The 16 random bits of every token of a row: halves of MurmurHash3's finalizer over key and place, twice."""
    halves = []
    for place in range(-(-row_len // 2)):
        x = place * 0x9E3779B9 + key % 2**32
        for add in (0, key >> 32):
            x = (x + add) % 2**32
            for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
                x = ((x ^ x >> shift) * factor) % 2**32
        halves.append(divmod(x, 2**16))
    return [high for high, _ in halves] + [low for _, low in halves]


def reference(tokens, names, key, collator):
    """What is hidden in a row, written as loops: tokens, targets, ids of the hidden suffixes and their weights.

    Names are (start, first of the suffix, end, suffix id).
    """
    row_len, share = len(tokens), collator.suffix_probability
    bits, tokens, targets = random_bits(key, row_len), list(tokens), {}
    place_bits = (row_len - 1).bit_length()
    num_random = min(16, (31 if place_bits <= 10 else 63) - 2 * place_bits)
    orders, counts = [], []
    for start, suffix, _, _ in names:
        characters = [at for at in range(start + 1, suffix) if tokens[at] != UNK]
        orders.append(sorted(characters, key=lambda at: (bits[at] >> 16 - num_random, at)))
        counts.append(max(int(0.3 * len(characters) + bits[start] / 65536), len(characters) > 0))
    # Labels in the place of characters.
    spare = collator.slots(row_len) - math.ceil(share / 2 * row_len) - sum(counts)
    labels, more = {}, 0
    for index, (start, suffix, end, _) in enumerate(names):
        draw = (bits[start] + bits[suffix] + bits[end - 1]) % 2**16 / 65536
        if orders[index] and draw < collator.mask_labels:
            first = last = orders[index][0]
            while first - 1 > start and tokens[first - 1] != DOT:
                first -= 1
            while last < suffix and tokens[last] != DOT:
                last += 1
            label = [] if UNK in tokens[first:last] else list(range(first, last))
            more += len(label) - counts[index]
            if label and more <= spare:
                labels[index] = label
    hidden, sizes = list(tokens), []
    for index, (_, _, end, _) in enumerate(names):
        chosen = labels.get(index, orders[index][: counts[index]])
        kept = 0 if index in labels else int(collator.kept * len(chosen) + bits[end - 1] / 65536)
        targets |= {at: tokens[at] for at in chosen}
        for at in chosen[: len(chosen) - kept]:
            hidden[at] = MASK
        sizes.append(len(chosen))
    # Suffixes: the first names in random order, while there are slots.
    with_suffix = sorted(range(len(names)), key=lambda index: (bits[names[index][1]], index))
    dither = (splitmix64(key ^ 0x9E3779B97F4A7C15) >> 11) * 2.0**-53
    number = min(int(share * len(names) + dither), collator.class_slots(row_len)) if share else 0
    left, classes = collator.slots(row_len) - sum(sizes), {}
    for index in with_suffix[:number]:
        start, suffix, end, suffix_id = names[index]
        left -= end - 1 - suffix
        if left >= 0:
            weight = collator.suffix_weight / share * sizes[index]
            classes[start] = (suffix_id, pytest.approx(weight))
            for at in range(suffix, end - 1):
                if tokens[at] != UNK:
                    targets[at], hidden[at] = tokens[at], MASK
    return hidden, targets, classes


SETTINGS = [
    {},
    {"mask_labels": 0.4},
    {"mask_labels": 0.2, "suffix_probability": 0.5},  # long labels and suffixes for which there are no slots
    {"mask_labels": 1.0, "kept": 0.5, "suffix_probability": 0.6, "suffix_weight": 2.0},
    {"mask_all": True, "suffix_probability": 0.0},
]


@pytest.mark.parametrize("row_len", [64, 300, 2048])
@pytest.mark.parametrize("settings", SETTINGS)
def test_it_hides_what_the_definition_says(settings, row_len):
    names = [(label.replace("x", "_"), suffix) for label, suffix in made_up_names(200 + row_len // 4, seed=row_len)]
    block, rows = rows_of([name for name in names if len("".join(name)) < 62], row_len)
    collator, keys = DomainCollator(TOKENIZER, **settings), fold_in(1, np.arange(len(rows)))
    hidden, made = hide(collator, block, keys)
    slots, num_targets = collator.slots(row_len), 0
    for row, held in enumerate(rows):
        at, spans = 0, []
        for label, suffix in held:
            begin, at = at, at + len(label + suffix) + 2
            spans.append((begin, begin + len(label) + 2, at, SUFFIXES.index(suffix)))
        expected, targets, classes = reference(block.tokens[row].tolist(), spans, int(keys[row]), collator)
        assert hidden[row].tolist() == expected
        places, labels = (getattr(made, name)[row * slots :][:slots] for name in ("masked_positions", "masked_labels"))
        places = places - row * row_len
        assert (places >= 0).all() and (places < row_len).all() and len(set(places.tolist())) == slots
        used = labels >= 0
        assert dict(zip(places[used].tolist(), labels[used].tolist(), strict=True)) == targets
        assert (labels[~used] == -100).all()
        num_targets += len(targets)
        if not collator.suffix_probability:
            assert not hasattr(made, "class_labels")
            continue
        mine = slice(row * collator.class_slots(row_len), (row + 1) * collator.class_slots(row_len))
        fields = (made.class_positions[mine] - row * row_len, made.class_labels[mine], made.class_weights[mine])
        found = list(zip(*(field.tolist() for field in fields), strict=True))
        assert {start: (label, weight) for start, label, weight in found if label >= 0} == classes
        assert all((label, weight) == (-100, 0) for _, label, weight in found if label < 0)
        for begin, suffix, end, suffix_id in spans:
            text = "".join(held[spans.index((begin, suffix, end, suffix_id))])
            kinds = kinds_of(text, suffix - begin - 1, hidden[row, begin:end])
            first = 0 if begin in classes else 4 * suffix_id
            assert made.token_type_ids[row, begin:end].tolist() == [first, *(first + kinds).tolist(), first]
        assert not made.token_type_ids[row, at:].any()
    assert made.num_targets == num_targets


def test_rows_without_names_have_no_targets():
    block, _ = rows_of(made_up_names(10), 512)
    padding = RowBlock(np.zeros((2, 64), np.int64), np.array([0, 64]), np.zeros(2, np.int64), None, {})
    padding.columns.update({name: np.zeros(2, column.dtype) for name, column in block.columns.items()})
    hidden, made = hide(DomainCollator(TOKENIZER, mask_labels=0.5), padding)
    assert not hidden.any() and not made.token_type_ids.any() and made.num_targets == 0
    assert (made.masked_labels == -100).all() and (made.class_labels == -100).all() and not made.class_weights.any()
    assert len(np.unique(made.masked_positions)) == len(made.masked_positions)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_slots_are_enough_for_the_characters_of_any_names(p):
    collator = DomainCollator(TOKENIZER, p, suffix_probability=0.0)
    for row_len in (32, 64, 512):
        for n in range(2, min(row_len, 255) - 2):  # characters beside `[CLS]`, one of a suffix and `[SEP]`
            assert collator.slots(row_len) >= (row_len // (n + 3)) * math.ceil(p * n)
    assert DomainCollator(TOKENIZER).slots(512) == math.ceil(0.35 * 512)


def test_an_example_batch_has_the_shapes_of_real_ones():
    collator = DomainCollator(TOKENIZER)
    batch = collator.example_batch(3, 100)
    assert batch.input_ids.shape == batch.token_type_ids.shape == batch.position_ids.shape == (3, 100)
    assert batch.cu_seqlens is None and batch.position_ids.max() == 15
    assert len(batch.masked_labels) == 3 * collator.slots(100)
    assert len(batch.class_positions) == len(batch.class_labels) == len(batch.class_weights) == 3 * 2
    assert batch.num_targets == (batch.masked_labels >= 0).sum() > 0
    assert "token_type_ids" in batch.documents


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
        DomainCollator(SimpleNamespace(vocab_size=len(VOCABULARY), domain=None))
    assert (error.value.key, error.value.code) == ("tokenizer", "no_domain_names")
