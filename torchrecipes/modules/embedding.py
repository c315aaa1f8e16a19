"""Embedding layers beyond `nn.Embedding`."""

import torch
from torch import Tensor, nn

from torchrecipes.modules.cpu.dropout import dropout
from torchrecipes.modules.norm import LayerNorm
from torchrecipes.modules.transformer import to_residual_dtype


class BertEmbedding(nn.Module):
    """Token, learned position and token type embeddings, summed and normalized (Devlin et al. 2018, arXiv:1810.04805).

    Attributes:
        residual_dtype: of the result under autocast; see `to_residual_dtype`.

    Args:
        vocab_size, hidden_size: sizes of the table of tokens.
        max_position_embeddings: rows of the table of positions. None: there is none.
        type_vocab_size: rows of the table of token types. None: there is none.
        position_offset: row of position 0.
        eps: epsilon of the LayerNorm.
        norm_bias: whether the LayerNorm has a bias.
        dropout_p: dropout probability of the result.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        max_position_embeddings: int | None,
        type_vocab_size: int | None,
        *,
        position_offset: int = 0,
        eps: float,
        norm_bias: bool = True,
        dropout_p: float = 0.0,
    ):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, hidden_size)
        self.position_embeddings = self.token_type_embeddings = None
        if max_position_embeddings is not None:
            self.position_embeddings = nn.Embedding(max_position_embeddings, hidden_size)
        if type_vocab_size is not None:
            self.token_type_embeddings = nn.Embedding(type_vocab_size, hidden_size)
        self.norm = LayerNorm(hidden_size, eps=eps, bias=norm_bias)
        self.position_offset, self.dropout_p = position_offset, dropout_p
        self.residual_dtype: torch.dtype | None = None

    def forward(self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Args: input_ids `[B, S]`; position_ids `[B, S]` or `[1, S]`; token_type_ids `[B, S]`, None: type 0."""
        hidden_BSD = self.word_embeddings(input_ids)
        if self.token_type_embeddings is None:
            if token_type_ids is not None:
                raise ValueError("this model has no token types")
        elif token_type_ids is None:
            hidden_BSD = hidden_BSD + self.token_type_embeddings.weight[0]
        else:
            hidden_BSD = hidden_BSD + self.token_type_embeddings(token_type_ids)
        if self.position_embeddings is not None:
            hidden_BSD = hidden_BSD + self.position_embeddings(position_ids + self.position_offset)
        return dropout(self.norm(to_residual_dtype(hidden_BSD, self.residual_dtype)), self.dropout_p, self.training)
