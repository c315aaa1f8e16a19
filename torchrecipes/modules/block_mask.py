"""Block masks for `flex_attention` (Dong et al. 2024, arXiv:2412.05496), made from document numbers.

PyTorch's `create_block_mask` computes the mask of every pair of tokens and then reduces it to blocks. Numbers of
documents rise along a row, so the first and the last number of each block say the same: two blocks share a document if
their ranges overlap. That takes a few small kernels per forward pass, whatever the row's length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # queries, and keys, that a thread block of the kernel takes at once


def document_block_mask(
    document_ids: Tensor | None, row_len: int, *, causal: bool, window: int | None, device: torch.device
) -> BlockMask:
    """The mask by which a token sees the tokens of its own document, causally and within a window if asked for.

    Args:
        document_ids: `[B, S]` integers that never fall along a row. None: every row is one document.
        row_len: S.
        causal: a token sees no later token.
        window: a token sees no token further away than this. None: no bound.
        device: of the mask, and of `document_ids`.
    """
    from torch.nn.attention.flex_attention import BlockMask  # imports dynamo, 1.5 s of CPU

    starts = torch.arange(0, row_len, BLOCK, device=device)
    ends = (starts + BLOCK - 1).clamp(max=row_len - 1)
    # Queries minus keys: the least and the greatest distance within a pair of blocks.
    least, greatest = starts[:, None] - ends[None, :], ends[:, None] - starts[None, :]
    some = torch.ones_like(least, dtype=torch.bool)
    every = (starts + BLOCK <= row_len).expand_as(least) & (starts + BLOCK <= row_len)[:, None]
    if causal:
        some, every = some & (greatest >= 0), every & (least >= 0)
    if window is not None:
        some = some & (least <= window) & (greatest >= -window)
        every = every & (greatest <= window) & (least >= -window)
    some, every = some[None], every[None]
    if document_ids is not None:
        first, last = document_ids[:, starts], document_ids[:, ends]
        some = some & (first[:, :, None] <= last[:, None, :]) & (first[:, None, :] <= last[:, :, None])
        every = every & (first[:, :, None] == last[:, None, :]) & (first[:, None, :] == last[:, :, None])

    partial = some & ~every
    dense = torch.stack((partial, every, partial.mT, every.mT))[:, :, None]  # [4, B, 1, blocks, blocks]
    counts = dense.sum(-1, dtype=torch.int32)
    indices = dense.int().argsort(dim=-1, descending=True, stable=True).int()

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001, flex_attention's signature
        mask = query >= key if causal else query >= 0
        if window is not None:
            mask = mask & (query - key <= window) & (key - query <= window)
        if document_ids is not None:
            mask = mask & (document_ids[b, query] == document_ids[b, key])
        return mask

    return BlockMask(
        seq_lengths=(row_len, row_len),
        kv_num_blocks=counts[0],
        kv_indices=indices[0],
        full_kv_num_blocks=counts[1],
        full_kv_indices=indices[1],
        q_num_blocks=counts[2],
        q_indices=indices[2],
        full_q_num_blocks=counts[3],
        full_q_indices=indices[3],
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=seen,
    )
