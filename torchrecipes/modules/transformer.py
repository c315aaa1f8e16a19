"""Transformer blocks, made of parts that are built elsewhere and passed in."""

import torch
from torch import Tensor, nn

from torchrecipes.estimation import kernel_device
from torchrecipes.modules.attention_backend import AttentionBackend
from torchrecipes.modules.cache import LayerCache
from torchrecipes.modules.cpu.dropout import dropout
from torchrecipes.modules.moe import Routing


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of what a linear layer makes of `hidden`: autocast's where it is on, else that of `hidden`."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def to_residual_dtype(embedded: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Casts embeddings to the dtype of the residual stream, which every block adds to and keeps.

    Args:
        embedded: in the dtype of the embedding's weight, which `fully_shard` may have gathered in bf16.
        dtype: of the stream under autocast. None: bf16 with autocast's bf16 on CUDA, where a stream of half the bytes
            saves time; fp32 elsewhere, so that a run has the same numbers on any number of ranks, and with fp16, whose
            range a sum over all blocks may leave.

    Returns:
        The same in `dtype`; without autocast, `embedded` as it is.
    """
    device = embedded.device
    if not torch.is_autocast_enabled(device.type):
        return embedded
    if dtype is None:
        dtype = torch.get_autocast_dtype(device.type)
        if kernel_device(device) != "cuda" or dtype == torch.float16:
            dtype = torch.float32
    return embedded.to(dtype)


class PreNormBlock(nn.Module):
    """`x + self_attn(norm(x))`, then `x + mlp(norm(x))`; the names are those of LLaMA in `transformers`.

    Args:
        dropout_p: probability of dropping an element of what attention and feed-forward add, in training.
    """

    def __init__(
        self,
        *,
        self_attn: nn.Module,
        mlp: nn.Module,
        attention_norm: nn.Module,
        mlp_norm: nn.Module,
        dropout_p: float = 0.0,
    ):
        super().__init__()
        self.input_layernorm = attention_norm
        self.self_attn = self_attn
        self.post_attention_layernorm = mlp_norm
        self.mlp = mlp
        self.dropout_p = dropout_p

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        backend: AttentionBackend,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Args: x_BSD; `rotary`, `backend` and `cache` as in `SelfAttention.forward`."""
        attended = self.self_attn(self.input_layernorm(x_BSD), rotary, backend, cache)
        x_BSD = x_BSD + dropout(attended, self.dropout_p, self.training)
        return x_BSD + dropout(self.mlp(self.post_attention_layernorm(x_BSD)), self.dropout_p, self.training)


class MoEBlock(PreNormBlock):
    """`PreNormBlock` with a mixture of experts as its feed-forward part; it also returns what the router did.

    That is returned and not kept in the block because activation checkpointing runs `forward` twice, and because
    `fully_shard` prepares the backward pass only of what is returned.
    """

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        backend: AttentionBackend,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Routing]:
        """Args: x_BSD; `rotary`, `backend` and `cache` as in `SelfAttention.forward`."""
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), rotary, backend, cache)
        mixed, routing = self.mlp(self.post_attention_layernorm(x_BSD))
        return x_BSD + mixed, routing


class PostNormBlock(nn.Module):
    """`norm(x + self_attn(x))`, then `norm(x + mlp(x))`, as BERT does it.

    Args:
        dropout_p: probability of dropping an element of what attention and feed-forward add, in training.
        drop_attention: whether elements of what attention adds are dropped, too.
    """

    def __init__(
        self,
        *,
        self_attn: nn.Module,
        mlp: nn.Module,
        attention_norm: nn.Module,
        mlp_norm: nn.Module,
        dropout_p: float = 0.0,
        drop_attention: bool = True,
    ):
        super().__init__()
        self.self_attn = self_attn
        self.attention_norm = attention_norm
        self.mlp = mlp
        self.mlp_norm = mlp_norm
        self.dropout_p, self.drop_attention = dropout_p, drop_attention

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        backend: AttentionBackend,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Args: x_BSD; `rotary`, `backend` and `cache` as in `SelfAttention.forward`."""
        attended = self.self_attn(x_BSD, rotary, backend, cache)
        if self.drop_attention:
            attended = dropout(attended, self.dropout_p, self.training)
        x_BSD = self.attention_norm(x_BSD + attended)
        return self.mlp_norm(x_BSD + dropout(self.mlp(x_BSD), self.dropout_p, self.training))
