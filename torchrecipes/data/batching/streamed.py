"""`StreamedRows`: rows of a corpus that another process is still writing.

1. A block is the fewest consecutive shards with as many tokens as `block_rows` full rows. It is a corpus of its own:
   rows do not cross from one block to the next, and any packing makes them.
2. In the first pass over the source the blocks come in its order, and the rows of a block in one permuted by (seed,
   epoch, block). In later passes the blocks are permuted, too.
3. So the row at any position is arithmetic, once its block is complete, and the same whether the source has ended or
   not. Whoever asks for a row of a block that is not complete waits.

Two blocks are open at a time. How many rows each has is kept in the folder, so that a run which is resumed opens the
one block that it continues in.
"""

import json
import math
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import xxhash

from torchrecipes.atomic_write import write_atomically
from torchrecipes.data.batching.rows import RowBlock, Rows, join_blocks
from torchrecipes.data.batching.shuffle import fold_in, permute
from torchrecipes.data.corpus.corpus import Corpus
from torchrecipes.data.corpus.stream import SHARDS_AHEAD, Stream
from torchrecipes.data.progress import LINE_EVERY
from torchrecipes.errors import UserError

BLOCK_ROWS = 2**18
OPEN_BLOCKS = 2
BLOCKS_AHEAD = 2  # that the tokenizer writes beyond the one that is read
ORDER_OF_BLOCKS = 2**34  # takes the place of a block in what their order is drawn from


