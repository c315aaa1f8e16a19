"""`DatasetBatches`: several datasets of examples, every step from one of them, as arithmetic.

1. The steps of a run come in blocks of L. In every block dataset i has exactly q_i steps: `proportional`, so many that
   they hold each of its examples once; `round_robin`, one; with weights, the largest remainders of 1,024 w_i.
2. The steps of a dataset lie evenly in a block: of q_i intervals of equal length each has one, at a place drawn from
   (seed, block). So every beginning of a run has about the shares that were asked for.
3. The k-th step of a dataset holds examples k * G to (k + 1) * G of its own order, which does not depend on the others.

In-batch negatives are then of the same dataset: others would be told apart by their topic or form alone.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from torchrecipes.data.batching.example_rows import ExampleRows
from torchrecipes.data.batching.grouped_rows import GroupedRows
from torchrecipes.data.batching.mixture import largest_remainder
from torchrecipes.data.batching.rows import NUMBER_BITS, RowBlock, number_in_source
from torchrecipes.data.batching.shuffle import fold_in
from torchrecipes.data.examples.block import ExampleBlock
from torchrecipes.errors import UserError

BLOCK = 1024  # steps, with weights
STEPS = 2**35  # takes the place of an epoch in what the steps of a block are drawn from
WEIGHTS = "data.weights"  # key of a config

DatasetWeights = Mapping[str, float] | Literal["proportional", "round_robin"]


class DatasetBatches:
    """Rows of several datasets for a `Loader` that takes each step from one.

    Args:
        parts: the examples of every dataset by name.
        batch_rows: G, examples of a step: the `global_batch_size` of the loader.
        weights: `proportional` to the number of examples, `round_robin`, or the share of every dataset in the steps;
            their sum need not be 1.

    Attributes:
        parts: as given.
        source_names: their names, in order.
        texts_per_example: k, the most texts that an example has.
        per_label: how many consecutive examples stay together on a rank: those of `GroupedRows`.

    Raises:
        UserError: weights of other datasets, or that are not numbers of at least 0 (code `weights`); a share below one
            step in 1,024 (`small_weight`).
    """

    lookahead = 0

    def __init__(
        self,
        parts: Mapping[str, ExampleRows | GroupedRows],
        batch_rows: int,
        weights: DatasetWeights = "proportional",
    ):
        self.parts, self.batch_rows, self.weights = dict(parts), batch_rows, weights
        self.source_names = tuple(self.parts)
        first = next(iter(self.parts.values()))
        self.seq_len, self.pad_id = first.seq_len, first.pad_id
        self.texts_per_example = max(part.texts_per_example for part in self.parts.values())
        self.per_label = math.lcm(*(part.per_label for part in self.parts.values()))
        self._quotas = self._steps_of_block()
        self._block: tuple[Any, np.ndarray, np.ndarray] | None = None  # of the last call of `_slots`

    @property
    def num_rows(self) -> int:
        """Examples of an epoch: with `proportional` those of a block, else as many as all datasets have together."""
        if self.weights == "proportional":
            return int(self._quotas.sum()) * self.batch_rows
        return sum(part.num_rows for part in self.parts.values())

    @property
    def num_available(self) -> float:
        """Positions from 0 that `locate` finds without waiting: no dataset is ahead of the run."""
        return min(part.num_available for part in self.parts.values())

    @property
    def tokens_per_row(self) -> float:
        """Mean number of tokens of an example, all its texts together."""
        means = np.array([part.tokens_per_row for part in self.parts.values()])
        return float(self._quotas @ means / self._quotas.sum())

    def identity(self) -> dict[str, int | float | bool | str]:
        """What the examples and their order depend on, `<dataset>.` before what is a dataset's own."""
        own = {f"{name}.{key}": value for name, part in self.parts.items() for key, value in part.identity().items()}
        return own | {"sources": ", ".join(self.parts), "weights": str(self.weights).replace("'", "")}

    def check_trainable(self) -> None:
        """Raises UserError (code `too_little_text`) where a dataset has no example."""
        for part in self.parts.values():
            part.check_trainable()

    def check_batch(self, global_batch_size: int) -> None:
        """Raises ValueError where a loader's steps are not those of `batch_rows`."""
        if global_batch_size != self.batch_rows:
            raise ValueError(f"steps have {global_batch_size} examples; DatasetBatches was made for {self.batch_rows}")
        for part in self.parts.values():
            if isinstance(part, GroupedRows):
                part.check_batch(global_batch_size)

    def locate(self, positions: np.ndarray, seed: int, shuffle: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Numbers and epochs of the examples at positions counted from a run's start (see `Rows`).

        Without `shuffle` every dataset is in its own order; they take turns all the same.
        """
        positions = np.asarray(positions, dtype=np.int64)
        steps, within = np.divmod(positions, self.batch_rows)
        blocks, slots = np.divmod(steps, self._quotas.sum())
        sources, places = np.empty_like(positions), np.empty_like(positions)
        for block in np.unique(blocks).tolist():
            now = blocks == block
            of_slot, place_of_slot = self._slots(block, seed, shuffle)
            sources[now], places[now] = of_slot[slots[now]], place_of_slot[slots[now]]
        numbers, epochs = np.empty_like(positions), np.empty_like(positions)
        for index, part in enumerate(self.parts.values()):
            mine = sources == index
            if mine.any():
                local, epochs[mine] = part.locate(places[mine] * self.batch_rows + within[mine], seed, shuffle)
                numbers[mine] = local | index << NUMBER_BITS
        return numbers, epochs

    def examples(self, numbers: np.ndarray) -> ExampleBlock:
        """The examples with these numbers, `[n]`, all of one dataset; a number of -1 is left out."""
        index, part, local = self._of_one(numbers)
        block = part.examples(local)
        return block._replace(source_ids=np.full(len(block.example_texts), index))

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """`[n]` int64: tokens of all texts of these examples, all of one dataset; 0 for a number of -1."""
        _, part, local = self._of_one(numbers)
        return part.lengths(local)

    def rows(self, numbers: np.ndarray) -> RowBlock:  # noqa: ARG002
        """Raises TypeError: the collator is one for text."""
        raise TypeError("DatasetBatches hold examples: batches of them are made by PairCollator or LabeledCollator")

    def account(self, num_rows: int) -> list[dict[str, Any]]:
        """What a run of so many examples reads of every dataset: `name`, `share` of all, `rows`, `tokens`, `epochs`."""
        shares = self._quotas / self._quotas.sum()
        return [
            {
                "name": name,
                "share": share,
                "rows": round(share * num_rows),
                "tokens": round(share * num_rows * part.tokens_per_row),
                "epochs": share * num_rows / part.num_rows,
            }
            for (name, part), share in zip(self.parts.items(), shares.tolist(), strict=True)
        ]

    def describe(self, num_rows: int) -> str:
        """`account` as lines of text."""
        width = max(map(len, self.parts))
        return "\n".join(
            f"  {line['name']:{width}}  {line['share']:6.1%} of the steps, {line['rows']:,} examples, "
            f"{line['epochs']:.2f} epochs"
            for line in self.account(num_rows)
        )

    def __str__(self) -> str:
        shares = self._quotas / self._quotas.sum()
        return "\n".join(
            f"{name} ({share:.1%} of the steps): {part}"
            for (name, part), share in zip(self.parts.items(), shares, strict=True)
        )

    def _of_one(self, numbers: np.ndarray) -> tuple[int, ExampleRows | GroupedRows, np.ndarray]:
        """The dataset of some examples, and their numbers in it."""
        index = int(numbers.max(initial=0)) >> NUMBER_BITS
        if (numbers[numbers >= 0] >> NUMBER_BITS != index).any():
            raise ValueError("examples of several datasets are asked for, and a batch is from one")
        return index, self.parts[self.source_names[index]], number_in_source(numbers)

    def _steps_of_block(self) -> np.ndarray:
        """`[datasets]` int64: the steps that each has in a block."""
        if self.weights == "round_robin":
            return np.ones(len(self.parts), dtype=np.int64)
        if self.weights == "proportional":
            return np.array([-(-part.num_rows // self.batch_rows) for part in self.parts.values()])
        if isinstance(self.weights, str):
            hint = "Set proportional, round_robin, or the share of every dataset."
            raise UserError(f"'{self.weights}' is not a valid value", key=WEIGHTS, hint=hint, code="weights")
        if wrong := sorted(self.weights.keys() ^ self.parts.keys()):
            problem = f"the datasets are {', '.join(self.parts)}, the weights differ in {', '.join(wrong)}"
            raise UserError(problem, key=WEIGHTS, hint="Give each a weight; 0 leaves it out.", code="weights")
        shares = np.array([float(self.weights[name]) for name in self.parts])
        if not (np.isfinite(shares).all() and (shares >= 0).all() and shares.any()):
            problem = f"{dict(self.weights)} are not shares"
            raise UserError(problem, key=WEIGHTS, hint="Give numbers of at least 0, not all 0.", code="weights")
        quotas = largest_remainder(shares, BLOCK)
        if small := [name for name, share, q in zip(self.parts, shares, quotas, strict=True) if share and not q]:
            problem = f"the share of {', '.join(small)} is less than one step in {BLOCK:,}"
            raise UserError(problem, key=WEIGHTS, hint="Raise it, or set proportional.", code="small_weight")
        return quotas

    def _slots(self, block: int, seed: int, shuffle: bool) -> tuple[np.ndarray, np.ndarray]:
        """The dataset of every step of a block, and its place among all steps of that dataset: `[L]` int64 each."""
        key = (block, seed, shuffle)
        if self._block is None or self._block[0] != key:
            sources = np.repeat(np.arange(len(self._quotas)), self._quotas)
            quotas = self._quotas[sources]
            nth = np.arange(len(sources)) - (np.cumsum(self._quotas) - self._quotas)[sources]
            if shuffle and self.weights != "round_robin":
                draw = fold_in(seed, STEPS, block, sources, nth)
                within = (draw >> np.uint64(11)).astype(np.float64) * 2.0**-53
            else:
                within = (sources + 0.5) / len(self._quotas)
            order = np.argsort((nth + within) / quotas, kind="stable")
            self._block = key, sources[order], (block * quotas + nth)[order]
        return self._block[1:]
