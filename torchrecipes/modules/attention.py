"""Attention over packed or dense rows: one function, and the choice of its kernel made once per forward.

Rows keep the shape `[B, S]`; documents inside them are described by `cu_seqlens`, the document boundaries over the
`B * S` flattened tokens. A token attends to the tokens of its own document only, so it always sees at least itself.
There is no padding mask: padding is one more document at the end of a row.

`window=w` lets a token see the `w` tokens before it and, unless causal, the `w` tokens after it, besides itself:
`|i - j| <= w`. That is the convention of flash attention and of ModernBERT's `sliding_window` in `transformers`; the
causal decoders there (Mistral and its kin) count the token itself, so their `sliding_window=W` is `window=W - 1`.

| kernel   | where                               | how documents are kept apart                                     |
|----------|-------------------------------------|------------------------------------------------------------------|
| `varlen` | CUDA, bf16 and fp16, no dropout     | `cu_seqlens` goes to the flash kernel                            |
| `sdpa`   | CUDA otherwise, CPU fp32            | none (dense rows), a block mask, or regrouped rows with a mask   |
| `math`   | CPU bf16 and fp16, CPU with dropout | the same; scores are held as one `[B, N, S, S]` tensor           |

`math` exists because scores, softmax and values as three batched products take a third of the time of the CPU's flash
kernel in bf16 (without AMX; measured at S from 64 to 512), and because that kernel has no dropout.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from torchrecipes.modules.rotary import apply_rotary

# Scores of one layer that the `math` kernel may hold (it keeps them for backward); above it, `sdpa` recomputes them.
MATH_SCORES_LIMIT_BYTES = 512 * 2**20
# Copying a token into a regrouped row and back costs about as much as attending to this many more tokens (CPU).
REGROUP_COST_IN_KEYS = 64


class AttentionPlan(NamedTuple):
    """How one forward pass computes attention; made by `attention_plan`, shared by all layers.

    A tuple of tensors and constants, so that `torch.compile`, activation checkpointing and FSDP carry it along.

    Attributes:
        kernel: `varlen`, `sdpa` or `math`.
        causal: `sdpa` applies causality itself (dense rows); with a mask it is part of the mask.
        dropout_p: probability of dropping an attention weight.
        mask: what is added to the scores, 0 or -inf, in the dtype of q: `[B or 1, 1, S, S]`, or `[R, 1, L, L]` when
            documents are regrouped. None where every token of a row sees every other.
        gather: `[R, L]` int64, the token in each slot of the regrouped rows (token 0 in an empty slot), or None.
        scatter: `[B, S]` int64, the slot of each token, or None.
        cu_seqlens: `[documents + 1]` int32, for `varlen`.
        max_seqlen: upper bound on a document's length, for `varlen`.
        window_size: tokens seen to the (left, right), -1 without bound, for `varlen`.
    """

    kernel: str
    causal: bool = False
    dropout_p: float = 0.0
    mask: Tensor | None = None
    gather: Tensor | None = None
    scatter: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0
    window_size: tuple[int, int] = (-1, -1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    causal: bool = False,
    window: int | None = None,
    dropout_p: float = 0.0,
    plan: AttentionPlan | None = None,
) -> Tensor:
    """Softmax attention, scaled by `1 / sqrt(H)`, of every token to the tokens of its own document.

    Args:
        q: `[B, S, N, H]`, any strides whose last is 1.
        k, v: `[B, S, K, H]`, of q's dtype; K divides N, and head n of q uses head `n // (N // K)`.
        cu_seqlens: `[documents + 1]`, see `attention_plan`. None: every row is one document.
        max_seqlen, causal, window, dropout_p: see `attention_plan`.
        plan: what `attention_plan` made from the five arguments above, which are then not given again.

    Returns:
        `[B, S, N, H]` of q's dtype.

    Raises:
        ValueError: a plan and what it was made from are both given, or `attention_plan` refuses the arguments.
    """
    if plan is None:
        plan = attention_plan(
            cu_seqlens,
            (q.shape[0], q.shape[1]),
            max_seqlen=max_seqlen,
            causal=causal,
            window=window,
            dropout_p=dropout_p,
            device=q.device,
            dtype=q.dtype,
        )
    elif cu_seqlens is not None or max_seqlen is not None or causal or window is not None or dropout_p:
        raise ValueError("give attention() a plan, or the arguments that a plan is made from, not both")

    if k.shape[2] != q.shape[2]:
        # Not left to the kernels: only some take fewer key heads, and the others would be chosen silently.
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    if plan.kernel == "varlen":
        return _varlen(q, k, v, plan)
    if plan.gather is None:
        return _rows(q, k, v, plan)
    out_RLNH = _rows(_take(q, plan.gather), _take(k, plan.gather), _take(v, plan.gather), plan)
    return _take(out_RLNH, plan.scatter)


def attention_plan(
    cu_seqlens: Tensor | None,
    shape: tuple[int, int],
    *,
    max_seqlen: int | None = None,
    causal: bool = False,
    window: int | None = None,
    dropout_p: float = 0.0,
    device: torch.device,
    dtype: torch.dtype,
) -> AttentionPlan:
    """Chooses the kernel and builds what it needs (mask, indices), once for all layers of a forward pass.

    On CUDA nothing waits for the device. On the CPU, where reading lengths costs nothing, the boundaries are checked,
    and short documents in long rows are regrouped into rows of `max_seqlen` where that costs less. The choice follows
    from shapes and `max_seqlen`, not from the lengths of one batch, so a compiled model sees few different shapes.

    Args:
        cu_seqlens: `[documents + 1]` int32 or int64, on `device`: 0, then the end of every document in the B * S
            flattened tokens. Repeated entries are empty documents. The end of every row must be among them (a
            document never crosses into the next row). None: every row is one document.
        shape: (B, S).
        max_seqlen: upper bound on a document's length in tokens. None: S.
        causal: a token sees no later token.
        window: a token sees no token further away than this. None: no bound.
        dropout_p: probability of dropping an attention weight; 0 outside training.
        device, dtype: of the queries that the plan is for.

    Raises:
        ValueError: CPU only: boundaries that do not describe the rows. Any device: a window below 0.
    """
    rows, row_len = shape
    if window is not None and window < 0:
        raise ValueError(f"window must be 0 or more, not {window}")
    half = dtype in (torch.bfloat16, torch.float16)
    packed_or_window = cu_seqlens is not None or window is not None
    if device.type == "cuda" and half and packed_or_window and not dropout_p and _has_flash(device):
        if cu_seqlens is None:
            cu_seqlens = torch.arange(0, rows * row_len + 1, row_len, dtype=torch.int32, device=device)
        left = -1 if window is None else window
        return AttentionPlan(
            "varlen",
            cu_seqlens=cu_seqlens.to(torch.int32),
            max_seqlen=max_seqlen or row_len,
            window_size=(left, 0 if causal else left),
        )

    kernel = "math" if device.type == "cpu" and (half or dropout_p) else "sdpa"
    gather = scatter = None
    if cu_seqlens is None:
        segments = None
    elif device.type == "cpu":
        lengths = _checked_lengths(cu_seqlens, rows, row_len, max_seqlen)
        segments, gather, scatter = _regroup(lengths, rows, row_len, max_seqlen or row_len)
    else:
        positions = torch.arange(rows * row_len, device=device, dtype=cu_seqlens.dtype)
        segments = torch.searchsorted(cu_seqlens, positions, right=True).view(rows, row_len)
    if segments is None and window is None and (kernel == "sdpa" or not causal):
        return AttentionPlan(kernel, causal=causal, dropout_p=dropout_p)
    mask = _mask(segments, row_len if segments is None else segments.shape[1], causal, window, device, dtype)
    return AttentionPlan(kernel, dropout_p=dropout_p, mask=mask, gather=gather, scatter=scatter)


def _rows(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """Attention inside rows, `[B, S, N, H]`, with the plan's mask."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores_bytes = q.shape[0] * q.shape[1] * q.shape[2] ** 2 * q.element_size()
    if plan.kernel == "sdpa" or (scores_bytes > MATH_SCORES_LIMIT_BYTES and not plan.dropout_p):
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=plan.mask, dropout_p=plan.dropout_p, is_causal=plan.causal
        )
        return out.transpose(1, 2)
    scores_BNSS = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
    if plan.mask is not None:
        scores_BNSS.add_(plan.mask)
    weights_BNSS = scores_BNSS.softmax(-1)
    if plan.dropout_p:
        weights_BNSS = F.dropout(weights_BNSS, plan.dropout_p)
    return torch.matmul(weights_BNSS, v).transpose(1, 2)


