"""From an optimizer step to its micro-batches.

1. A run consumes rows one after the other: step s of G rows holds the positions from `(s - 1) * G` (shuffle.py).
2. Every rank takes its share of a step's rows, in micro-batches. Examples differ in length: they are shared out so that
   ranks, and then micro-batches, have about as many tokens.
3. Masks are drawn from a key of (seed, epoch, row) (mlm.py).

What a step sees does not depend on the number of ranks, workers or micro-batches, and the state is one integer: the
rows consumed so far.
"""

import itertools
import math
import signal
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from torch.utils.data import DataLoader, Dataset

from torchrecipes.data.batching.appended import AppendedRows
from torchrecipes.data.batching.batch import Batch
from torchrecipes.data.batching.collator import Collator
from torchrecipes.data.batching.dataset_batches import DatasetBatches
from torchrecipes.data.batching.example_rows import ReadsExamples, share_by_length, split_by_length
from torchrecipes.data.batching.grouped_rows import GroupedRows
from torchrecipes.data.batching.mixture import MixtureRows, exhausted
from torchrecipes.data.batching.rows import Rows, number_in_source
from torchrecipes.data.batching.shuffle import fold_in, permute
from torchrecipes.devices import preset
from torchrecipes.errors import UserError

EVALUATION = 2**32  # takes the place of a seed in what evaluation draws


