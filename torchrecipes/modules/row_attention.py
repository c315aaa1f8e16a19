"""Attention inside rows of one length, as the backends for a CPU and `sdpa` compute it."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchrecipes.estimation import kernel_device
from torchrecipes.modules.attention_backend import AttentionBackend
from torchrecipes.modules.cpu.banded_attention import BandedAttention
from torchrecipes.modules.cpu.dropout import dropout
from torchrecipes.modules.cpu.tiled_causal_attention import CausalTiles

# The kernels of `scaled_dot_product_attention` on CUDA, the fastest first; each takes what the ones before it refuse.
ON_CUDA = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def attend_rows(q: Tensor, k: Tensor, v: Tensor, backend: AttentionBackend) -> Tensor:
    """Attention inside rows, `[B, S, N, H]`, with the backend's mask."""
    if backend.name == "tiled":
        return CausalTiles.apply(q, k, v, backend.mask)
    if backend.name == "banded":
        return BandedAttention.apply(q, k, v, backend.mask, *backend.window_size)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if backend.name == "sdpa":
        return _sdpa(q, k, v, backend).transpose(1, 2)
    # The query heads of a key head are more rows of one product.
    by_key_head = (q.shape[0], k.shape[1], -1, q.shape[3])
    scores = torch.matmul((q * q.shape[-1] ** -0.5).reshape(by_key_head), k.transpose(-1, -2))
    scores_BNSS = scores.view(*q.shape[:3], -1)
    if backend.mask is not None:
        scores_BNSS.add_(backend.mask)
    weights_BNSS = scores_BNSS.softmax(-1)
    if backend.dropout_p:
        weights_BNSS = dropout(weights_BNSS, backend.dropout_p)
    return torch.matmul(weights_BNSS.view(scores.shape), v).view(q.shape).transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, backend: AttentionBackend) -> Tensor:
    options = {"attn_mask": backend.mask, "dropout_p": backend.dropout_p, "is_causal": backend.causal}
    if backend.mask is None and backend.window_size != (-1, -1):  # an estimate: as many keys as a query sees
        k, v = (x[:, :, : 1 + sum(backend.window_size)] for x in (k, v))
    if k.shape[1] != q.shape[1]:
        if kernel_device(q.device) == "cuda" and backend.mask is None:
            options["enable_gqa"] = True
        else:  # kernels that take a mask take no fewer key heads, and a slower one would be chosen silently
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    with sdpa_kernel(ON_CUDA, set_priority=True) if q.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, **options)
