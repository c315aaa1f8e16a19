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
from typing import NamedTuple

import numpy as np
import torch

from torchrecipes.data.batching.batch import Batch, dense_fields, document_fields
from torchrecipes.data.batching.mlm import IGNORED, hash32
from torchrecipes.data.batching.rows import RowBlock, Rows, source_fields
from torchrecipes.data.batching.shuffle import GOLDEN, fold_in, splitmix64
from torchrecipes.data.domains.encoding import CLS, DOT, MASK, NUM_KINDS, SEP, SEPARATOR, SUBDOMAIN, SUFFIX, VOCABULARY
from torchrecipes.data.tokenizers.tokenizer import Tokenizer
from torchrecipes.errors import UserError

SHORTEST = 5  # tokens: `[CLS] a . b [SEP]`
PLACE_BITS = 8  # a name has at most 255 tokens: 253 characters (RFC 1035, section 2.3.4), `[CLS]` and `[SEP]`
EXAMPLE = 16  # tokens of a made-up name


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
        if tokenizer.vocab_size != len(VOCABULARY):
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

        They are enough for the characters before the suffixes, whatever the names. What is left of them, and a share
        `suffix_probability` of the row, are for hidden suffixes, of which usual names need a fifth of that share; a
        share `mask_labels` of the row is for labels. A suffix or label for which there is no slot left is not hidden.
        """
        return min(seq_len, self._character_slots(seq_len, step) + math.ceil(self.suffix_probability * seq_len))

    def class_slots(self, seq_len: int) -> int:
        """Places for names whose suffix is hidden in every row of `seq_len` tokens."""
        return math.ceil(self.suffix_probability * max(1, seq_len // SHORTEST))

    def _character_slots(self, seq_len: int, step: int) -> int:
        # The most of any name: ceil(p * n) of n characters, `[CLS]` and `[SEP]`.
        n = np.arange(1, max(2, min(seq_len, 1 << PLACE_BITS) - 1))
        share = (np.ceil(self.probability(step) * n) / (n + 2)).max()
        return math.ceil(share * seq_len) + math.ceil(self.mask_labels * seq_len)

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
                hint="Make it with domain_names and domain_tokenizer (torchrecipes.data.domains), or set no collator.",
                code="no_suffixes",
            )
        hidden = self(block, row_keys, step)
        return Batch(
            input_ids=torch.from_numpy(block.tokens),
            **{name: torch.from_numpy(value) for name, value in hidden._asdict().items() if value is not None},
            num_targets=int((hidden.masked_labels != IGNORED).sum()),
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
            **{name: torch.from_numpy(value) for name, value in hidden._asdict().items() if value is not None},
            num_targets=int((hidden.masked_labels != IGNORED).sum()),
            **documents,
        )

    def __call__(self, block: RowBlock, row_keys: np.ndarray, step: int = 1) -> "Hidden":
        """Hides the targets in `block.tokens`, in place.

        Args:
            block: rows of complete names, with the columns `suffix_ids` and `suffix_starts`.
            row_keys: `[B]` uint64: the same key, the same choice.
            step: the optimizer step.
        """
        tokens, row_len = block.tokens, block.tokens.shape[1]
        names = _Names.of(block)
        keys = splitmix64(row_keys[names.row] ^ (names.in_row + 1).astype(np.uint64) * GOLDEN)
        dither, dither_kept, draw_label = ((keys >> np.uint64(16 * i) & np.uint64(0xFFFF)) / 65536 for i in range(3))
        count = np.floor(self.probability(step) * names.count + dither).astype(np.int64)
        count = np.maximum(count, names.count > 0)
        kept = np.floor(self.kept * count + dither_kept).astype(np.int64)
        draw = _draw(row_keys, names, row_len)
        ordered = np.sort(draw, axis=1)
        is_target, is_masked = (_smallest(draw, ordered, names, n) for n in (count, count - kept))
        if self.mask_labels:
            chosen = (draw_label < self.mask_labels) & (names.count > 0)
            self._hide_labels(names, chosen, ordered, count, is_target, is_masked, self._character_slots(row_len, step))
            count = np.add.reduceat(is_target.view(np.uint8), names.starts).astype(np.int64)
        slots = self.slots(row_len, step)
        has_class, classes = np.zeros(len(count), dtype=bool), {}
        if self.suffix_probability:
            left = slots - np.bincount(names.row, count, len(tokens)).astype(np.int64)
            which, is_hidden = self._choose_suffixes(names, row_keys, keys, left, self.class_slots(row_len))
            has_class[which[is_hidden]] = True
            weights = self.suffix_weight / self.suffix_probability * count[which]
            classes = {
                "class_positions": np.where(which < 0, np.arange(len(tokens))[:, None] * row_len, names.starts[which]),
                "class_labels": np.where(is_hidden, names.suffix_ids[which], IGNORED),
                "class_weights": np.where(is_hidden, weights, 0).astype(np.float32),
            }
            hidden = np.repeat(has_class, names.lengths) & names.is_suffix
            is_target |= hidden
            is_masked |= hidden
        types = np.repeat(np.where(has_class, 0, NUM_KINDS * names.suffix_ids), names.lengths) + _kinds(names)
        positions, labels = _in_slots(is_target, names.ids, len(tokens), slots)
        tokens.reshape(-1)[is_masked] = MASK
        flat = {name: values.reshape(-1) for name, values in classes.items()}
        return Hidden(positions, labels, types.reshape(tokens.shape), **flat)

    def _hide_labels(self, names, chosen, ordered, count, is_target, is_masked, slots):
        """Hides a label instead of characters in the names that are `chosen`, where the row has slots for it."""
        index = np.flatnonzero(chosen)
        starts = names.starts[index]
        first = ordered.reshape(-1)[starts].astype(np.int64)  # the character with the smallest number
        at = starts + ((first - names.in_row[index]) & ((1 << PLACE_BITS) - 1))
        dots = np.flatnonzero(names.is_outside & (names.ids == DOT))
        bounds = np.concatenate([[-1], dots, [len(names.ids)]])
        next_dot = dots.searchsorted(at)
        begin = np.maximum(starts, bounds[next_dot]) + 1
        sizes = np.minimum(starts + names.suffix_starts[index], bounds[next_dot + 1]) - begin

        row, num_rows = names.row[index], len(ordered)
        more = np.cumsum(sizes - count[index])
        before = np.concatenate([[0], more])[row.searchsorted(row)]
        left = slots - np.bincount(names.row, count, num_rows).astype(np.int64)
        fits = (more - before <= left[row]) & (sizes > 0)
        index, begin, sizes = index[fits], begin[fits], sizes[fits]
        of_name = np.zeros(len(count), dtype=bool)
        of_name[index] = True
        others = ~np.repeat(of_name, names.lengths)
        is_target &= others
        is_masked &= others
        label = np.arange(int(sizes.sum())) + np.repeat(begin - np.cumsum(sizes) + sizes, sizes)
        is_target[label] = is_masked[label] = names.is_outside[label]

    def _choose_suffixes(self, names, row_keys, keys, left, slots):
        """Chooses names whose suffix is hidden.

        Args:
            names: of all rows.
            row_keys, keys: of the rows and the names.
            left: `[B]`, the suffix characters of each row that may be hidden.
            slots: names of each row, at most.

        Returns:
            `[B, slots]`: names of each row in random order, -1 where there are no more, and whether each is hidden.
        """
        num_rows, width = len(row_keys), max(slots, int(names.number.max(initial=0)) + 1)
        none, number_bits = np.uint32(0xFFFFFFFF), np.uint32(16)
        # The number of a name in its row is its lower bits: no two are equal.
        order = np.full((num_rows, width), none, dtype=np.uint32)
        has_suffix = names.suffix_count > 0
        draw = (keys >> np.uint64(48)).astype(np.uint32) << number_bits | names.number.astype(np.uint32)
        order[names.row[has_suffix], names.number[has_suffix]] = draw[has_suffix]
        order = np.sort(order, axis=1)[:, :slots]
        which = np.where(order == none, -1, names.first_of_row[:, None] + (order & np.uint32(0xFFFF)))
        dither = (splitmix64(row_keys ^ GOLDEN) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        number = np.floor(self.suffix_probability * np.bincount(names.row, has_suffix, num_rows) + dither)
        is_hidden = (which >= 0) & (np.arange(slots) < number[:, None])
        sizes = np.where(is_hidden, names.suffix_count[which], 0)
        return which, is_hidden & (np.cumsum(sizes, axis=1) <= left[:, None])


class Hidden(NamedTuple):
    """The fields of a `Batch` that say what has been hidden: see there. `class_*` are None where no suffix is."""

    masked_positions: np.ndarray
    masked_labels: np.ndarray
    token_type_ids: np.ndarray
    class_positions: np.ndarray | None = None
    class_labels: np.ndarray | None = None
    class_weights: np.ndarray | None = None


class _Names(NamedTuple):
    """The D names of B rows of S tokens; padding is one more at the end of its row.

    Attributes:
        ids: `[B * S]` uint8, the tokens.
        is_outside, is_suffix: `[B * S]` bool: characters before a suffix, and those of one.
        starts, lengths: `[D]`: first token, counted over the flattened tokens, and tokens.
        row, number, in_row: `[D]`: the row, the number in the row and the place of the first token in it.
        first_of_row: `[B]`: the first name of each row.
        suffix_starts, suffix_ids: `[D]`: tokens before the suffix, and its id.
        count, suffix_count: `[D]`: characters before the suffix and in it.
    """

    ids: np.ndarray
    is_outside: np.ndarray
    is_suffix: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    row: np.ndarray
    number: np.ndarray
    in_row: np.ndarray
    first_of_row: np.ndarray
    suffix_starts: np.ndarray
    suffix_ids: np.ndarray
    count: np.ndarray
    suffix_count: np.ndarray

    @staticmethod
    def of(block: RowBlock) -> "_Names":
        num_rows, row_len = block.tokens.shape
        starts, size = block.boundaries, block.tokens.size
        lengths = np.diff(starts, append=size)
        row = starts // row_len
        first_of_row = starts.searchsorted(np.arange(num_rows) * row_len)
        suffix_starts, suffix_ids = (block.columns[name].astype(np.int64) for name in ("suffix_starts", "suffix_ids"))
        ids = block.tokens.reshape(-1).astype(np.uint8)
        is_character = ids > MASK
        is_after = np.arange(size) >= np.repeat(starts + suffix_starts, lengths)
        is_outside, is_suffix = is_character & ~is_after, is_character & is_after
        counts = (np.add.reduceat(mask.view(np.uint8), starts).astype(np.int64) for mask in (is_outside, is_suffix))
        number = np.arange(len(starts)) - first_of_row[row]
        places = (starts, lengths, row, number, starts - row * row_len, first_of_row)
        return _Names(ids, is_outside, is_suffix, *places, suffix_starts, suffix_ids, *counts)


def _draw(row_keys: np.ndarray, names: _Names, row_len: int) -> np.ndarray:
    """Different numbers for all tokens of a row, `[B, S]`.

    Those of a name are below those of the next. Within a name, those of the characters before the suffix are random and
    below the others.
    """
    # From the top: the name's number, one bit, the random ones, and the place in the row modulo 256.
    number_bits = max(1, (row_len - 1).bit_length())
    kind = np.uint32 if number_bits <= 11 else np.uint64
    width = 8 * np.dtype(kind).itemsize
    draw = hash32(row_keys, row_len).astype(kind) << kind(width - 32) >> kind(number_bits + 1)
    draw &= ~kind((1 << PLACE_BITS) - 1)
    draw |= (np.arange(row_len) % (1 << PLACE_BITS)).astype(kind)
    flat = draw.reshape(-1)
    flat |= (~names.is_outside).astype(kind) << kind(width - number_bits - 1)
    flat |= np.repeat(names.number.astype(kind) << kind(width - number_bits), names.lengths)
    return draw


def _smallest(draw: np.ndarray, ordered: np.ndarray, names: _Names, count: np.ndarray) -> np.ndarray:
    """Whether a token is among the `count` first of its name: `[B * S]` bool."""
    flat = ordered.reshape(-1)
    last = flat[names.starts + np.maximum(count, 1) - 1]
    # Of a name of which there is none, the limit is below all.
    limit = np.where(count > 0, last, flat[names.starts] - draw.dtype.type(1))
    return draw.reshape(-1) <= np.repeat(limit, names.lengths)


def _in_slots(is_target: np.ndarray, ids: np.ndarray, num_rows: int, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """The slots of each row: first its targets, then other tokens of its beginning, which have no label."""
    row_len = len(ids) // num_rows
    targets = np.flatnonzero(is_target)
    row = targets // row_len
    number = np.bincount(row, minlength=num_rows)
    # Among the first `slots` tokens there are as many that are no targets as slots without one, or more.
    spare = np.flatnonzero(~is_target.reshape(num_rows, row_len)[:, :slots].reshape(-1))
    spare_row, place = np.divmod(spare, slots)
    spare_number = np.bincount(spare_row, minlength=num_rows)
    rank = np.arange(len(spare)) - np.repeat(np.cumsum(spare_number) - spare_number, spare_number)
    used = rank < (slots - number)[spare_row]
    positions, labels = np.empty((2, num_rows * slots), dtype=np.int64)
    labels[:] = IGNORED
    slot = np.arange(len(targets)) + np.repeat(np.arange(num_rows) * slots - np.cumsum(number) + number, number)
    positions[slot], labels[slot] = targets, ids[targets]
    positions[(spare_row * slots + number[spare_row] + rank)[used]] = (spare_row * row_len + place)[used]
    return positions, labels


def _kinds(names: _Names) -> np.ndarray:
    """The kinds of all tokens, `[B * S]`: see `DomainEncoding.token_type_ids`."""
    kinds = names.is_suffix * np.int64(SUFFIX)
    dots = np.flatnonzero(names.is_outside & (names.ids == DOT))
    # What is before a dot that is not the one before the suffix is a subdomain.
    of_name = names.starts.searchsorted(dots, "right") - 1
    inner = dots + 1 < (names.starts + names.suffix_starts)[of_name]
    begin, end = names.starts[of_name[inner]] + 1, dots[inner]
    last = np.append(begin[1:] != begin[:-1], True)[: len(begin)]
    sizes = (end - begin)[last]
    kinds[np.arange(int(sizes.sum())) + np.repeat(begin[last] - np.cumsum(sizes) + sizes, sizes)] = SUBDOMAIN
    kinds[dots] = SEPARATOR
    return kinds


def _out_of_range(key: str, value: float, what: str) -> UserError:
    return UserError(f"{value} is not {what}", key=key, code="out_of_range")