class Loader:
    """Micro-batches of every optimizer step, in order and without end.

        for step in range(1, max_steps + 1):
            for batch in loader.next_step():
                ...

    `for batch in loader` yields the same micro-batches one by one.

    Args:
        dataset: `PackedDataset`, `PaddedDataset`, `ExampleRows`, or other `Rows`.
        collator: makes batches of rows: `MLMCollator`, `CausalLMCollator`, `PairCollator`, `LabeledCollator`, or
            another `Collator`.
        seed: chooses order and masks.
        global_batch_size: rows of an optimizer step, over all ranks and micro-batches.
        micro_batch_size: rows of a forward pass on one rank, at most: see `largest_micro_batch`. Of examples it is the
            mean number: those of similar length are together, and all micro-batches have about as many tokens. `auto`:
            to be set before the first step; a loaded state sets it.
        rank, world_size: this process among all.
        shuffle: False: rows in the order of the corpus.
        num_workers: processes that make batches ahead of time. 0: made when they are asked for.
        device: where batches go.

    Attributes:
        step: the optimizer step that `next_step` returns next, counted from 1.
        rows_consumed: rows of the steps before it, and of those that a rollback skipped.
        micro_batch_size: may be set before the first step.

    Raises:
        UserError: the corpus does not fill a row, or the rows of a step cannot be divided among the ranks.
    """

    def __init__(
        self,
        dataset: Rows,
        collator: Collator,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int | Literal["auto"],
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        num_workers: int = 0,
        device: torch.device | None = None,
    ):
        share = rows_per_rank(global_batch_size, world_size)
        self._data = _Steps(dataset, collator, seed, shuffle, global_batch_size, rank * share, share)
        self.micro_batch_size = micro_batch_size
        self._num_workers, self._device = num_workers, device
        self.step, self.rows_consumed = 1, 0
        self._batches: Iterator[list[Batch]] | None = None

    @property
    def micro_batch_size(self) -> int | Literal["auto"]:
        """Rows of a forward pass on one rank."""
        return self._data.micro_batch_size

    @micro_batch_size.setter
    def micro_batch_size(self, size: int | Literal["auto"]) -> None:
        self._data.micro_batch_size = size if size == "auto" else largest_micro_batch(self._data.num_rows, size)

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next optimizer step."""
        if self._batches is None:
            self._batches = self._start()
        batches = next(self._batches)
        self.step += 1
        self.rows_consumed += self._data.global_batch_size
        return batches if self._device is None else [batch.to(self._device) for batch in batches]

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield from self.next_step()

    def seek(self, step: int, rows_consumed: int | None = None) -> None:
        """Makes `step` the next one, in constant time.

        Args:
            step: counted from 1.
            rows_consumed: rows to leave out before it. None: those of the steps before it.
        """
        self.step = step
        self.rows_consumed = (step - 1) * self._data.global_batch_size if rows_consumed is None else rows_consumed
        self._batches, self._data.block = None, range(0)

    def set_source_weights(self, weights: Mapping[str, float]) -> int:
        """Changes the weights of a mixture from the next block of 1,024 rows on of which nothing has been read.

        Call it alike on all ranks, between steps. Checkpoints hold the weights. Workers are started again.

        Args:
            weights: the share of every source (see `MixtureRows`).

        Returns:
            The first step that has rows of the new weights.

        Raises:
            TypeError: the rows are not a mixture.
            UserError: wrong weights.
        """
        if not isinstance(self._data.dataset, MixtureRows):
            raise TypeError(
                f"set_source_weights needs MixtureRows, and the rows are {type(self._data.dataset).__name__}"
            )
        row = self._data.dataset.set_weights(weights, self.rows_consumed)
        self.seek(self.step, self.rows_consumed)
        return self.step + (row - self.rows_consumed) // self._data.global_batch_size

    @property
    def source_weights(self) -> dict[str, float]:
        """The weights of a mixture in the next block of which nothing has been read; {} where there is one source."""
        dataset = self._data.dataset
        return dataset.weights_at(self.rows_consumed) if isinstance(dataset, MixtureRows) else {}

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it means: the corpus, the order, the batch size, the weights of a mixture."""
        position = {"step": self.step, "rows_consumed": self.rows_consumed, "micro_batch_size": self.micro_batch_size}
        dataset = self._data.dataset
        mixture = {"mixture": dataset.state_dict()} if isinstance(dataset, MixtureRows) else {}
        segments = {"segments": dataset.state_dict()} if isinstance(dataset, AppendedRows) else {}
        return position | self._data.identity() | mixture | segments

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken.

        Rows that this loader has consumed beyond that (before a rollback) are not seen again. Over a corpus that text
        has been added to since, a new epoch begins, and a line says so.

        Raises:
            UserError: the state is of another corpus, order or batch size (code `other_data`).
        """
        now, dataset = self._data.identity(), self._data.dataset
        if isinstance(dataset, MixtureRows | AppendedRows):
            now = {key: value for key, value in now.items() if key not in dataset.free_to_differ(state)}
        differing = [f"{key} (saved {state.get(key)}, current {now[key]})" for key in now if state.get(key) != now[key]]
        lineage = dataset.corpus.lineage if isinstance(dataset, AppendedRows) else [state.get("corpus")]
        if unknown := [fingerprint for _, fingerprint in state.get("segments", []) if fingerprint not in lineage]:
            differing.append(f"the corpus as it was before additions (saved {', '.join(unknown)}, current unknown)")
        if differing:
            raise UserError(
                f"the checkpoint was trained on other rows: {', '.join(differing)}",
                key="checkpoint.resume",
                hint="Bring back the text and settings it was trained with. To train its weights on this text from "
                "step 1: init_from=CHECKPOINT output_dir=OTHER.",
                code="other_data",
            )
        if self.micro_batch_size == "auto":
            self.micro_batch_size = state["micro_batch_size"]
        is_rollback = self.rows_consumed > state["rows_consumed"]
        row = max(self.rows_consumed, state["rows_consumed"])
        if isinstance(dataset, MixtureRows):
            dataset.load_state_dict(state["mixture"], row, rollback=is_rollback)
        if isinstance(dataset, AppendedRows):
            added = dataset.load_state_dict(state, row, rollback=is_rollback)
            if added and row and self._data.first_row == 0:
                print(
                    f"{added:,} documents were added to the corpus since this checkpoint: from step {state['step']:,} "
                    f"on, rows come from all {dataset.corpus.num_documents:,} documents, in a new epoch",
                    flush=True,
                )
        self.seek(state["step"], row)

    def _start(self) -> Iterator[list[Batch]]:
        # On first use, not before: workers are processes.
        steps = zip(
            itertools.count(self.step),
            itertools.count(self.rows_consumed, self._data.global_batch_size),
            strict=True,
        )
        loader = DataLoader(
            self._data,
            batch_size=None,
            sampler=steps,
            num_workers=self._num_workers,
            worker_init_fn=_ignore_signals if self._num_workers else None,
            prefetch_factor=4 if self._num_workers else None,
            pin_memory=self._device is not None and preset(self._device).copies_async,
            # Its own generator: DataLoader would draw from the global one, which dropout reads.
            generator=torch.Generator(),
        )
        return iter(loader)


def rows_per_rank(global_batch_size: int, world_size: int) -> int:
    """A rank's rows of an optimizer step.

    Raises:
        UserError: the ranks cannot share them equally.
    """
    if global_batch_size < 1 or global_batch_size % world_size:
        multiple = max(1, -(-global_batch_size // world_size)) * world_size
        raise UserError(
            f"{global_batch_size} is not a multiple of {world_size} processes",
            key="global_batch_size",
            hint=f"Use a multiple, such as global_batch_size={multiple}, or another number of processes.",
            code="not_divisible",
        )
    return global_batch_size // world_size


def largest_micro_batch(rows_per_rank: int, at_most: int) -> int:
    """The largest number of rows that divides a rank's share of a step and is not more than `at_most`."""
    if at_most < 1:
        raise UserError(f"{at_most} is not 1 or more", key="micro_batch_size", code="out_of_range")
    return max(rows for rows in range(1, min(rows_per_rank, at_most) + 1) if rows_per_rank % rows == 0)


