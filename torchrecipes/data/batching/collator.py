"""`Collator`: what a `Loader` makes batches with."""

from typing import Any, Protocol

import numpy as np

from torchrecipes.data.batching.batch import Batch


class Collator(Protocol):
    """Turns rows or examples into batches. All that it draws follows from the rows' keys."""

    def batch(self, rows: Any, numbers: np.ndarray, keys: np.ndarray, step: int = 1) -> Batch:
        """Reads rows and makes their batch.

        Args:
            rows: `Rows`, or rows of examples.
            numbers: `[B]` int64, the rows' numbers; -1 is padding.
            keys: `[B]` uint64, one for each row: all that is random about it is a function of its key.
            step: the optimizer step, counted from 1.
        """
        ...

    def example_batch(self, num_rows: int, seq_len: int) -> Batch:
        """A batch of the shapes of real ones, with made-up tokens: for estimates and trial steps."""
        ...
