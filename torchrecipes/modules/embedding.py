"""Embedding layers beyond `nn.Embedding`."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
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
        type_vocab_size: rows of the table of token types. None: there is none, or `type_embedding`.
        type_embedding: the table of token types where it is no `nn.Embedding`: has `weight`, too.
        repeat_last_position: positions beyond the table have its last row. False: they are an error.
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
        type_embedding: nn.Module | None = None,
        repeat_last_position: bool = False,
        position_offset: int = 0,
        eps: float,
        norm_bias: bool = True,
        dropout_p: float = 0.0,
    ):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, hidden_size)
        self.position_embeddings, self.token_type_embeddings = None, type_embedding
        if max_position_embeddings is not None:
            self.position_embeddings = nn.Embedding(max_position_embeddings, hidden_size)
        if type_vocab_size is not None:
            self.token_type_embeddings = nn.Embedding(type_vocab_size, hidden_size)
        self.norm = LayerNorm(hidden_size, eps=eps, bias=norm_bias)
        self.position_offset, self.dropout_p = position_offset, dropout_p
        self.repeat_last_position = repeat_last_position
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
            rows = position_ids + self.position_offset
            if self.repeat_last_position:
                rows = rows.clamp(max=self.position_embeddings.num_embeddings - 1)
            hidden_BSD = hidden_BSD + self.position_embeddings(rows)
        return dropout(self.norm(to_residual_dtype(hidden_BSD, self.residual_dtype)), self.dropout_p, self.training)


class FactoredTypeEmbedding(nn.Module):
    """A table of token types that are pairs: the row of `num_types * g + t` is type t's, plus group g's projected.

    Groups have few dimensions, as the tokens of ALBERT (Lan et al. 2019, arXiv:1909.11942, section 3.1). The table is
    computed once per forward pass, in fp32: that is less work than projecting the group of every token.

    Args:
        num_types, num_groups: T and G.
        group_size: dimensions of a group's embedding.
        hidden_size: D.
    """

    def __init__(self, num_types: int, num_groups: int, group_size: int, hidden_size: int):
        super().__init__()
        self.types = nn.Embedding(num_types, hidden_size)
        self.groups = nn.Embedding(num_groups, group_size)
        self.projection = nn.Linear(group_size, hidden_size)

    @property
    def weight(self) -> Tensor:
        """`[G * T, D]`, the table."""
        projection = self.projection
        return factored_type_table(self.types.weight, self.groups.weight, projection.weight, projection.bias)

    def to_embedding(self) -> nn.Embedding:
        """The table as parameters of its own."""
        return nn.Embedding.from_pretrained(self.weight.detach(), freeze=False)

    def forward(self, token_type_ids: Tensor) -> Tensor:
        """Args: token_type_ids `[B, S]`. Returns: `[B, S, D]`."""
        return F.embedding(token_type_ids, self.weight)


def factored_type_table(types: Tensor, groups: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The table of a `FactoredTypeEmbedding`, `[G * T, D]`, from its parameters."""
    # The meta device has no autocast.
    with nullcontext() if types.is_meta else torch.autocast(types.device.type, enabled=False):
        return (F.linear(groups, weight, bias)[:, None] + types).flatten(0, 1)
