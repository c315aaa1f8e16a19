"""Attention over packed or dense rows, and the layer made of it.

Rows keep the shape `[B, S]`; documents inside them are described by `document_ids`, or by `cu_seqlens`, the document
boundaries over the `B * S` flattened tokens. A token attends to the tokens of its own document only, so it always sees
at least itself. There is no padding mask: padding is one more document at the end of a row.

`window=w` lets a token see the `w` tokens before it and, unless causal, the `w` tokens after it, besides itself:
`|i - j| <= w`. That is the convention of flash attention and of ModernBERT's `sliding_window` in `transformers`; the
causal decoders there (Mistral and its kin) count the token itself, so their `sliding_window=W` is `window=W - 1`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from torchrecipes.modules.attention_backend import AttentionBackend, choose_attention_backend
from torchrecipes.modules.cache import LayerCache
from torchrecipes.modules.cpu.attention_by_length import attend_by_length
from torchrecipes.modules.max_logits import raise_max_logits, record_max_logits
from torchrecipes.modules.norm import RMSNorm, rms_norm
from torchrecipes.modules.rotary import apply_rotary
from torchrecipes.modules.row_attention import attend_rows

_VARLEN_ASKS_FOR_GQA = TorchVersion(torch.__version__) >= "2.12"  # before, it took fewer key heads unasked


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    document_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    causal: bool = False,
    window: int | None = None,
    dropout_p: float = 0.0,
    backend: AttentionBackend | None = None,
    max_logits: Tensor | None = None,
) -> Tensor:
    """Softmax attention, scaled by `1 / sqrt(H)`, of every token to the tokens of its own document.

    Args:
        q: `[B, S, N, H]`, any strides whose last is 1.
        k, v: `[B, S, K, H]`, of q's dtype; K divides N, and head n of q uses head `n // (N // K)`.
        document_ids, cu_seqlens: see `choose_attention_backend`. None: every row is one document.
        max_seqlen, causal, window, dropout_p: see `choose_attention_backend`.
        backend: what `choose_attention_backend` made from the six arguments above, which are then not given again.
        max_logits: `[N]` fp32, raised in place to each head's largest scaled score (`record_max_logits`), or None.

    Returns:
        `[B, S, N, H]` of q's dtype.

    Raises:
        ValueError: a backend and what it was made from are both given, or `choose_attention_backend` refuses the
            arguments.
    """
    packed = document_ids is not None or cu_seqlens is not None
    if backend is None:
        backend = choose_attention_backend(
            (q.shape[0], q.shape[1]),
            document_ids=document_ids,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            causal=causal,
            window=window,
            dropout_p=dropout_p,
            device=q.device,
            dtype=q.dtype,
        )
    elif packed or max_seqlen is not None or causal or window is not None or dropout_p:
        raise ValueError("give attention() a backend, or the arguments that a backend is made from, not both")

    if backend.name == "flex":
        return _flex(q, k, v, backend, max_logits)
    if max_logits is not None:
        record_max_logits(max_logits, q, k, backend)
    if backend.name == "varlen":
        return _varlen(q, k, v, backend)
    if backend.groups is not None:
        return attend_by_length(q, k, v, backend)
    if backend.gather is None:
        return attend_rows(q, k, v, backend)
    out_RLNH = attend_rows(_take(q, backend.gather), _take(k, backend.gather), _take(v, backend.gather), backend)
    return _take(out_RLNH, backend.scatter)


def _flex(q: Tensor, k: Tensor, v: Tensor, backend: AttentionBackend, max_logits: Tensor | None) -> Tensor:
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention  # imports dynamo, 1.5 s of CPU

    head_dim = q.shape[-1]
    tensors = [x.transpose(1, 2) for x in (q, k, v)]
    if head_dim < 16:  # the kernel takes no smaller ones; zeros change no product
        tensors = [F.pad(x, (0, 16 - head_dim)) for x in tensors]
    options = {"block_mask": backend.block_mask, "scale": head_dim**-0.5, "enable_gqa": k.shape[2] != q.shape[2]}
    # Uncompiled it would hold all scores. A compiled block has it compiled already.
    kernel = flex_attention if torch.compiler.is_compiling() or not q.is_cuda else _compiled(flex_attention)
    if max_logits is None:
        out_BNSH = kernel(*tensors, **options)
    else:
        out_BNSH, found = kernel(*tensors, **options, return_aux=AuxRequest(max_scores=True))
        raise_max_logits(max_logits, found.max_scores)
    return out_BNSH.transpose(1, 2)[..., :head_dim]


@cache
def _compiled(function: Callable) -> Callable:
    compiled = torch.compile(function)

    def call(*args, **kwargs):
        # Masks, windows, shapes and gradient modes of a process: after 8 of them dynamo would run it uncompiled.
        with torch._dynamo.config.patch(recompile_limit=128):
            return compiled(*args, **kwargs)

    return call


def _varlen(q: Tensor, k: Tensor, v: Tensor, backend: AttentionBackend) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # imports dynamo, 1.5 s of CPU

    head_dim = q.shape[-1]
    tensors = [x.flatten(0, 1) for x in (q, k, v)]
    if head_dim % 8:  # the kernel takes multiples of 8; zeros change no product
        tensors = [F.pad(x, (0, -head_dim % 8)) for x in tensors]
    bounds, longest = backend.cu_seqlens, backend.max_seqlen
    options = {"scale": head_dim**-0.5, "window_size": backend.window_size}
    if _VARLEN_ASKS_FOR_GQA and k.shape[2] != q.shape[2]:
        options["enable_gqa"] = True
    out_TNH = varlen_attn(*tensors, bounds, bounds, longest, longest, **options)
    return out_TNH[..., :head_dim].view(q.shape)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Tokens of `[B, S, N, H]` by their flat positions: `[*index.shape, N, H]`."""
    return x.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values.

    Parameters: `qkv_proj` (rows: all query heads, then key heads, then value heads) and `o_proj`; with `qk_norm` also
    `q_norm` and `k_norm`.

    Attributes:
        max_logits: None, or `[N]` fp32: a forward pass in training raises it to each head's largest logit.

    Args:
        hidden_size: D.
        num_heads: N, query heads.
        num_kv_heads: K, key and value heads; divides N. None: N.
        head_dim: H. None: D / N.
        bias: whether both projections have one.
        o_bias: whether the projection of the output has one. None: as `bias` says.
        qk_norm: RMSNorm of queries and keys before the rotation: `head`, over each head (Qwen3), or `all`, over all
            heads together (OLMoE; Muennighoff et al. 2024, arXiv:2409.02060). None: no norm.
        norm_eps: of these norms.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        o_bias: bool | None = None,
        qk_norm: str | None = None,
        norm_eps: float = 1e-6,
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
        rows = (num_heads, self.num_kv_heads, self.num_kv_heads)
        self.row_splits = {"qkv_proj.weight": tuple(n * self.head_dim for n in rows)}  # three matrices, for Muon
        self.max_logits: Tensor | None = None
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden_size, bias=bias if o_bias is None else o_bias)
        if qk_norm not in (None, "head", "all"):
            raise ValueError(f"qk_norm is {qk_norm!r}; it is 'head', 'all' or None")
        self.qk_norm = qk_norm
        if qk_norm:
            of_q, of_k = (1, 1) if qk_norm == "head" else (num_heads, self.num_kv_heads)
            self.q_norm = RMSNorm(of_q * self.head_dim, norm_eps)
            self.k_norm = RMSNorm(of_k * self.head_dim, norm_eps)

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        backend: AttentionBackend,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Attends, and with a cache also to what it holds.

        Args:
            x_BSD: hidden states.
            rotary: from `rope_cos_sin`; None without rotation.
            backend: from `choose_attention_backend`; with a cache from `KVCache.at`.
            cache: this layer's, from `KVCache.at`.
        """
        qkv = self.qkv_proj(x_BSD).unflatten(-1, (-1, self.head_dim))
        # Queries and keys stay together through the rotation: one pass instead of two.
        qk, v = qkv.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=2)
        if self.qk_norm:
            qk = self._normalized(qk)
        if rotary is not None:
            qk = apply_rotary(qk, *rotary)
        q, k = qk.split([self.num_heads, self.num_kv_heads], dim=2)
        if cache is not None:
            k, v = cache.update(k, v)
        max_logits = self.max_logits if self.training else None
        if backend.dropout_p and not self.training:  # a frozen layer of a model that is trained
            backend = backend._replace(dropout_p=0.0)
        return self.o_proj(attention(q, k, v, backend=backend, max_logits=max_logits).flatten(2))

    def _normalized(self, qk: Tensor) -> Tensor:
        """Queries and keys, `[B, S, N + K, H]`, each with its norm."""
        if self.qk_norm == "head":  # in one pass: every head has the weight of its kind
            weights = (self.q_norm.weight.expand(self.num_heads, -1), self.k_norm.weight.expand(self.num_kv_heads, -1))
            return rms_norm(qk, torch.cat(weights), self.q_norm.eps)
        q, k = qk.split([self.num_heads, self.num_kv_heads], dim=2)
        return torch.cat((self.q_norm(q.flatten(2)).view_as(q), self.k_norm(k.flatten(2)).view_as(k)), dim=2)
