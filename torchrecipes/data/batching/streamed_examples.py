"""`StreamedExampleRows`: examples of a source that is tokenized while it is trained on.

1. The windows come in the order of the source, and the examples of a window in one permuted by (seed, epoch, window).
2. So the example at any position is arithmetic, once the windows before it have been read, in this run or an earlier
   one whose windows are known.
"""

import math

import numpy as np

from torchrecipes.data.batching.rows import RowBlock
from torchrecipes.data.batching.shuffle import fold_in, permute
from torchrecipes.data.examples.block import ExampleBlock
from torchrecipes.data.examples.streamed import StreamedExamples
from torchrecipes.errors import UserError


class StreamedExampleRows:
    """The examples of a stream. They are `Rows` for a `Loader`, and `examples` reads them.

    Args:
        stream: the examples.
        seq_len: tokens that a text has at most.
        pad_id: the padding token.

    Attributes:
        tokens_per_row: mean number of tokens of an example in the first window, all its texts together.
        source_names: (), one source.
    """

    source_names, lookahead, per_label = (), 0, 1

    def __init__(self, stream: StreamedExamples, seq_len: int, pad_id: int):
        self.stream, self.seq_len, self.pad_id = stream, seq_len, pad_id
        stream.size(0)
        self.tokens_per_row = stream.tokens_per_example

    @property
    def texts_per_example(self) -> int:
        """The most texts that an example has, of those that were read."""
        return self.stream.texts_per_example

    @property
    def num_rows(self) -> int:
        """Examples of an epoch.

        Raises:
            UserError: the source has not been read to its end (code `unfinished_stream`).
        """
        if not self.stream.finished:
            raise UserError(
                "the number of examples is not known before the stream has ended",
                key="epochs",
                hint="Set max_steps or total_tokens.",
                code="unfinished_stream",
            )
        return sum(self.stream.sizes)

    @property
    def num_available(self) -> float:
        """Positions from 0 that `locate` finds without reading on."""
        return math.inf if self.stream.finished else sum(self.stream.sizes)

    def identity(self) -> dict[str, int | float | bool | str]:
        """What the examples and their order depend on; the same before and after the end of the source."""
        return {"corpus": self.stream.fingerprint, "rows": f"StreamedExampleRows in windows of {self.stream.window}"}

    def check_trainable(self) -> None:
        """Does nothing: a stream without examples cannot be opened."""

    def locate(self, positions: np.ndarray, seed: int, shuffle: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Numbers and epochs of the examples at positions counted from a run's start (see `Rows`).

        Reads on until there are windows for all of them.
        """
        positions = np.asarray(positions, np.int64)
        while positions.max(initial=0) >= self.num_available:
            self.stream.size(len(self.stream.sizes))
        epochs, numbers = np.zeros_like(positions), positions
        if self.stream.finished:
            epochs, numbers = np.divmod(positions, self.num_rows)
        if not shuffle:
            return numbers, epochs
        windows, within = np.divmod(numbers, self.stream.window)
        numbers = np.empty_like(positions)
        for epoch, window in np.unique(np.stack([epochs.ravel(), windows.ravel()]), axis=1).T.tolist():
            now = (epochs == epoch) & (windows == window)
            order = permute(within[now], self.stream.size(window), fold_in(seed, epoch, window))
            numbers[now] = window * self.stream.window + order
        return numbers, epochs

    def examples(self, numbers: np.ndarray) -> ExampleBlock:
        """The examples with these numbers, `[n]`; a number of -1 is left out."""
        return self.stream.examples(numbers[numbers >= 0])

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """`[n]` int64: tokens of all texts of these examples; 0 for a number of -1."""
        lengths = np.zeros_like(numbers)
        lengths[numbers >= 0] = self.stream.example_lengths(numbers[numbers >= 0])
        return lengths

    def rows(self, numbers: np.ndarray) -> RowBlock:  # noqa: ARG002
        """Raises TypeError: the collator is one for text."""
        raise TypeError("these are examples: batches of them are made by PairCollator or LabeledCollator")

    def __str__(self) -> str:
        return str(self.stream)
