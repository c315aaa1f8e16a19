"""From a step's number to its micro-batches.

1. Row r of optimizer step s is position `(s - 1) * global_batch_size + r` of the run (order.py).
2. Every rank takes its share of a step's rows, in micro-batches.
3. Masks are drawn from a key of (seed, epoch, row) (masking.py).

So what a step sees does not depend on the number of ranks, workers or micro-batches, and the only state is the step.
"""

import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from torchrecipes.data.batching.batch import Batch
from torchrecipes.data.batching.causal import CausalLMCollator
from torchrecipes.data.batching.mlm import MLMCollator
from torchrecipes.data.batching.packing import PackedDataset, PaddedDataset
from torchrecipes.data.batching.shuffle import fold_in, permute, row_indices
from torchrecipes.errors import UserError

EVALUATION = 2**32  # in the place of a seed, for what evaluation draws


class Loader:
    """Micro-batches of every optimizer step, in order.

    Args:
        rows: `PackedDataset` or `PaddedDataset`.
        targets: makes batches of rows, with what is to be predicted: `MLMCollator`, `CausalLMCollator`, or anything
            with their `batch`.
        seed: chooses order and masks.
        global_batch_size: rows of an optimizer step, over all ranks and micro-batches.
        micro_batch_size: rows of a forward pass on one rank, at most: see `largest_micro_batch`.
        max_steps: the last step.
        first_step: the step to begin with, counted from 1.
        rank, world_size: this process among all.
        num_workers: processes that make batches ahead of time. 0: made when they are asked for.
        device: where batches go.

    Raises:
        UserError: the corpus does not fill a row, or the rows of a step cannot be divided among the ranks.
    """

    def __init__(
        self,
        rows: PackedDataset | PaddedDataset,
        targets: MLMCollator | CausalLMCollator,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        max_steps: int,
        first_step: int = 1,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        device: torch.device | None = None,
    ):
        if rows.corpus.num_tokens < rows.seq_len:
            raise UserError(
                f"{rows.corpus.folder}: {rows.corpus.num_tokens} tokens do not fill one row of seq_len={rows.seq_len}. "
                "Give more text, or lower seq_len."
            )
        share = rows_per_rank(global_batch_size, world_size)
        size = largest_micro_batch(share, micro_batch_size)
        self._data = _Steps(rows, targets, seed, global_batch_size, rank * share, share, size)
        self._max_steps, self._num_workers, self._device = max_steps, num_workers, device
        self.seek(first_step)

    def seek(self, step: int, skipped_steps: int = 0) -> None:
        """From here on `step` is next.

        Args:
            step: the step that `step()` will be asked for.
            skipped_steps: steps whose data is left out: step s sees the data that step `s + skipped_steps` would have.
        """
        self._next, self._skipped, self._steps = step, skipped_steps, None

    def _start(self) -> Iterator[list[Batch]]:
        # On the first use, not before: workers are processes.
        loader = DataLoader(
            self._data,
            batch_size=None,
            sampler=range(self._next + self._skipped, self._max_steps + self._skipped + 1),
            num_workers=self._num_workers,
            worker_init_fn=_ignore_signals if self._num_workers else None,
            prefetch_factor=4 if self._num_workers else None,
            pin_memory=self._device is not None and self._device.type == "cuda",
            # A generator of its own: DataLoader would draw from the global one, which dropout reads.
            generator=torch.Generator(),
        )
        return iter(loader)

    def step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of `step`; steps are asked for one after the other, from `first_step`."""
        if step != self._next:
            raise ValueError(f"step {step} is asked for, and step {self._next} is next")
        if self._steps is None:
            self._steps = self._start()
        self._next += 1
        batches = next(self._steps)
        return batches if self._device is None else [batch.to(self._device) for batch in batches]


def rows_per_rank(global_batch_size: int, world_size: int) -> int:
    """A rank's rows of an optimizer step.

    Raises:
        UserError: the ranks cannot share them equally.
    """
    if global_batch_size < 1 or global_batch_size % world_size:
        raise UserError(
            f"global_batch_size={global_batch_size} is not a multiple of {world_size} processes: take a multiple, "
            f"such as "
            f"{max(1, -(-global_batch_size // world_size)) * world_size}, or another number of processes."
        )
    return global_batch_size // world_size


def largest_micro_batch(rows_per_rank: int, at_most: int) -> int:
    """The largest number of rows that divides a rank's share of a step and is not more than `at_most`."""
    if at_most < 1:
        raise UserError(f"micro_batch_size={at_most} is not 1 or more.")
    return max(rows for rows in range(1, min(rows_per_rank, at_most) + 1) if rows_per_rank % rows == 0)


def evaluation_batches(
    rows: PackedDataset | PaddedDataset,
    targets: MLMCollator | CausalLMCollator,
    rows_per_batch: int,
    limit: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | None = None,
) -> Iterator[Batch]:
    """Every row once, with masks that are the same every time.

    Args:
        rows, targets: as for `Loader`.
        rows_per_batch: rows of a batch; the last is filled up with rows of padding.
        limit: rows at most; a random choice, the same every time. None: all.
        rank, world_size: this process takes every `world_size`-th batch, from the `rank`-th. All take as many: a
            sharded model needs every rank in each forward pass.
        device: where batches go.
    """
    numbers = np.arange(rows.num_rows if limit is None else min(limit, rows.num_rows))
    if len(numbers) < rows.num_rows:
        numbers = permute(numbers, rows.num_rows, fold_in(EVALUATION))
    numbers = np.pad(numbers, (0, -len(numbers) % (world_size * rows_per_batch)), constant_values=-1)
    for start in range(rank * rows_per_batch, len(numbers), world_size * rows_per_batch):
        chosen = numbers[start : start + rows_per_batch]
        batch = targets.batch(rows, chosen, fold_in(EVALUATION, chosen))
        yield batch if device is None else batch.to(device)


class _Steps(Dataset):
    """steps[s]: the micro-batches of step s."""

    def __init__(self, rows, targets, seed, global_batch_size, first_row, num_rows, micro_batch_size):
        self.rows, self.targets, self.seed = rows, targets, seed
        self.global_batch_size, self.first_row, self.num_rows = global_batch_size, first_row, num_rows
        self.micro_batch_size = micro_batch_size
        # The arithmetic of the order costs as much for thousands of rows as for a few: it is done for a block of steps.
        self.steps_per_block = max(1, 4096 // num_rows)
        self.block, self.numbers, self.keys = -1, None, None

    def __getitem__(self, step: int) -> list[Batch]:
        block, within = divmod(step - 1, self.steps_per_block)
        if block != self.block:
            steps = block * self.steps_per_block + np.arange(self.steps_per_block)
            positions = steps[:, None] * self.global_batch_size + self.first_row + np.arange(self.num_rows)
            self.numbers, epochs = row_indices(positions, self.rows.num_rows, self.seed)
            self.keys = fold_in(self.seed, epochs, self.numbers)
            self.block = block
        size = self.micro_batch_size
        return [
            self.targets.batch(self.rows, self.numbers[within, i : i + size], self.keys[within, i : i + size])
            for i in range(0, self.num_rows, size)
        ]


def _ignore_signals(_worker: int) -> None:
    # Both reach the whole group of processes; the main one finishes its step and still needs the workers' batches. They
    # end when it closes their queues, or has died.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
