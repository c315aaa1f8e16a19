"""Output layers: from hidden states to logits over the vocabulary."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchrecipes.modules.norm import LayerNorm


class LMHead(nn.Module):
    """Linear output layer, with its own weight or the token embedding's.

    Losses that compute logits in chunks use its parts: `transform(hidden)`, `weight` and `bias`.

    A tied head reads the embedding's weight at every use. So there is one Parameter, under one name, in `state_dict()`
    and in the optimizer, and the tie survives `to_empty()` and sharding, which replace the Parameter.

    Args:
        hidden_size, vocab_size: D and V.
        tie_to: the token embedding to share the weight of, or None.
        bias: whether to add a bias per token.
        transform: a module applied to hidden states first, or None.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        tie_to: nn.Embedding | None = None,
        bias: bool = False,
        transform: nn.Module | None = None,
    ):
        super().__init__()
        self.transform = nn.Identity() if transform is None else transform
        self.decoder = nn.Linear(hidden_size, vocab_size, bias=False) if tie_to is None else None
        self._tied_to = (tie_to,)  # in a tuple: an attribute would be a submodule with a second name
        self.register_parameter("bias", nn.Parameter(torch.zeros(vocab_size)) if bias else None)

    @property
    def weight(self) -> Tensor:
        """`[V, D]`, the Parameter of the output layer."""
        return self._tied_to[0].weight if self.decoder is None else self.decoder.weight

    def forward(self, hidden: Tensor) -> Tensor:
        """Args: hidden `[..., D]`, the final hidden states. Returns: logits `[..., V]`."""
        return F.linear(self.transform(hidden), self.weight, self.bias)


class MLMTransform(nn.Module):
    """BERT's transform before the output layer: dense, exact GELU, LayerNorm.

    Args:
        hidden_size: D.
        eps: epsilon of the LayerNorm.
        bias: whether the dense layer has one.
        norm_bias: whether the LayerNorm has one.
    """

    def __init__(self, hidden_size: int, *, eps: float, bias: bool = True, norm_bias: bool = True):
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.norm = LayerNorm(hidden_size, eps=eps, bias=norm_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Args: hidden `[..., D]`."""
        return self.norm(F.gelu(self.dense(hidden)))
