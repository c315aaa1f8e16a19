"""Output layers: from hidden states to logits over the vocabulary, or over labels."""

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


class ClassificationHead(nn.Module):
    """A dense layer with its activation, dropout, and the output layer, in the variants of the encoder families.

    Args:
        hidden_size: D.
        num_labels: L.
        activation: `tanh`, `relu` or `gelu` (exact).
        dropout_p: probability of dropping an element of what the output layer sees, in training.
        drop_input: whether elements of the input are dropped as well.
        bias: whether the dense layer has one.
        norm_eps: epsilon of a LayerNorm after the activation. None: there is no norm.
        norm_bias: whether it has a bias.
    """

    def __init__(
        self,
        hidden_size: int,
        num_labels: int,
        *,
        activation: str,
        dropout_p: float = 0.0,
        drop_input: bool = False,
        bias: bool = True,
        norm_eps: float | None = None,
        norm_bias: bool = True,
    ):
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.activation = {"tanh": torch.tanh, "relu": F.relu, "gelu": F.gelu}[activation]
        self.norm = nn.Identity() if norm_eps is None else LayerNorm(hidden_size, eps=norm_eps, bias=norm_bias)
        self.out_proj = nn.Linear(hidden_size, num_labels)
        self.dropout_p, self.drop_input = dropout_p, drop_input

    def forward(self, features: Tensor) -> Tensor:
        """Args: features `[..., D]`. Returns: logits `[..., L]`."""
        if self.drop_input:
            features = F.dropout(features, self.dropout_p, self.training)
        features = self.norm(self.activation(self.dense(features)))
        return self.out_proj(F.dropout(features, self.dropout_p, self.training))
