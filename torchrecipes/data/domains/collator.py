"""Masked language modeling on domain names: chooses and hides characters, complete labels and public suffixes.

1. A row of packed names has a 64-bit key. All that is drawn for a name is a function of this key and of where the name
   starts in the row: not of the other rows of a batch, of ranks or of workers.
2. Of the n characters before the suffix, dots included, k different ones are chosen at random: k is p * n, rounded up
   or down at random so that its mean is exactly p * n, and at least 1. Of these, 10 % stay as they are, rounded in the
   same way; the others become `[MASK]`.
3. In a share of the names, a label takes the place of the k characters: that of a character chosen at random, a dot
   counting as the character before it. All of it becomes `[MASK]`.
4. In 10 % of the names of a row, rounded in the same way, the suffix is hidden, too: its characters become `[MASK]` and
   are targets, the suffix id in the name's token types is 0, and the id is the class to predict.
5. The slots of a batch are fixed, for characters and for classes: see `DomainCollator.slots`.

The scheme is that of BERT (Devlin et al. 2018, 1810.04805, section 3.1), applied to every name instead of every row.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchrecipes.data.batching.batch import Batch, dense_fields, document_fields
from torchrecipes.data.batching.mlm import IGNORED, hash32
from torchrecipes.data.batching.rows import RowBlock, Rows, source_fields
from torchrecipes.data.batching.shuffle import GOLDEN, fold_in, splitmix64
from torchrecipes.data.domains.encoding import (
    CLS,
    DOT,
    MASK,
    SEP,
    VOCABULARY,
)
from torchrecipes.data.domains.names_in_rows import NamesInRows, fill_token_types, ranges
from torchrecipes.data.tokenizers.tokenizer import Tokenizer
from torchrecipes.errors import UserError

SHORTEST = 5  # tokens: `[CLS] a . b [SEP]`
LONGEST = 255  # tokens: 253 characters (RFC 1035, section 2.3.4), `[CLS]` and `[SEP]`
EXAMPLE = 16  # tokens of a made-up name
TOKENS_AT_ONCE = 2**16  # whose intermediate results fit into a core's cache


class DomainCollator:
    """Chooses and hides characters and suffixes.

    Args:
        tokenizer: of domain names.
        mlm_probability: p, the share of the characters before the suffix to predict, or a function of the optimizer
            step, counted from 1. Loader workers that are spawned need one that can be pickled.
        mask_all: every chosen character becomes `[MASK]`: `kept` is 0.
        kept: the share of the chosen characters that stay as they are.
        suffix_probability: the share of the names whose suffix is hidden. 0: none, and no class is predicted.
        suffix_weight: what the loss of the class counts beside that of the characters. The weight of a name whose
            suffix is hidden is `suffix_weight / suffix_probability` for each of its targets before the suffix. So in
            the mean over many names the sum of the class losses has `suffix_weight` times as many terms as that of the
            characters, and a loss that is divided by all targets of a step is right on any number of ranks.
        mask_labels: the share of the names in which a complete label is hidden instead of single characters.

    Raises:
        UserError: a share is out of range (code `out_of_range`); the tokenizer is not one of domain names
            (`no_domain_names`).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        mlm_probability: float | Callable[[int], float] = 0.3,
        mask_all: bool = False,
        *,
        kept: float = 0.1,
        suffix_probability: float = 0.1,
        suffix_weight: float = 0.1,
        mask_labels: float = 0.0,
    ):
        if not callable(mlm_probability) and not 0 < mlm_probability < 1:
            raise _out_of_range("mlm_probability", mlm_probability, "a share of the characters, between 0 and 1")
        shares = {"kept": kept, "suffix_probability": suffix_probability, "mask_labels": mask_labels}
        for key, share in shares.items():
            if not 0 <= share <= 1:
                raise _out_of_range(key, share, "a share from 0 to 1")
        if not suffix_weight >= 0:
            raise _out_of_range("suffix_weight", suffix_weight, "0 or more")
        if tokenizer.domain is None:
            raise UserError(
                "the tokenizer is not one of domain names",
                key="tokenizer",
                hint="Set tokenizer._component_=torchrecipes.data.domains.domain_tokenizer.",
                code="no_domain_names",
            )
        self.mlm_probability, self.kept = mlm_probability, 0.0 if mask_all else kept
        self.suffix_probability, self.suffix_weight, self.mask_labels = suffix_probability, suffix_weight, mask_labels

    def probability(self, step: int) -> float:
        """p at an optimizer step, counted from 1."""
        return self.mlm_probability(step) if callable(self.mlm_probability) else self.mlm_probability

    def slots(self, seq_len: int, step: int = 1) -> int:
        """Places for targets in every row of `seq_len` tokens.

        They are enough for the characters before the suffixes, whatever the names. What is left of them, and half the
        share `suffix_probability` of the row, is for hidden suffixes; usual names need a fifth of that share. A share
        `mask_labels` of the row is for labels. A suffix or label for which a row has no slots left is not hidden.
        """
        share = _largest_share(self.probability(step), min(seq_len, LONGEST)) + self.suffix_probability / 2
        return min(seq_len, math.ceil((share + self.mask_labels) * seq_len))

    def class_slots(self, seq_len: int) -> int:
        """Places for names whose suffix is hidden in every row of `seq_len` tokens."""
        return math.ceil(self.suffix_probability * max(1, seq_len // SHORTEST))

    def batch(self, dataset: Rows, numbers: np.ndarray, row_keys: np.ndarray, step: int = 1) -> Batch:
        """Reads rows and hides their targets.

        Args:
            dataset: the rows, of complete names.
            numbers: `[B]`, the rows' numbers; -1 is a row of padding.
            row_keys: `[B]` uint64, from which the targets are drawn.
            step: the optimizer step, for a probability that depends on it.

        Raises:
            UserError: the corpus says nothing about the suffixes of its documents (code `no_suffixes`).
        """
        block = dataset.rows(numbers)
        if "suffix_ids" not in block.columns:
            raise UserError(
                "the corpus does not say which suffix its documents have",
                key="collator",
                hint="Make it with domain_names and domain_tokenizer (torchrecipes.data.domains), or set "
                "collator._component_=torchrecipes.data.MLMCollator.",
                code="no_suffixes",
            )
        hidden = self(block, row_keys, step)
        return Batch(
            input_ids=torch.from_numpy(block.tokens),
            **hidden.fields(),
            **document_fields(block.boundaries, block.tokens.shape),
            **source_fields(dataset, block),
        )

    def example_batch(self, num_rows: int, seq_len: int) -> Batch:
        """A batch of the shapes of real ones, with made-up names of 16 tokens: for estimates and trial steps.

        Rows are dense (`cu_seqlens` is None), while positions begin again with every name. A probability that depends
        on the step takes the larger of its values at the first step and far into a run.
        """
        tokens = np.full((num_rows, seq_len), VOCABULARY.index("a"), dtype=np.int64)
        starts = (np.arange(num_rows)[:, None] * seq_len + np.arange(0, seq_len, EXAMPLE)).reshape(-1)
        lengths = np.diff(starts, append=tokens.size)
        flat = tokens.reshape(-1)
        flat[starts + lengths - 1], flat[starts] = SEP, CLS
        suffix_starts = np.maximum(1, lengths - 4)
        flat[(starts + suffix_starts - 1)[lengths == EXAMPLE]] = DOT
        columns = {"suffix_ids": np.ones(len(starts), np.uint16), "suffix_starts": suffix_starts.astype(np.uint8)}
        block = RowBlock(tokens, starts, np.full(num_rows, seq_len), None, columns)
        hidden = self(block, fold_in(np.arange(num_rows)), max((1, 10**9), key=self.probability))
        documents = dense_fields(tokens.shape)
        documents["position_ids"] = documents["position_ids"] % EXAMPLE
        return Batch(
            input_ids=torch.from_numpy(tokens),
            **hidden.fields(),
            **documents,
        )

    def __call__(self, block: RowBlock, row_keys: np.ndarray, step: int = 1) -> "Hidden":
        """Hides the targets in `block.tokens`, in place.

        Args:
            block: rows of complete names, with the columns `suffix_ids` and `suffix_starts`.
            row_keys: `[B]` uint64: the same key, the same choice.
            step: the optimizer step.
        """
        num_rows, row_len = block.tokens.shape
        hidden = Hidden.empty(num_rows, row_len, self.slots(row_len, step), self.class_slots(row_len))
        rows_at_once = max(1, TOKENS_AT_ONCE // row_len)
        for first in range(0, num_rows, rows_at_once):
            rows = slice(first, first + rows_at_once)
            names = NamesInRows.of(block, rows)
            self._hide(names, block.tokens[rows], row_keys[rows], step, Hidden(*(field[rows] for field in hidden)))
        if num_rows > rows_at_once:  # positions count in their part of the rows
            first = np.arange(num_rows)[:, None] // rows_at_once * (rows_at_once * row_len)
            hidden.masked_positions[:] += first
            hidden.class_positions[:] += first
        return hidden

    def _hide(self, names: NamesInRows, tokens: np.ndarray, row_keys: np.ndarray, step: int, hidden: "Hidden") -> None:
        """Hides the targets of some rows and fills in their part of `hidden`."""
        (num_rows, row_len), slots = tokens.shape, hidden.masked_positions.shape[1]
        # Tokens that are never drawn lend their random bits to what is drawn for their name.
        bits = _random_bits(row_keys, row_len)
        first, middle, last = (bits.reshape(-1)[at] for at in (names.starts, names.suffixes, names.ends - 1))
        count = (self.probability(step) * names.count + first * 2.0**-16).astype(np.int64)
        count = np.maximum(count, names.count > 0)
        order = _order(names, bits)
        ordered, place = np.sort(order, axis=1).reshape(-1), order.dtype.type(_mask(row_len))

        label_sizes, of_labels = 0, None
        if self.mask_labels:
            chosen = np.flatnonzero(((first + last + middle) * 2.0**-16 < self.mask_labels) & (names.count > 0))
            at = (ordered[names.starts[chosen]] & place).astype(np.int64) + names.row_starts[chosen]
            left = slots - math.ceil(self.suffix_probability / 2 * row_len) - np.add.reduceat(count, names.first_of_row)
            label_starts, label_sizes = _labels(names, chosen, at, count, left)
            count[label_sizes > 0] = 0
            of_labels = ranges(label_starts, label_sizes)
        # Of a name the first in order are targets, and of these the last stay as they are.
        limit = ordered[names.starts + np.maximum(count, 1) - 1] - (count == 0)
        is_target = order.reshape(-1) <= np.repeat(limit, names.lengths)
        if of_labels is not None:
            is_target[of_labels] = True
        kept = (self.kept * count + last * 2.0**-16).astype(np.int64)
        stay = (ordered[ranges(names.starts + count - kept, kept)] & place).astype(np.int64)
        stay += np.repeat(names.row_starts, kept)

        has_class = np.zeros(len(count), dtype=bool)
        if self.suffix_probability:
            count += label_sizes
            left = slots - np.add.reduceat(count, names.first_of_row)
            which, is_hidden = _suffixes(
                names, middle, row_keys, self.suffix_probability, left, self.class_slots(row_len)
            )
            has_class[which[is_hidden]] = True
            hidden.class_positions[:] = names.starts[which]
            hidden.class_labels[:] = np.where(is_hidden, names.suffix_ids[which], IGNORED)
            hidden.class_weights[:] = is_hidden * count[which] * (self.suffix_weight / self.suffix_probability)
            is_target[ranges(names.suffixes[has_class], names.suffix_sizes[has_class])] = True
            is_target[names.unknown] = False

        _fill_slots(is_target.reshape(num_rows, row_len), names.ids, hidden.masked_positions, hidden.masked_labels)
        # Arithmetic on bytes: a copy with a mask would be ten times as slow.
        ids = (names.ids & (is_target.view(np.uint8) - np.uint8(1))) | is_target * np.uint8(MASK)
        ids[stay] = names.ids[stay]
        tokens[:] = ids.reshape(tokens.shape)
        fill_token_types(names, ids, has_class, hidden.token_type_ids)


class Hidden(NamedTuple):
    """The fields of a `Batch` that say what has been hidden, as `[B, ...]`: see there."""

    masked_positions: np.ndarray
    masked_labels: np.ndarray
    token_type_ids: np.ndarray
    class_positions: np.ndarray
    class_labels: np.ndarray
    class_weights: np.ndarray

    @staticmethod
    def empty(num_rows: int, row_len: int, slots: int, class_slots: int) -> "Hidden":
        """Arrays of these shapes, with any values."""
        sizes = (slots, slots, row_len, class_slots, class_slots)
        weights = np.empty((num_rows, class_slots), np.float32)
        return Hidden(*(np.empty((num_rows, size), np.int64) for size in sizes), weights)

    def fields(self) -> dict[str, Tensor | int]:
        """The keyword arguments of a `Batch`."""
        fields: dict[str, Any] = {"num_targets": int(np.count_nonzero(self.masked_labels >= 0))}
        for name, array in self._asdict().items():
            if array.size or not name.startswith("class_"):
                fields[name] = torch.from_numpy(array if name == "token_type_ids" else array.reshape(-1))
        return fields


def _random_bits(row_keys: np.ndarray, row_len: int) -> np.ndarray:
    """16 random bits for every token: uint16 `[B, S]`."""
    half = -(-row_len // 2)
    draw = hash32(row_keys, half)
    bits = np.empty((len(row_keys), row_len), dtype=np.uint16)
    bits[:, :half] = draw >> np.uint32(16)
    bits[:, half:] = draw[:, : row_len - half] & np.uint32(0xFFFF)
    return bits


def _order(names: NamesInRows, bits: np.ndarray) -> np.ndarray:
    """Different numbers for the tokens of a row, `[B, S]`: from the smallest on, they are name by name.

    The characters before the suffix of a name come first, in random order.
    """
    # From the top: where the name starts in its row, whether the token is no such character, random bits, and the place
    # in the row, by which all numbers are different.
    row_len = bits.shape[1]
    num_bits = _mask(row_len).bit_length()
    kind, width = (np.uint32, 32) if num_bits <= 10 else (np.uint64, 64)
    start, is_other = names.in_row.astype(kind) << kind(width - num_bits), kind(1 << width - num_bits - 1)
    order = names.repeat(start, start | is_other)
    order[names.starts] |= is_other
    order[names.unknown] |= is_other
    order = order.reshape(bits.shape)
    num_random = min(16, width - 2 * num_bits - 1)
    draw = (bits >> np.uint16(16 - num_random)).astype(kind)
    draw <<= kind(num_bits)
    draw |= np.arange(row_len, dtype=kind)
    order |= draw
    return order


def _mask(row_len: int) -> int:
    """The bits of a place in a row."""
    return (1 << max(1, (row_len - 1).bit_length())) - 1


def _labels(
    names: NamesInRows, chosen: np.ndarray, at: np.ndarray, count: np.ndarray, left: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The labels that are hidden instead of characters.

    Args:
        names: of all rows.
        chosen: the names of which one is to be hidden.
        at: a character of each. It is in the label, or the dot after it.
        count: `[D]`, the characters that would be hidden.
        left: `[B]`, further tokens of a row that may be.

    Returns:
        `[D]` starts and sizes; size 0 in names whose label is not hidden.
    """
    dots = np.flatnonzero(names.ids == DOT)
    bounds = np.concatenate([[-1], dots, [len(names.ids)]])
    next_dot = dots.searchsorted(at)
    begin = np.maximum(names.starts[chosen], bounds[next_dot]) + 1
    size = np.minimum(names.suffixes[chosen], bounds[next_dot + 1]) - begin
    if len(names.unknown):  # a label with one is not hidden
        size[names.unknown.searchsorted(begin) != names.unknown.searchsorted(begin + size)] = 0
    row = names.row[chosen]
    more = np.concatenate([[0], np.cumsum(size - count[chosen])])
    fits = more[1:] - more[row.searchsorted(row)] <= left[row]
    starts, sizes = np.zeros((2, len(count)), dtype=np.int64)
    starts[chosen], sizes[chosen] = begin, size * fits
    return starts, sizes


def _suffixes(
    names: NamesInRows, bits: np.ndarray, row_keys: np.ndarray, share: float, left: np.ndarray, slots: int
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses the names whose suffix is hidden.

    Args:
        names: of all rows.
        bits: `[D]` uint16, by which they are ordered.
        row_keys: `[B]`.
        share: of the names of a row.
        left: `[B]`, tokens of a row that may be hidden.
        slots: names of a row, at most.

    Returns:
        `[B, slots]`: names of each row in random order, its first name where there are no more, and whether each is
        hidden.
    """
    num_rows, none = len(left), np.uint32(2**32 - 1)
    # The number of a name in its row is its lower bits: no two are equal.
    order = np.full((num_rows, max(slots, int(names.number.max()) + 1)), none)
    has_suffix = names.suffix_sizes > 0
    key = bits.astype(np.uint32) << np.uint32(16) | names.number.astype(np.uint32)
    order[names.row, names.number] = np.where(has_suffix, key, none)
    order.sort(axis=1)
    order = order[:, :slots]
    is_name = order != none
    which = names.first_of_row[:, None] + (order & np.uint32(2**16 - 1)) * is_name
    dither = (splitmix64(row_keys ^ GOLDEN) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    count = (share * np.add.reduceat(has_suffix, names.first_of_row, dtype=np.int64) + dither).astype(np.int64)
    is_hidden = is_name & (np.arange(slots) < count[:, None])
    return which, is_hidden & (np.cumsum(names.suffix_sizes[which] * is_hidden, axis=1) <= left[:, None])


def _fill_slots(is_target: np.ndarray, ids: np.ndarray, positions: np.ndarray, labels: np.ndarray) -> None:
    """Fills the slots of every row: first with its targets, then with other tokens, which have no label.

    Args:
        is_target: `[B, S]` bool.
        ids: `[B * S]`, the tokens.
        positions, labels: `[B, slots]`, to be filled.
    """
    (num_rows, row_len), slots = is_target.shape, positions.shape[1]
    # One number for every token, to be sorted: its place, and above it a bit that targets do not have.
    kind = np.uint16 if row_len <= 2**15 else np.uint32
    shift = kind(8 * np.dtype(kind).itemsize - 1)
    order = (~is_target).astype(kind)
    order <<= shift
    order |= np.arange(row_len, dtype=kind)
    order.sort(axis=1)
    order = order[:, :slots]
    positions[:] = order & ~(kind(1) << shift)
    positions += np.arange(num_rows)[:, None] * row_len
    labels[:] = ids.take(positions)
    np.copyto(labels, IGNORED, where=order >= kind(1) << shift)


@lru_cache
def _largest_share(probability: float, longest: int) -> float:
    """The largest share of a name's tokens that are targets, for names of up to `longest` tokens."""
    # ceil(p * n) of n characters, beside `[CLS]`, a suffix and `[SEP]`.
    return max(math.ceil(probability * n) / (n + 3) for n in range(2, max(3, longest - 2)))


def _out_of_range(key: str, value: float, what: str) -> UserError:
    return UserError(f"{value} is not {what}", key=key, code="out_of_range")
