"""`GroupedRows`: labeled examples so that some of each label come together, as batch-hard losses need it.

1. An epoch permutes the examples of each label and cuts them into groups of K; the last group of a label is filled up
   from the label's first. So every example comes at least once.
2. The groups of all labels are permuted, and K consecutive positions of the run are a group.
3. Both permutations are arithmetic (shuffle.py), keyed by (seed, epoch, label) and (seed, epoch).
"""

import math

import numpy as np

from torchrecipes.data.batching.example_rows import ExampleRows, ExampleSource
from torchrecipes.data.batching.rows import RowBlock
from torchrecipes.data.batching.shuffle import fold_in, permute
from torchrecipes.data.examples.block import ExampleBlock
from torchrecipes.errors import UserError

GROUPS = 2**36  # takes the place of a label in what the order of the groups is drawn from


class GroupedRows:
    """Examples of a corpus with labels, groups of them with the same label. They are `Rows` for a `Loader`.

    A batch should have several groups, and a multiple of `per_label` examples on every rank.

    Args:
        corpus: an `ExampleCorpus` whose labels are classes.
        seq_len: tokens that a text has at most.
        pad_id: the padding token.
        per_label: K, examples of a group.

    Attributes:
        num_rows: positions of an epoch, those that fill up groups included.
        tokens_per_row, texts_per_example, source_names: as of `ExampleRows`.
        left_out: examples whose label no other example has; they would be a group of copies.

    Raises:
        UserError: the examples have no classes (code `no_classes`); fewer than two labels have two examples
            (`few_labels`); `per_label` is less than 2 (`out_of_range`).
    """

    source_names, num_available, lookahead = (), math.inf, 0

    def __init__(self, corpus: ExampleSource, seq_len: int, pad_id: int, per_label: int = 4):
        if per_label < 2:
            raise UserError(
                f"{per_label} is less than 2", key="data.per_label", hint="4 is usual.", code="out_of_range"
            )
        self._rows = ExampleRows(corpus, seq_len, pad_id)
        self.corpus, self.seq_len, self.pad_id, self.per_label = corpus, seq_len, pad_id, per_label
        self.tokens_per_row, self.texts_per_example = self._rows.tokens_per_row, self._rows.texts_per_example
        labels = corpus.labels
        if labels is None or labels.ndim != 1 or labels.dtype.kind == "f":
            problem, hint = "the examples have no labels that are classes", "Use labeled_texts with one class for each."
            raise UserError(problem, key="data.per_label", hint=hint, code="no_classes")
        classes, of_class, counts = np.unique(labels, return_inverse=True, return_counts=True)
        self.left_out = int((counts == 1).sum())
        if len(classes) - self.left_out < 2:
            problem = f"labels with two examples or more: {len(classes) - self.left_out}; at least two are needed"
            raise UserError(problem, key="data", hint="Give more examples of each label.", code="few_labels")
        # The examples label by label, without those that are left out.
        order = np.argsort(of_class, kind="stable")
        self._order = order[counts[of_class[order]] > 1]
        self._counts = counts[counts > 1]
        self._first_example = np.cumsum(self._counts) - self._counts
        groups = -(-self._counts // per_label)
        self._last_group = np.cumsum(groups)
        self._first_group = self._last_group - groups
        self.num_rows = int(groups.sum()) * per_label

    def identity(self) -> dict[str, int | float | bool | str]:
        """What the examples and their order depend on."""
        kind = f"GroupedRows, {self.num_rows} in groups of {self.per_label}"
        return self._rows.identity() | {"rows": kind}

    def check_trainable(self) -> None:
        """There are examples of two labels at least."""

    def check_batch(self, global_batch_size: int) -> None:
        """Raises UserError (code `not_divisible`) where a step would end inside a group."""
        if global_batch_size % self.per_label:
            raise UserError(
                f"{global_batch_size} is not a multiple of data.per_label={self.per_label}",
                key="global_batch_size",
                hint=f"Use a multiple, such as {-(-global_batch_size // self.per_label) * self.per_label}.",
                code="not_divisible",
            )

    def locate(self, positions: np.ndarray, seed: int, shuffle: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Numbers and epochs of the examples at positions counted from a run's start (see `Rows`).

        Without `shuffle` the groups of a label follow each other.
        """
        epochs, within = np.divmod(np.asarray(positions, dtype=np.int64), self.num_rows)
        groups, nth = np.divmod(within, self.per_label)
        if shuffle:
            groups = permute(groups, self.num_rows // self.per_label, fold_in(seed, epochs, GROUPS))
        label = np.searchsorted(self._last_group, groups, "right")
        count = self._counts[label]
        place = ((groups - self._first_group[label]) * self.per_label + nth) % count
        if shuffle:
            place = permute(place, count, fold_in(seed, epochs, label))
        return self._order[self._first_example[label] + place], epochs

    def examples(self, numbers: np.ndarray) -> ExampleBlock:
        """The examples with these numbers, `[n]`; a number of -1 is left out."""
        return self._rows.examples(numbers)

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """`[n]` int64: tokens of all texts of these examples; 0 for a number of -1."""
        return self._rows.lengths(numbers)

    def rows(self, numbers: np.ndarray) -> RowBlock:
        """Raises TypeError: the collator is one for text."""
        return self._rows.rows(numbers)

    def __str__(self) -> str:
        left_out = f", {self.left_out:,} left out" if self.left_out else ""
        return f"{self.corpus}; {len(self._counts):,} labels in groups of {self.per_label}{left_out}"
