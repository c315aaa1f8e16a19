"""Masked language modeling: chooses and hides the tokens to predict (Devlin et al. 2018, 1810.04805, section 3.1).

1. Every row has a 64-bit key; everything drawn for it is a function of that key and the position, computed for the
   batch at once. There is no generator with a state.
2. Of a row's n ordinary tokens (not special, not padding) k different ones are chosen at random. k is p * n, rounded up
   or down at random so that its mean is exactly p * n, and at least 1: every row with an ordinary token has a target.
3. Of the k, 80 % become `[MASK]`, 10 % a random ordinary token and 10 % stay, rounded in the same way. So the fractions
   over a corpus are exact: (1 - p) unchanged, 0.8 p, 0.1 p, 0.1 p.
4. The slots of a batch are fixed: ceil(p * S) in every row. An unused one points at a token that is no target, another
   for every slot: adding up the gradients of one token from many slots would make the threads of a GPU wait.
5. p may be a function of the optimizer step. The loader evaluates it where it makes the batch, in a worker too.
"""

import math
from collections.abc import Callable

import numpy as np
import torch

from torchrecipes.data.batching.batch import Batch, dense_fields, document_fields
from torchrecipes.data.batching.rows import Rows, source_fields
from torchrecipes.data.batching.shuffle import fold_in
from torchrecipes.data.tokenizers.tokenizer import Tokenizer
from torchrecipes.errors import UserError

IGNORED = -100  # the label of an unused slot


