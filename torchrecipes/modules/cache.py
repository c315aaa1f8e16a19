"""Keys and values of the tokens that a causal model has seen, kept so that a new token costs one token's work."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchrecipes.modules.attention_backend import AttentionBackend, cached_attention_backend


class KVCache:
    """Room for the keys and values of every layer: `[B, max_len, K, H]` each, allocated once.

    A token's key and value are written at its position, so prompts of different lengths share a batch: they are padded
    on the right, what padding has written is never seen (a token sees the positions up to its own), and the tokens that
    follow write over it. Every position up to a token's own must have been written, in this call or before.

    It is for generation: no gradient flows through it.

    Args:
        num_layers: blocks.
        batch: B, rows.
        max_len: positions, for prompt and continuation together.
        num_kv_heads: K.
        head_dim: H.
        dtype: of keys and values; what the blocks compute in.
        device: where they are kept.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        max_len: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.max_len = max_len
        # Zeros, since what is masked is multiplied by 0, and memory as it comes may hold a NaN.
        # A head's slots lie side by side: the products of a step read them as they are.
        shape = (batch, num_kv_heads, max_len, head_dim)
        self._memory = [
            tuple(torch.zeros(shape, dtype=dtype, device=device).transpose(1, 2) for _ in range(2))
            for _ in range(num_layers)
        ]
        self._batch = batch

    def at(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[AttentionBackend, list[LayerCache]]:
        """What one forward pass needs: the backend of its attention, and each layer's part.

        Nothing waits for the device: off the CPU, where reading positions costs nothing, every slot is looked at.

        Args:
            position_ids: `[B, S]` or `[1, S]`, where the pass' tokens are written, each below `max_len`.
            dtype: of the queries.

        Raises:
            ValueError: CPU only: a position beyond `max_len`.
        """
        seen = self.max_len
        if position_ids.device.type == "cpu":
            seen = int(position_ids.max()) + 1
            if seen > self.max_len:
                raise ValueError(f"position {seen - 1} is beyond the cache, which has {self.max_len}")
        positions = position_ids.expand(self._batch, -1)
        rows = torch.arange(self._batch, device=positions.device)[:, None]
        layers = [LayerCache(keys, values, rows, positions, seen) for keys, values in self._memory]
        return cached_attention_backend(positions, seen, dtype), layers


class LayerCache(NamedTuple):
    """One layer's part of a `KVCache`, for one forward pass.

    Attributes:
        keys, values: `[B, max_len, K, H]`.
        rows: `[B, 1]`, and `positions`: `[B, S]`: where the pass' tokens go.
        seen: slots that attention looks at.
    """

    keys: Tensor
    values: Tensor
    rows: Tensor
    positions: Tensor
    seen: int

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes `[B, S, K, H]` of new keys and values; gives those to attend to, `[B, seen, K, H]`."""
        self.keys.index_put_((self.rows, self.positions), k.detach().to(self.keys.dtype))
        self.values.index_put_((self.rows, self.positions), v.detach().to(self.values.dtype))
        return self.keys[:, : self.seen].to(k.dtype), self.values[:, : self.seen].to(v.dtype)
