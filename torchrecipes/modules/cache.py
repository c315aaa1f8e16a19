"""KV cache: keys and values of earlier tokens, so that generating a token costs one token's work."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchrecipes.modules.attention_backend import AttentionBackend, cached_attention_backend


class KVCache:
    """Keys and values of every layer: `[B, max_len, K, H]` each, allocated once.

    A token's key and value are written at its position. Prompts of different lengths share a batch and are padded on
    the right: entries of padding are never attended to (a token attends to the positions up to its own), and later
    tokens overwrite them. Every position up to a token's own must have been written, in this call or before.

    No gradient flows through it.

    Args:
        num_layers: number of blocks.
        batch: B, rows.
        max_len: positions of prompt and continuation together.
        num_kv_heads: K.
        head_dim: H.
        dtype: dtype of keys and values: the one that the blocks compute in.
        device: device of the cache.
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
        # Zeros: masked values are multiplied by 0, and uninitialized memory may hold a NaN.
        # The slots of a head are contiguous, so a step's products need no copy.
        shape = (batch, num_kv_heads, max_len, head_dim)
        self._memory = [
            tuple(torch.zeros(shape, dtype=dtype, device=device).transpose(1, 2) for _ in range(2))
            for _ in range(num_layers)
        ]
        self._batch = batch

    def at(
        self, position_ids: Tensor, dtype: torch.dtype, window: int | None = None
    ) -> tuple[AttentionBackend, list[LayerCache]]:
        """The attention backend of a forward pass, and each layer's part of the cache.

        Nothing waits for the device: on a CPU attention reads the slots in use, elsewhere all of them.

        Args:
            position_ids: `[B, S]` or `[1, S]`, positions of the tokens of this pass, each below `max_len`.
            dtype: dtype of the queries.
            window: a token sees no token further away than this. None: no bound.

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
        return cached_attention_backend(positions, seen, dtype, window), layers


class LayerCache(NamedTuple):
    """One layer's part of a `KVCache`, for one forward pass.

    Attributes:
        keys, values: `[B, max_len, K, H]`.
        rows: `[B, 1]`, and `positions`: `[B, S]`: the slots of the tokens of this pass.
        seen: number of slots that attention reads.
    """

    keys: Tensor
    values: Tensor
    rows: Tensor
    positions: Tensor
    seen: int

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes new keys and values `[B, S, K, H]`, and returns those to attend to, `[B, seen, K, H]`."""
        self.keys.index_put_((self.rows, self.positions), k.detach().to(self.keys.dtype))
        self.values.index_put_((self.rows, self.positions), v.detach().to(self.values.dtype))
        return self.keys[:, : self.seen].to(k.dtype), self.values[:, : self.seen].to(v.dtype)