class StreamedRows:
    """Rows over a growing corpus. Waits until the first block is complete.

    Args:
        stream: the corpus.
        make_rows: makes the rows of a block, which is a corpus: a packing's class with its arguments; picklable.
        seq_len: S, tokens per row.
        block_rows: rows of a block, at least, where they are full.
        wait: False: UserError (code `unfinished_corpus`) where the first block is not complete.

    Attributes:
        stream: as given.
        lookahead, pad_id: see `Rows`.
        tokens_per_row: mean number of tokens that are not padding, in the first block.
        source_names: (), one source.
    """

    source_names = ()

    def __init__(
        self,
        stream: Stream,
        make_rows: Callable[[Corpus], Rows],
        seq_len: int,
        block_rows: int = BLOCK_ROWS,
        wait: bool = True,
    ):
        if block_rows < 1:
            raise UserError(f"{block_rows} is less than 1", key="data.block_rows", hint="Set 1 or more.")
        self.stream, self.make_rows, self.seq_len, self.block_rows = stream, make_rows, seq_len, block_rows
        self._blocks: list[range] = []  # the shards of every complete block
        self._known: list[int] = []  # rows of blocks, those of an earlier run first
        self._open: OrderedDict[int, Rows] = OrderedDict()
        while not self._find_blocks():
            if not wait:
                problem, hint = f"the first block of {stream.folder} is not complete", "Wait for it."
                raise UserError(problem, hint=hint, code="unfinished_corpus")
            stream.wait(show_every=LINE_EVERY)
        first = self._block(0)
        self.lookahead, self.pad_id, self.tokens_per_row = first.lookahead, first.pad_id, first.tokens_per_row
        self._kind = f"{type(first).__name__} of {seq_len} tokens in blocks of {block_rows}"
        self._table = stream.folder / f"rows-{xxhash.xxh3_64_hexdigest(f'{self._kind} {self.lookahead}'.encode())}.json"
        with suppress(OSError, ValueError):
            self._known = json.loads(self._table.read_text())
        self._count_rows()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": OrderedDict()}

    @property
    def corpus(self) -> Corpus:
        """The first block: what there is of the text before the first step."""
        return self.stream.corpus(self._blocks[0].start, self._blocks[0].stop)

    def held_out(self) -> Corpus | None:
        """The documents of the first block that are for validation; None: there are none.

        Those that come later in the source are neither trained on nor evaluated.
        """
        shards = self.stream.num_validation_shards(len(self._blocks[0]))
        return self.stream.corpus(0, shards, "validation") if shards else None

    @property
    def num_rows(self) -> int:
        """Rows of an epoch.

        Raises:
            UserError: the source has not been read to its end (code `unfinished_stream`).
        """
        self._refresh()
        if not self.stream.finished:
            raise UserError(
                "the length of the text is not known before the stream has ended",
                key="epochs",
                hint="Set max_steps or total_tokens; or data.mode=prepare, which tokenizes all of it before training.",
                code="unfinished_stream",
            )
        return int(self._ends[-1])

    @property
    def num_available(self) -> float:
        """Positions from 0 that `locate` finds without waiting."""
        self._refresh()
        return math.inf if self.stream.finished else int(self._ends[-1])

    def identity(self) -> dict[str, int | float | bool | str]:
        """What the rows and their order depend on; the same while the stream grows and after its end."""
        return {"corpus": self.stream.folder.name, "rows": self._kind}

    def check_trainable(self) -> None:
        """Raises UserError (code `too_little_text`) where the text does not fill one row."""
        self._block(0).check_trainable()

    def locate(self, positions: np.ndarray, seed: int, shuffle: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Numbers and epochs of the rows at positions counted from a run's start (see `Rows`).

        Waits until the blocks of all of them are complete.
        """
        positions = np.asarray(positions, np.int64)
        last = int(positions.max(initial=0))
        while last >= self._ends[-1] and not self.stream.finished:
            self.stream.wait()
            self._refresh()
        epochs, within = np.divmod(positions, self._ends[-1]) if self.stream.finished else (positions * 0, positions)
        numbers = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            now = epochs == epoch
            numbers[now] = self._permuted(within[now], epoch, seed) if shuffle else within[now]
        return numbers, epochs

    def rows(self, numbers: np.ndarray) -> RowBlock:
        """The rows with these numbers, `[B]`, each with its lookahead; -1 is a row of padding."""
        blocks = self._ends.searchsorted(np.maximum(numbers, 0), "right")
        found = np.unique(blocks)
        local = np.where(numbers < 0, -1, numbers - (self._ends - self._sizes)[blocks])
        if len(found) == 1:
            return self._block(int(found[0])).rows(local)
        places = [(blocks == block).nonzero()[0] for block in found]
        read = (self._block(int(block)).rows(local[where]) for block, where in zip(found, places, strict=True))
        return join_blocks(list(zip(places, read, strict=True)))

    def _permuted(self, within: np.ndarray, epoch: int, seed: int) -> np.ndarray:
        """The rows at positions `[P]` within an epoch."""
        sizes = self._sizes
        order = np.arange(len(sizes))  # in the first epoch, in which blocks are still being added
        if epoch:
            order = permute(order, len(order), fold_in(seed, epoch, ORDER_OF_BLOCKS))
        ends = np.cumsum(sizes[order])
        firsts = self._ends - sizes
        slots = ends.searchsorted(within, "right")
        numbers = np.empty_like(within)
        for slot in np.unique(slots).tolist():
            now, block = slots == slot, int(order[slot])
            size = int(sizes[block])
            local = within[now] - (ends[slot] - size)
            numbers[now] = firsts[block] + permute(local, size, fold_in(seed, epoch, block))
        return numbers

    def _refresh(self) -> None:
        self.stream.refresh()
        self._find_blocks()
        self._count_rows()

    def _find_blocks(self) -> bool:
        """Finds blocks that have become complete; returns whether there is any."""
        first = self._blocks[-1].stop if self._blocks else 0
        tokens = 0
        for last, shard in enumerate(self.stream.shards[first:], first + 1):
            tokens += shard.tokens
            is_end = self.stream.finished and last == len(self.stream.shards)
            if tokens >= self.block_rows * self.seq_len or is_end:
                self._blocks.append(range(first, last))
                first, tokens = last, 0
        return bool(self._blocks)

    def _count_rows(self) -> None:
        uncounted = range(len(self._known), len(self._blocks))
        self._known += [self._block(block).num_rows for block in uncounted]
        if uncounted:
            with suppress(OSError):  # it saves the time to count them again, no more
                write_atomically(self._table, [json.dumps(self._known).encode()])
        self._sizes = np.array(self._known[: len(self._blocks)])
        self._ends = np.cumsum(self._sizes)

    def _block(self, number: int) -> Rows:
        if number not in self._open:
            shards = self._blocks[number]
            self._open[number] = self.make_rows(self.stream.corpus(shards.start, shards.stop))
            self.stream.want(shards.stop + max(SHARDS_AHEAD, BLOCKS_AHEAD * len(shards)))
            while len(self._open) > OPEN_BLOCKS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def __str__(self) -> str:
        self._refresh()
        tokens = sum(shard.tokens for shard in self.stream.shards)
        state = "" if self.stream.finished else " so far"
        return (
            f"{tokens:,} tokens{state}, {self._ends[-1]:,} rows of {self.seq_len} in {len(self._blocks):,} blocks, "
            f"{self.tokens_per_row:.1f} tokens used per row ({self.tokens_per_row / self.seq_len:.1%})"
        )
