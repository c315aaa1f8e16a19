"""Shorter rows for short documents: attention on a CPU computes whole rows of scores, however short a document is."""

import numpy as np
import torch
from torch import Tensor

# Copying a token into a regrouped row and back costs about as much as attending to this many more tokens.
COST_IN_KEYS = 64


def document_lengths(cu_seqlens: Tensor, rows: int, row_len: int, max_seqlen: int | None) -> np.ndarray:
    """Document lengths in order, without empty documents.

    Raises:
        ValueError: the boundaries do not describe rows of documents of at most `max_seqlen` tokens.
    """
    bounds = cu_seqlens.numpy()
    lengths = np.diff(bounds)
    if bounds[0] != 0 or bounds[-1] != rows * row_len or (lengths < 0).any():
        raise ValueError(
            f"cu_seqlens must rise from 0 to the number of tokens, {rows} x {row_len}; it goes from {bounds[0]} to "
            f"{bounds[-1]}" + (" and falls in between" if (lengths < 0).any() else "")
        )
    crossed = np.setdiff1d(np.arange(row_len, rows * row_len, row_len), bounds)
    if crossed.size:
        raise ValueError(f"cu_seqlens has a document that crosses the end of row {crossed[0] // row_len - 1}")
    if max_seqlen is not None and lengths.max() > max_seqlen:
        raise ValueError(f"cu_seqlens has a document of {lengths.max()} tokens; max_seqlen is {max_seqlen}")
    return lengths[lengths > 0]


def regroup(lengths: np.ndarray, rows: int, row_len: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Document number of every slot, in rows as they are or in shorter rows where those cost less.

    Documents go in order into rows of L tokens; a new row whenever the next one does not fit. Two neighbouring rows
    hold more than L tokens, so there are at most `2 * tokens / L + 1` of them. L is the smallest of 64, 128, 256, ...
    that the longest document fits into: few lengths, since `torch.compile` compiles every one.

    Args:
        lengths: of the documents, as `document_lengths` returns them.
        rows, row_len: B and S.

    Returns:
        segments `[R, L]` int64 (-1 in an empty slot), gather and scatter as in `AttentionBackend` (None: rows as they
        are).
    """
    tokens = rows * row_len
    group_len = 64 << ((int(lengths.max()) - 1) // 64).bit_length()
    document_of_token = np.repeat(np.arange(len(lengths)), lengths)
    if group_len + COST_IN_KEYS >= row_len / 2:
        return torch.from_numpy(document_of_token.reshape(rows, row_len)), None, None

    first_slot = np.empty(len(lengths), dtype=np.int64)
    group, used = 0, 0
    for document, length in enumerate(lengths.tolist()):
        if used + length > group_len:
            group, used = group + 1, 0
        first_slot[document] = group * group_len + used
        used += length
    step = max(1, tokens // (4 * group_len))  # rows come in steps of a quarter of the least number: few shapes
    groups = -(-(group + 1) // step) * step
    document_start = np.cumsum(lengths) - lengths
    slot_of_token = np.arange(tokens) + np.repeat(first_slot - document_start, lengths)
    segments = np.full(groups * group_len, -1)
    segments[slot_of_token] = document_of_token
    gather = np.zeros(groups * group_len, dtype=np.int64)
    gather[slot_of_token] = np.arange(tokens)
    return (
        torch.from_numpy(segments.reshape(groups, group_len)),
        torch.from_numpy(gather.reshape(groups, group_len)),
        torch.from_numpy(slot_of_token.reshape(rows, row_len)),
    )