def _varlen(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    q_TNH, k_TNH, v_TNH = (x.flatten(0, 1) for x in (q, k, v))
    cu_seqlens, longest = plan.cu_seqlens, plan.max_seqlen
    out_TNH = varlen_attn(q_TNH, k_TNH, v_TNH, cu_seqlens, cu_seqlens, longest, longest, window_size=plan.window_size)
    return out_TNH.view(q.shape)


def _has_flash(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Tokens of `[B, S, N, H]` by their flat positions: `[*index.shape, N, H]`."""
    return x.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)


def _checked_lengths(cu_seqlens: Tensor, rows: int, row_len: int, max_seqlen: int | None) -> np.ndarray:
    """Document lengths in order, without empty documents."""
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


def _regroup(lengths: np.ndarray, rows: int, row_len: int, longest: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Document number of every slot, in rows as they are or in shorter rows where those cost less.

    Documents go in order into rows of L tokens, a new row whenever the next one does not fit. Two neighbouring rows
    hold more than L tokens, so there are at most 2 T / L + 1 of them.

    Returns:
        segments `[rows, length]` int64 (-1 in an empty slot), gather and scatter as in `AttentionPlan` (None: rows as
        they are).
    """
    tokens = rows * row_len
    group_len = min(row_len, -(-longest // 64) * 64)
    document_of_token = np.repeat(np.arange(len(lengths)), lengths)
    step = max(1, tokens // (4 * group_len))  # rows come in steps of a quarter of the least number: few shapes
    if group_len + REGROUP_COST_IN_KEYS >= row_len / 2:
        return torch.from_numpy(document_of_token.reshape(rows, row_len)), None, None

    first_slot = np.empty(len(lengths), dtype=np.int64)
    group, used = 0, 0
    for document, length in enumerate(lengths.tolist()):
        if used + length > group_len:
            group, used = group + 1, 0
        first_slot[document] = group * group_len + used
        used += length
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


def _mask(
    segments: Tensor | None, length: int, causal: bool, window: int | None, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """0 where a token sees another, -inf elsewhere: `[B or 1, 1, S, S]`; additive, or every layer would convert it."""
    position = torch.arange(length, device=device)
    distance_SS = position[:, None] - position[None, :]
    seen = torch.ones_like(distance_SS, dtype=torch.bool)
    if causal:
        seen &= distance_SS >= 0
    if window is not None:
        seen &= distance_SS.abs() <= window
    seen = seen[None] if segments is None else seen & (segments[:, :, None] == segments[:, None, :])
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))[:, None]


class SelfAttention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values.

    Parameters: `qkv_proj` (rows: all query heads, then key heads, then value heads) and `o_proj`.

    Args:
        hidden_size: D.
        num_heads: N, query heads.
        num_kv_heads: K, key and value heads; divides N. None: N.
        head_dim: H. None: D / N.
        bias: whether both projections have one.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_dim = head_dim or hidden_size // num_heads
        if num_heads % self.num_kv_heads or (head_dim is None and hidden_size % num_heads):
            raise ValueError(
                f"{num_heads} attention heads need a hidden size ({hidden_size}) that is a multiple of them, "
                f"and a number of key-value heads ({self.num_kv_heads}) that divides them"
            )
        heads = num_heads + 2 * self.num_kv_heads
        self.qkv_proj = nn.Linear(hidden_size, heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden_size, bias=bias)

    def forward(self, x_BSD: Tensor, rotary: tuple[Tensor, Tensor] | None, plan: AttentionPlan) -> Tensor:
        """Args: x_BSD; `rotary` from `rotary_tables`, None without rotation; `plan` from `attention_plan`."""
        qkv = self.qkv_proj(x_BSD).unflatten(-1, (-1, self.head_dim))
        # Queries and keys stay together through the rotation: one pass instead of two.
        qk, v = qkv.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=2)
        if rotary is not None:
            qk = apply_rotary(qk, *rotary)
        q, k = qk.split([self.num_heads, self.num_kv_heads], dim=2)
        return self.o_proj(attention(q, k, v, plan=plan).flatten(2))
