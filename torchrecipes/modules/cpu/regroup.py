"""Short documents on a CPU, where attention computes whole rows of scores, however short a document is.

Documents of one length become rows of their own (`group_by_length`); or, where a backend takes rows of one length only,
several documents share a shorter row (`regroup`).
"""

import numpy as np
import torch
from torch import Tensor

# Copying a token into a regrouped row and back costs about as much as attending to this many more tokens.
COST_IN_KEYS = 64
# The calls for documents of one more length cost about as much as this many pairs of tokens.
COST_OF_LENGTH = 1000


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


def group_by_length(lengths: np.ndarray, row_len: int) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """Groups documents of the same length, or returns None where rows as they are cost less.

    Args:
        lengths: of the documents, as `document_lengths` returns them.
        row_len: S.

    Returns:
        groups `[G, 2]` int64: the number of documents and their length; gather `[tokens]` int64, the token in each
        place of the groups, and scatter, the place of each token. None for both: the groups are in the order of the
        documents, as they are where these are sorted by length, but for the padding after them.
    """
    tokens = int(lengths.sum())
    sizes, counts = np.unique(lengths, return_counts=True)
    cost = (sizes**2 * counts).sum() + COST_IN_KEYS * tokens + COST_OF_LENGTH * len(sizes)
    if cost > 0.75 * tokens * row_len:
        return None
    first_of_run = np.flatnonzero(np.diff(lengths, prepend=-1))
    if len(first_of_run) <= len(sizes) + 1:
        runs = np.diff(first_of_run, append=len(lengths))
        return torch.from_numpy(np.stack([runs, lengths[first_of_run]], axis=1)), None, None
    groups = torch.from_numpy(np.stack([counts, sizes], axis=1))
    order = np.argsort(lengths, kind="stable")
    starts, sorted_lengths = np.cumsum(lengths) - lengths, lengths[order]
    first_place = np.cumsum(sorted_lengths) - sorted_lengths
    gather = np.arange(tokens) + np.repeat(starts[order] - first_place, sorted_lengths)
    scatter = np.empty_like(gather)
    scatter[gather] = np.arange(tokens)
    return groups, torch.from_numpy(gather), torch.from_numpy(scatter)


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
