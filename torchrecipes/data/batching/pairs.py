"""`PairCollator`: texts that belong together: pairs, pairs with negatives, scored pairs, a text and its copy."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from torchrecipes.data.batching.batch import Batch
from torchrecipes.data.batching.late_interaction import LateInteractionTexts, with_vectors
from torchrecipes.data.batching.texts import batch_of_examples, made_up_batch
from torchrecipes.data.examples.block import ExampleBlock
from torchrecipes.data.tokenizers.tokenizer import Tokenizer
from torchrecipes.errors import UserError

if TYPE_CHECKING:
    from torchrecipes.models import LateInteraction


class PairCollator:
    """Packs the texts of some examples into one row.

    Args:
        tokenizer: gives the padding token and the token types.
        token_types: whether batches have `token_type_ids`, as those of domain names always do.
        repeat_texts: every example is one text and a copy of it, which dropout makes another one (SimCSE, Gao et al.
            2021, arXiv:2104.08821). Both are in the same batch.
        include_prompt: False: pooling leaves out the tokens of a text's prompt.
        late_interaction: those settings of the model. The first text of an example is a query. None: it pools texts.
        texts_per_example: k, of a batch of made-up tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        token_types: bool = False,
        repeat_texts: bool = False,
        include_prompt: bool = True,
        late_interaction: "LateInteraction | None" = None,
        texts_per_example: int = 2,
    ):
        self.tokenizer, self._token = tokenizer, tokenizer.unpadded_vocab_size - 1
        self.late_texts = LateInteractionTexts(tokenizer, late_interaction) if late_interaction else None
        self.token_types = token_types or tokenizer.domain is not None
        self.repeat_texts, self.include_prompt = repeat_texts, include_prompt
        self.texts_per_example = 2 if repeat_texts else texts_per_example

    def batch(self, rows: Any, numbers: np.ndarray, keys: np.ndarray, step: int = 1) -> Batch:  # noqa: ARG002
        """Reads examples and packs their texts. Nothing is drawn.

        Args:
            rows: `ExampleRows`, or other rows with `examples`.
            numbers: `[n]`, the examples' numbers; -1 is left out.
            keys: `[n]` uint64, not used.
            step: the optimizer step, not used.

        Raises:
            UserError: `repeat_texts`, and the examples have several texts (code `several_texts`).
        """
        block = rows.examples(numbers)
        if self.repeat_texts:
            block = _with_copies(block)
        kept = None
        if self.late_texts:
            block, kept = _with_markers(block, self.late_texts)
        options = {"token_types": self.token_types, "include_prompt": self.include_prompt}
        batch = batch_of_examples(rows, block, self.tokenizer, **options)
        return batch if kept is None else with_vectors(batch, block.text_lengths, kept)

    def example_batch(self, num_rows: int, seq_len: int) -> Batch:
        """A batch of `num_rows` examples with made-up tokens, scores and labels: for estimates and trial steps.

        Every text has `seq_len` tokens and is a row.
        """
        size = (num_rows, self.texts_per_example, seq_len, self._token)
        batch = made_up_batch(*size, token_types=self.token_types)
        scores = torch.linspace(0, 1, num_rows)[:, None].repeat(1, max(1, self.texts_per_example - 1))
        labels = torch.arange(num_rows) // 2
        examples = replace(batch.examples, scores=scores, labels=labels)
        if self.late_texts is None:
            return replace(batch, examples=examples)
        lengths = torch.full((batch.num_texts,), seq_len)
        positions = torch.arange(batch.num_texts * seq_len)
        return replace(batch, examples=replace(examples, lengths=lengths), vector_positions=positions)


def _with_markers(block: ExampleBlock, texts: LateInteractionTexts) -> tuple[ExampleBlock, np.ndarray]:
    is_query = np.zeros(len(block.text_lengths), bool)
    is_query[block.example_texts[:, 0]] = True
    tokens, lengths, kept = texts.arrange(block.tokens, block.text_lengths, is_query)
    return block._replace(tokens=tokens, text_lengths=lengths, second_starts=lengths), kept


def _with_copies(block: ExampleBlock) -> ExampleBlock:
    if block.example_texts.shape[1] != 1:
        raise UserError(
            f"a text is its own positive, and these examples have {block.example_texts.shape[1]} texts",
            key="collator.repeat_texts",
            hint="Use torchrecipes.data.examples.raw_texts as source, or set collator.repeat_texts=false.",
            code="several_texts",
        )
    copies = block.example_texts + len(block.text_lengths)
    per_text = ("tokens", "text_lengths", "second_starts", "text_hashes", "prompt_lengths")
    twice = {name: np.concatenate([getattr(block, name)] * 2) for name in per_text}
    return block._replace(example_texts=np.concatenate([block.example_texts, copies], axis=1), **twice)
