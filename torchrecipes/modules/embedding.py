"""Embedding layers beyond `nn.Embedding`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchrecipes.modules.norm import LayerNorm
from torchrecipes.modules.transformer import to_residual_dtype


class BertEmbedding(nn.Module):
    """Token, learned position and token type embeddings, summed and normalized (Devlin et al. 2018, arXiv:1810.04805).

    Attributes:
        residual_dtype: of the result under autocast; see `to_residual_dtype`.

    Args:
        vocab_size, hidden_size, max_position_embeddings, type_vocab_size: sizes of the three tables.
        eps: epsilon of the LayerNorm.
        dropout_p: dropout probability of the result.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        max_position_embeddings: int,
        type_vocab_size: int,
        *,
        eps: float,
        dropout_p: float = 0.0,
    ):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, hidden_size)
        self.position_embeddings = nn.Embedding(max_position_embeddings, hidden_size)
        self.token_type_embeddings = nn.Embedding(type_vocab_size, hidden_size)
        self.norm = LayerNorm(hidden_size, eps=eps)
        self.dropout_p = dropout_p
        self.residual_dtype: torch.dtype | None = None

    def forward(self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Args: input_ids `[B, S]`; position_ids `[B, S]` or `[1, S]`; token_type_ids `[B, S]`, None: type 0."""
        if token_type_ids is None:
            types = self.token_type_embeddings.weight[0]
        else:
            types = self.token_type_embeddings(token_type_ids)
        hidden_BSD = self.word_embeddings(input_ids) + types + self.position_embeddings(position_ids)
        return F.dropout(self.norm(to_residual_dtype(hidden_BSD, self.residual_dtype)), self.dropout_p, self.training)
