"""Causal language modeling: the label of every token is the next one.

A document that continues in the next row has its next token there, so nothing is lost at the end of a row. What follows
a document's last token is the end-of-sequence token, whether or not the corpus has it: documents made by a tokenizer
with one special token are stored as `<|endoftext|> text`, which is at once where they begin and what the one before
ends in.
"""

import numpy as np
import torch

from torchrecipes.data.batching.batch import Batch, dense_fields, document_fields
from torchrecipes.data.batching.rows import Rows, source_fields
from torchrecipes.errors import UserError

IGNORED = -100  # the label of a token that has nothing to predict


class CausalLMCollator:
    """Makes batches for causal language modeling, from rows with `lookahead=1`.

    Args:
        eos_id: what the last token of a document has to predict, unless it is that token itself.
        cross_document_attention: a row is one document, whatever is in it: tokens attend to, and predict, what follows
            in the corpus. The classic way of GPT-2 and GPT-3, and the faster one where no kernel takes documents.

    Raises:
        UserError: there is no such token: it is a tokenizer for encoders.
    """

    def __init__(self, eos_id: int | None, cross_document_attention: bool = False):
        if eos_id is None:
            raise UserError(
                "the tokenizer has no end-of-sequence token, so a model cannot learn where a text ends",
                key="tokenizer",
                hint="Train it with train_bpe, train_unigram or train_char, or load one that has an eos token.",
                code="no_eos_token",
            )
        self.eos_id, self.cross_document_attention = eos_id, cross_document_attention

    def batch(self, rows: Rows, numbers: np.ndarray, keys: np.ndarray, step: int = 1) -> Batch:  # noqa: ARG002
        """Reads rows with their next tokens. Nothing is drawn, so keys and step are not used.

        Args:
            rows: the rows, with `lookahead=1`.
            numbers: `[B]`, the rows' numbers; -1 is a row of padding.
            keys, step: not used.

        Raises:
            ValueError: rows without the token after them.
        """
        if rows.lookahead != 1:
            raise ValueError(
                f"the rows have lookahead={rows.lookahead}; next tokens need {type(rows).__name__}(..., lookahead=1)"
            )
        block = rows.rows(numbers)
        tokens, following = block.tokens[:, :-1], block.tokens[:, 1:]
        is_start = np.zeros(block.tokens.shape, dtype=bool)
        is_start.reshape(-1)[block.boundaries] = True
        # The token of padding may be the one that ends documents.
        is_padding = np.arange(rows.seq_len + 1) >= block.lengths[:, None]
        labels = following.copy()
        ends = (is_padding if self.cross_document_attention else is_start)[:, 1:]
        labels[ends] = np.where(tokens[ends] == self.eos_id, IGNORED, self.eos_id)
        labels[is_padding[:, :-1]] = IGNORED

        if self.cross_document_attention:
            documents = dense_fields(tokens.shape)
        else:
            row, column = np.divmod(block.boundaries, rows.seq_len + 1)
            boundaries = (row * rows.seq_len + column)[column < rows.seq_len]
            documents = document_fields(boundaries, tokens.shape)
        return Batch(
            input_ids=torch.from_numpy(tokens.copy()),
            labels=torch.from_numpy(labels),
            num_targets=int((labels != IGNORED).sum()),
            **documents,
            **source_fields(rows, block),
        )

    def example_batch(self, num_rows: int, seq_len: int) -> Batch:
        """A batch of the shapes of real ones, with made-up tokens, one document per row: for estimates and trials."""
        tokens = torch.zeros(num_rows, seq_len, dtype=torch.int64)
        return Batch(
            input_ids=tokens,
            num_targets=num_rows * seq_len,
            labels=tokens.clone(),
            **dense_fields((num_rows, seq_len)),
        )
