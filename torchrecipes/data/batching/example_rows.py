"""`ExampleRows`: examples in the place of rows, in an order that is arithmetic.

1. What a `Loader` counts are examples: step s of G holds the positions from `(s - 1) * G` of the run, and their order
   is the permutation of shuffle.py.
2. Examples differ in length: a step is shared out among the ranks, and a rank's share among its micro-batches, so that
   each has about as many tokens (`share_by_length`, `split_by_length`).
"""

import math
from typing import Protocol, runtime_checkable

import numpy as np

from torchrecipes.data.batching.rows import RowBlock
from torchrecipes.data.batching.shuffle import row_indices
from torchrecipes.data.examples.block import ExampleBlock
from torchrecipes.errors import UserError


class ExampleSource(Protocol):
    """A corpus of examples, as `ExampleRows` reads it.

    Attributes:
        num_examples: E.
        fingerprint: of the content.
        texts_per_example: k, the most texts that an example has.
        example_lengths: `[E]` int64: tokens of all texts of an example.
        labels: of all examples, as in `ExampleBlock`, or None.
    """

    num_examples: int
    fingerprint: str
    texts_per_example: int
    example_lengths: np.ndarray
    labels: np.ndarray | None

    def read(self, numbers: np.ndarray) -> ExampleBlock:
        """The examples with these numbers, `[n]`."""


@runtime_checkable
class ReadsExamples(Protocol):
    """`Rows` that are examples.

    Attributes:
        per_label: how many consecutive examples of a step stay together on a rank.
    """

    per_label: int

    def examples(self, numbers: np.ndarray) -> ExampleBlock:
        """The examples with these numbers, `[n]`; a number of -1 is left out."""

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """`[n]` int64: tokens of all texts of these examples; 0 for a number of -1."""


class ExampleRows:
    """The examples of a corpus. They are `Rows` for a `Loader`, and `examples` reads them.

    Args:
        corpus: an `ExampleCorpus`.
        seq_len: tokens that a text has at most.
        pad_id: the padding token.

    Attributes:
        num_rows: examples in the corpus.
        tokens_per_row: mean number of tokens of an example, all its texts together.
        texts_per_example: k, the most texts that an example has.
        source_names: (), one source.
    """

    source_names, num_available, lookahead, per_label = (), math.inf, 0, 1

    def __init__(self, corpus: ExampleSource, seq_len: int, pad_id: int):
        self.corpus, self.seq_len, self.pad_id = corpus, seq_len, pad_id
        self.num_rows, self.texts_per_example = corpus.num_examples, corpus.texts_per_example
        self.tokens_per_row = float(np.mean(corpus.example_lengths)) if self.num_rows else 0.0

    def identity(self) -> dict[str, int | float | bool | str]:
        """What the examples and their order depend on."""
        return {"corpus": self.corpus.fingerprint, "rows": f"ExampleRows, {self.num_rows} examples"}

    def check_trainable(self) -> None:
        """Raises UserError (code `too_little_text`) where there is no example."""
        if not self.num_rows:
            problem, hint = "there is no example to train on", "Give more examples, or hold out fewer."
            raise UserError(problem, key="data", hint=hint, code="too_little_text")

    def locate(self, positions: np.ndarray, seed: int, shuffle: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Numbers and epochs of the examples at positions counted from a run's start (see `Rows`)."""
        return row_indices(positions, self.num_rows, seed, shuffle)

    def examples(self, numbers: np.ndarray) -> ExampleBlock:
        """The examples with these numbers, `[n]`; a number of -1 is left out."""
        return self.corpus.read(numbers[numbers >= 0])

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """`[n]` int64: tokens of all texts of these examples; 0 for a number of -1."""
        return np.where(numbers < 0, 0, self.corpus.example_lengths[numbers])

    def rows(self, numbers: np.ndarray) -> RowBlock:  # noqa: ARG002
        """Raises TypeError: the collator is one for text."""
        raise TypeError("ExampleRows hold examples: batches of them are made by PairCollator or LabeledCollator")

    def __str__(self) -> str:
        return str(self.corpus)


def share_by_length(lengths: np.ndarray, rank: int, world_size: int, together: int = 1) -> np.ndarray:
    """A rank's share of a step: as many examples as the others have, and about as many tokens.

    Sorted by length, examples are dealt to the ranks in turn, so that two ranks differ by less than one example.

    Args:
        lengths: `[n]` int64, tokens of the examples of a step.
        rank, world_size: this process among all.
        together: consecutive examples that stay together; `n` is a multiple of this times `world_size`.

    Returns:
        The places of the rank's examples in `lengths`, `[n / world_size]` int64.
    """
    dealt = np.argsort(lengths.reshape(-1, together).sum(1), kind="stable")[rank::world_size]
    return (dealt[:, None] * together + np.arange(together)).ravel()


def split_by_length(lengths: np.ndarray, pieces: int) -> list[np.ndarray]:
    """Splits examples into pieces of about as many tokens, each of examples of similar length.

    Args:
        lengths: `[n]` int64, tokens of the examples.
        pieces: from 1 to n.

    Returns:
        The places of each piece's examples in `lengths`, at least one, the pieces from the shortest examples to the
        longest.
    """
    order = np.argsort(lengths, kind="stable")
    ends = np.cumsum(lengths[order])
    # A piece ends after the example whose middle is the last within its share of the tokens.
    middles, least = ends - lengths[order] / 2, np.arange(1, pieces)
    cuts = np.searchsorted(middles, ends[-1] * (least / pieces))
    cuts = np.maximum.accumulate(np.maximum(cuts - least, 0)) + least
    return np.split(order, np.minimum(cuts, len(order) - pieces + least))
