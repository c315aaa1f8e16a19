"""`LabeledCollator`: texts, or pairs of sentences in one text, with their labels."""

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

from torchrecipes.data.batching.batch import Batch
from torchrecipes.data.batching.texts import batch_of_examples, made_up_batch
from torchrecipes.data.tokenizers.tokenizer import Tokenizer

Task = Literal["single_label", "multi_label", "regression"]


class LabeledCollator:
    """Packs some labeled texts into one row. An example has one text.

    Args:
        tokenizer: gives the padding token and the token types.
        token_types: whether batches have `token_type_ids`, as those of domain names always do.
        task: which labels a batch of made-up tokens has; those of real examples are as the corpus has them.
        num_labels: L, of a batch of made-up tokens.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, token_types: bool = False, task: Task = "single_label", num_labels: int = 2
    ):
        self.tokenizer, self._token = tokenizer, tokenizer.unpadded_vocab_size - 1
        self.token_types = token_types or tokenizer.domain is not None
        self.task, self.num_labels = task, num_labels

    def batch(self, rows: Any, numbers: np.ndarray, keys: np.ndarray, step: int = 1) -> Batch:  # noqa: ARG002
        """Reads examples and packs their texts. Nothing is drawn.

        Args:
            rows: `ExampleRows`, or other rows with `examples`.
            numbers: `[n]`, the examples' numbers; -1 is left out.
            keys: `[n]` uint64, not used.
            step: the optimizer step, not used.
        """
        options = {"token_types": self.token_types, "include_prompt": True}
        return batch_of_examples(rows, rows.examples(numbers), self.tokenizer, **options)

    def example_batch(self, num_rows: int, seq_len: int) -> Batch:
        """A batch of `num_rows` texts of `seq_len` made-up tokens, with labels: for estimates and trial steps.

        Every text is a row.
        """
        batch = made_up_batch(num_rows, 1, seq_len, self._token, token_types=self.token_types)
        if self.task == "single_label":
            labels = torch.arange(num_rows) % self.num_labels
        else:
            labels = torch.zeros((num_rows, self.num_labels) if self.task == "multi_label" else num_rows)
        return replace(batch, examples=replace(batch.examples, labels=labels))