class MLMCollator:
    """Chooses and hides targets.

    Args:
        tokenizer: its special tokens (also `[UNK]` and vocabulary padding) are never targets or replacements.
        mlm_probability: p, the fraction of ordinary tokens to predict (NeoBERT: 0.2, BERT: 0.15), or a function of the
            optimizer step, counted from 1. Loader workers that are spawned need one that can be pickled.
        mask_all: every chosen token becomes `[MASK]` (NeoBERT); else 80 / 10 / 10.

    Raises:
        UserError: p is not between 0 and 1, or the tokenizer has no mask or no ordinary token.
    """

    def __init__(
        self, tokenizer: Tokenizer, mlm_probability: float | Callable[[int], float] = 0.2, *, mask_all: bool = False
    ):
        if not callable(mlm_probability) and not 0 < mlm_probability < 1:
            raise UserError(
                f"{mlm_probability} is not a share of the tokens, between 0 and 1",
                key="mlm_probability",
                code="out_of_range",
            )
        if tokenizer.mask_id is None:
            raise UserError(
                "the tokenizer has no mask token, so it cannot be used for masked language modeling",
                key="tokenizer",
                code="no_mask_token",
            )
        self.mlm_probability, self.mask_all, self.mask_id = mlm_probability, mask_all, tokenizer.mask_id
        is_special = np.zeros(tokenizer.vocab_size, dtype=bool)
        is_special[tokenizer.special_ids] = True
        self._is_special = is_special
        self._ordinary = np.flatnonzero(~is_special)
        if not self._ordinary.size:
            raise UserError("the tokenizer has special tokens only; there is nothing to predict", key="tokenizer")

    def probability(self, step: int) -> float:
        """p at an optimizer step, counted from 1."""
        return self.mlm_probability(step) if callable(self.mlm_probability) else self.mlm_probability

    def slots(self, seq_len: int, step: int = 1) -> int:
        """Places for targets in every row of `seq_len` tokens."""
        return math.ceil(self.probability(step) * seq_len)

    def batch(self, rows: Rows, numbers: np.ndarray, keys: np.ndarray, step: int = 1) -> Batch:
        """Reads rows and hides their targets.

        Args:
            rows: the rows.
            numbers: `[B]`, the rows' numbers; -1 is a row of padding.
            keys: `[B]` uint64, from which the targets are drawn.
            step: the optimizer step, for a probability that depends on it.
        """
        block = rows.rows(numbers)
        documents = document_fields(block.boundaries, block.tokens.shape)
        positions, labels, num_targets = self(block.tokens, keys, step)
        return Batch(
            input_ids=torch.from_numpy(block.tokens),
            num_targets=num_targets,
            masked_positions=torch.from_numpy(positions),
            masked_labels=torch.from_numpy(labels),
            **documents,
            **source_fields(rows, block),
        )

    def example_batch(self, num_rows: int, seq_len: int) -> Batch:
        """A batch of the shapes of real ones, with made-up tokens: for estimates and trial steps.

        Rows are dense (`cu_seqlens` is None). A probability that depends on the step takes the larger of its values at
        the first step and far into a run.
        """
        tokens = np.full((num_rows, seq_len), self._ordinary[0], dtype=np.int64)
        step = max((1, 10**9), key=self.probability)
        positions, labels, num_targets = self(tokens, fold_in(np.arange(num_rows)), step)
        return Batch(
            input_ids=torch.from_numpy(tokens),
            num_targets=num_targets,
            masked_positions=torch.from_numpy(positions),
            masked_labels=torch.from_numpy(labels),
            **dense_fields(tokens.shape),
        )

    def __call__(self, tokens: np.ndarray, row_keys: np.ndarray, step: int = 1) -> tuple[np.ndarray, np.ndarray, int]:
        """Hides the targets in `tokens`, in place.

        Args:
            tokens: `[B, S]` int64; S up to 2**20.
            row_keys: `[B]` uint64: the same key, the same choice.
            step: the optimizer step.

        Returns:
            positions `[B * slots]` int64 into the flattened tokens, labels `[B * slots]` int64 with -100 in unused
            slots, and the number of targets.
        """
        (rows, row_len), slots = tokens.shape, self.slots(tokens.shape[1], step)
        ordinary = ~self._is_special[tokens]
        count = ordinary.sum(1)
        keys = fold_in(row_keys[:, None], np.arange(2))
        dither, dither_kinds = ((keys >> np.uint64(11)).astype(np.float64) * 2.0**-53).T
        chosen = np.floor(self.probability(step) * count + dither).astype(np.int64)
        chosen = np.maximum(chosen, count > 0)

        # The k smallest of random numbers, one for each position. The position is their lower bits: no two are equal.
        bits = np.uint32(max(1, (row_len - 1).bit_length()))
        draw = hash32(row_keys, row_len) >> np.uint32(1)
        draw &= ~((np.uint32(1) << bits) - np.uint32(1))
        draw |= np.arange(row_len, dtype=np.uint32)
        draw |= (~ordinary).astype(np.uint32) << np.uint32(31)
        draw.sort(axis=1)
        position = (draw[:, :slots] & ((np.uint32(1) << bits) - np.uint32(1))).astype(np.int64)
        position += np.arange(rows)[:, None] * row_len

        rank = np.arange(slots)
        used = rank < chosen[:, None]
        flat = tokens.reshape(-1)
        label = np.where(used, flat[position], IGNORED)
        if self.mask_all:
            flat[position[used]] = self.mask_id
        else:
            masked = rank < np.floor(0.8 * chosen + dither_kinds).astype(np.int64)[:, None]
            replaced = (rank < np.floor(0.9 * chosen + dither_kinds).astype(np.int64)[:, None]) & ~masked
            flat[position[masked]] = self.mask_id
            noise = hash32(keys[:, 0], slots)[replaced].astype(np.uint64)
            flat[position[replaced]] = self._ordinary[(noise * np.uint64(self._ordinary.size)) >> np.uint64(32)]
        return position.reshape(-1), label.reshape(-1), int(chosen.sum())


def hash32(row_keys: np.ndarray, row_len: int) -> np.ndarray:
    """A random 32-bit number for every position, `[B, row_len]`: MurmurHash3's finalizer over both, twice."""
    low, high = row_keys.astype(np.uint32), (row_keys >> np.uint64(32)).astype(np.uint32)
    x = np.arange(row_len, dtype=np.uint32) * np.uint32(0x9E3779B9) + low[:, None]
    _finalize(x)
    x += high[:, None]
    _finalize(x)
    return x


def _finalize(x: np.ndarray) -> None:
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(13)
    x *= np.uint32(0xC2B2AE35)
    x ^= x >> np.uint32(16)