def evaluation_batches(
    dataset: Rows,
    collator: Collator,
    rows_per_batch: int,
    limit: int | None = None,
    *,
    name: str = "validation",
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | None = None,
) -> Iterator[Batch]:
    """Every row once, with masks that are the same every time.

    Args:
        dataset, collator: as for `Loader`; a mask probability that depends on the step is that of step 1.
        rows_per_batch: rows of a batch; the last is filled up with rows of padding. Examples are not filled up: the
            last batches may have fewer, and none.
        limit: rows at most; a random choice, the same every time. None: all.
        name: of the evaluation set: rows and masks of two sets are drawn independently.
        rank, world_size: this process takes every `world_size`-th batch, from the `rank`-th. All take as many: a
            sharded model needs every rank in each forward pass.
        device: where batches go.
    """
    key = fold_in(EVALUATION, xxhash.xxh3_64_intdigest(name.encode()) >> 1)
    positions = np.arange(dataset.num_rows if limit is None else min(limit, dataset.num_rows))
    if len(positions) < dataset.num_rows:
        positions = permute(positions, dataset.num_rows, key)
    numbers, _ = dataset.locate(positions, seed=0, shuffle=False)
    numbers = np.pad(numbers, (0, -len(numbers) % (world_size * rows_per_batch)), constant_values=-1)
    for start in range(rank * rows_per_batch, len(numbers), world_size * rows_per_batch):
        chosen = numbers[start : start + rows_per_batch]
        batch = collator.batch(dataset, chosen, fold_in(key, number_in_source(chosen)))
        yield batch if device is None else batch.to(device)


class _Steps(Dataset):
    """steps[step, position]: the micro-batches of `step`, whose rows begin at `position`."""

    def __init__(self, dataset, collator, seed, shuffle, global_batch_size, first_row, num_rows):
        dataset.check_trainable()
        if isinstance(dataset, DatasetBatches | GroupedRows):
            dataset.check_batch(global_batch_size)
        self.dataset, self.collator, self.seed, self.shuffle = dataset, collator, seed, shuffle
        self.global_batch_size, self.first_row, self.num_rows = global_batch_size, first_row, num_rows
        self.micro_batch_size: int | Literal["auto"] = "auto"
        # The arithmetic of the order costs as much for thousands of rows as for a few: it is done for a block of steps.
        # Of examples a step is divided among the ranks by their lengths, so each rank locates those of all.
        self.is_examples = isinstance(dataset, ReadsExamples)
        self.located = np.arange(global_batch_size) if self.is_examples else first_row + np.arange(num_rows)
        self.steps_per_block = max(1, 4096 // len(self.located))
        self.block, self.numbers, self.keys = range(0), None, None

    def identity(self) -> dict[str, int | float | bool | str]:
        """What the order of the rows depends on."""
        order = {"seed": self.seed, "shuffle": self.shuffle, "global_batch_size": self.global_batch_size}
        return self.dataset.identity() | order

    def __getitem__(self, at: tuple[int, int]) -> list[Batch]:
        step, position = at
        if position not in self.block:
            steps = self.steps_per_block
            if position + steps * self.global_batch_size > self.dataset.num_available:
                steps = 1  # a stream: no more than is needed now
            self.block = range(position, position + steps * self.global_batch_size, self.global_batch_size)
            positions = np.array(self.block)[:, None] + self.located
            self.numbers, epochs = self.dataset.locate(positions, self.seed, self.shuffle)
            self.keys = fold_in(self.seed, epochs, number_in_source(self.numbers))
        numbers, keys = self.numbers[self.block.index(position)], self.keys[self.block.index(position)]
        if (numbers < 0).any():
            raise exhausted(position)
        pieces = self.num_rows // self.micro_batch_size
        if self.is_examples:
            lengths = self.dataset.lengths(numbers)
            together = math.gcd(self.dataset.per_label, self.num_rows)
            rank, world_size = self.first_row // self.num_rows, self.global_batch_size // self.num_rows
            share = share_by_length(lengths, rank, world_size, together)
            split = [share[piece] for piece in split_by_length(lengths[share], pieces)]
        else:
            split = np.split(np.arange(self.num_rows), pieces)
        return [self.collator.batch(self.dataset, numbers[piece], keys[piece], step) for piece in split]


def _ignore_signals(_worker: int) -> None:
    # Both reach the whole group of processes. The main one finishes its step and still needs the workers' batches; they
    # end when it closes their queues, or has died.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
