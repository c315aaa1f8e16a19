"""`MixtureRows`: rows of several sources in exact proportions, as arithmetic.

1. The positions of a run come in blocks of 1,024. In every block source i has exactly q_i rows, the largest remainders
   of 1,024 w_i, at slots that are a permutation keyed by (seed, block). So every batch of some size mixes all sources.
2. The k-th row of a source in the run is the k-th of its own order: it does not depend on the other sources, nor on the
   weights.
3. Weights may change from one block to the next. How many rows of a source come before a block is a sum over the few
   segments of equal quotas before it, so the row at any position is found without the ones before it.
4. A source that has reached its `max_epochs` gives exactly the rows that it has left, and then leaves the mixture: one
   more segment.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from torchrecipes.data.batching.rows import NUMBER_BITS, RowBlock, Rows, join_blocks, number_in_source
from torchrecipes.data.batching.shuffle import fold_in, splitmix64
from torchrecipes.errors import UserError

BLOCK = 1024  # rows
FOREVER = 2**50  # blocks
SLOTS = 2**33  # takes the place of an epoch in what the slots of a block are drawn from
WEIGHTS, MAX_EPOCHS = "data.source.weights", "data.source.max_epochs"  # keys of a config


class _Segment(NamedTuple):
    """Blocks of equal quotas."""

    first_block: int
    quotas: np.ndarray  # [sources] int64, rows in a block
    taken: np.ndarray  # [sources] int64, rows before the first block


class MixtureRows:
    """Rows of several sources, each with its share of every 1,024 rows.

    Args:
        parts: the rows of every source by name, all with the same `seq_len`, `lookahead` and `pad_id`.
        weights: the share of every source in the rows; their sum need not be 1. Or `[(row, weights), ...]`: those from
            a row of the run on, rounded up to a whole block; the first is row 0. With a batch size of G rows, what is
            to change after step s changes at row `s * G`. None: by size.
        alpha: temperature of weights by size: p ~ size ** alpha, in rows. 1 reads each source as often as the others, 0
            gives all the same share, 0.3 to 0.7 is usual for languages (Conneau et al. 2020, 1911.02116, section 3.1).
        max_epochs: how often a source is read at most, by name; the others take its share after that.
        added: sources that may be missing in a checkpoint that this mixture continues from.

    Attributes:
        parts: as given.
        source_names: their names, in order.

    Raises:
        UserError: weights of other sources, or that are not numbers of at least 0 (code `weights`); a share below one
            row in 1,024 (`small_weight`); limits of other sources, or that are not above 0 (`max_epochs`).
    """

    def __init__(
        self,
        parts: Mapping[str, Rows],
        weights: Mapping[str, float] | Sequence[tuple[int, Mapping[str, float]]] | None = None,
        *,
        alpha: float = 1.0,
        max_epochs: Mapping[str, float] | None = None,
        added: Sequence[str] = (),
    ):
        self.parts, self.added = dict(parts), tuple(added)
        self.source_names = tuple(self.parts)
        first = next(iter(self.parts.values()))
        self.seq_len, self.lookahead, self.pad_id = first.seq_len, first.lookahead, first.pad_id
        for name, part in self.parts.items():
            if (part.seq_len, part.lookahead, part.pad_id) != (self.seq_len, self.lookahead, self.pad_id):
                raise ValueError(f"{name} has another seq_len, lookahead or pad_id than {self.source_names[0]}")
            if part.source_names:
                raise ValueError(f"{name} is a mixture itself: name its sources instead")
        if weights is None:
            weights = {name: float(part.num_rows) ** alpha for name, part in self.parts.items()}
        if isinstance(weights, Mapping):
            weights = [(0, weights)]
        self._limits = self._row_limits(max_epochs or {})
        # As they were asked for, before any is changed while training: (first block, shares in the order of parts).
        self._configured = [(-(-row // BLOCK), self._shares(given)) for row, given in weights]
        blocks = [block for block, _ in self._configured]
        if blocks[0] != 0 or blocks != sorted(set(blocks)):
            problem = f"weights start at the rows {[row for row, _ in weights]}"
            hint = f"Start with 0, and let at least {BLOCK:,} rows lie between two changes."
            raise UserError(problem, key=WEIGHTS, hint=hint, code="weights")
        self._set(self._configured)

    @property
    def num_rows(self) -> int:
        """Rows of all sources together; an epoch is as many rows of the mixture."""
        return sum(part.num_rows for part in self.parts.values())

    @property
    def num_available(self) -> float:
        """Positions from 0 that `locate` finds without waiting: no source is ahead of the mixture."""
        return min(part.num_available for part in self.parts.values())

    @property
    def tokens_per_row(self) -> float:
        """Mean number of tokens that are not padding, with the weights of the first block."""
        means = [part.tokens_per_row for part in self.parts.values()]
        return float(self._segments[0].quotas @ np.array(means)) / BLOCK

    def identity(self) -> dict[str, int | float | bool | str]:
        """What the rows and their order depend on, `<source>.` before what is a source's own."""
        parts = {f"{name}.{key}": value for name, part in self.parts.items() for key, value in part.identity().items()}
        mixture = {
            "sources": ", ".join(self.source_names),
            "weights": _show(
                [(block, dict(zip(self.parts, shares, strict=True))) for block, shares in self._configured]
            ),
            "max_rows": _show(dict(zip(self.parts, self._limits, strict=True))),
        }
        return parts | mixture

    def check_trainable(self) -> None:
        """Raises UserError (code `too_little_text`) where the text of a source does not fill one row."""
        for part in self.parts.values():
            part.check_trainable()

    def locate(self, positions: np.ndarray, seed: int, shuffle: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Numbers and epochs of the rows at positions counted from a run's start (see `Rows`).

        Without `shuffle` every source is in its own order; the sources are mixed all the same. Positions at which no
        source has rows left, because of `max_epochs`, have the number -1.
        """
        positions = np.asarray(positions, dtype=np.int64)
        numbers, epochs = np.full_like(positions, -1), np.zeros_like(positions)
        blocks, block_of = np.unique(np.minimum(positions // BLOCK, self._end - 1), return_inverse=True)
        block_of = block_of.reshape(positions.shape)
        sources, places = self._slots(blocks, seed)
        source = sources[block_of, positions % BLOCK]
        place = places[block_of, positions % BLOCK]  # in the run, among the rows of its source
        for index, part in enumerate(self.parts.values()):
            mine = (source == index) & (positions < self._end * BLOCK)
            if mine.any():
                local, epochs[mine] = part.locate(place[mine], seed, shuffle)
                numbers[mine] = local | (index << NUMBER_BITS)
        return numbers, epochs

    def rows(self, numbers: np.ndarray) -> RowBlock:
        """The rows with these numbers, `[B]`, each with its lookahead; -1 is a row of padding."""
        numbers = np.asarray(numbers, dtype=np.int64)
        source_ids, local = np.maximum(numbers, 0) >> NUMBER_BITS, number_in_source(numbers)
        parts = []
        for index, part in enumerate(self.parts.values()):
            where = (source_ids == index).nonzero()[0]
            if where.size:
                parts.append((where, part.rows(local[where])))
        return join_blocks(parts, source_ids)

    def set_weights(self, weights: Mapping[str, float], first_row: int) -> int:
        """Changes the weights from a row of the run on. Weights that were set for a later row apply from there.

        Args:
            weights: the share of every source.
            first_row: rounded up to a whole block.

        Returns:
            The row from which they apply.
        """
        block = -(-first_row // BLOCK)
        changes = [change for change in self._changes if change[0] != block]
        self._set(sorted([*changes, (block, self._shares(weights))]))
        return block * BLOCK

    def weights_at(self, first_row: int) -> dict[str, float]:
        """The weights from a row of the run on, rounded up to a whole block."""
        block = -(-first_row // BLOCK)
        return self._by_name([shares for first, shares in self._changes if first <= block][-1])

    def state_dict(self) -> dict[str, Any]:
        """The weights of every block, those included that were changed while training."""
        return {"sources": list(self.parts), "weights": [[block, list(shares)] for block, shares in self._changes]}

    def load_state_dict(self, state: Mapping[str, Any], first_row: int, *, rollback: bool = False) -> None:
        """Takes over the weights of a state from a row of the run on.

        Args:
            state: from `state_dict`.
            first_row: the row to continue with. Weights apply from the next whole block; those before it are history.
            rollback: what was read up to `first_row` was read with the weights that this mixture has, not with the
                state's.

        Sources in `added` that the state does not have join with the weights that this mixture was made with.
        """
        block = -(-first_row // BLOCK)
        columns = {name: number for number, name in enumerate(state["sources"])}
        saved = [
            (int(first), tuple(shares[columns[name]] if name in columns else 0.0 for name in self.parts))
            for first, shares in state["weights"]
        ]
        past = self._changes if rollback else saved
        future = saved if len(columns) == len(self.parts) else self._configured
        now = [shares for first, shares in future if first <= block][-1]
        past = [change for change in past if change[0] < block]
        if not past or past[-1][1] != now:
            past.append((block, now))
        self._set([*past, *(change for change in future if change[0] > block)])

    def free_to_differ(self, state: Mapping[str, Any]) -> set[str]:
        """Keys of `identity` that need not be those of a checkpoint: what sources in `added` bring with them.

        Args:
            state: of a `Loader`.
        """
        saved = state.get("mixture", {}).get("sources", [])
        joining = [name for name in self.added if name in self.parts and name not in saved]
        if not joining or [name for name in self.parts if name in saved] != saved:
            return set()
        own = {key for key in self.identity() if key.split(".")[0] in joining and "." in key}
        return own | {"sources", "weights", "max_rows"}

    def account(self, num_rows: int) -> list[dict[str, Any]]:
        """What a run of so many rows reads of every source: `name`, `share` of all rows, `rows`, `tokens`, `epochs`.

        Epochs are None for a stream that has not been read to its end.

        Raises:
            UserError: they are more than `max_epochs` lets the sources give (code `mixture_exhausted`).
        """
        if num_rows > self._end * BLOCK:
            raise exhausted(self._end * BLOCK)
        block, rest = divmod(num_rows, BLOCK)
        segment = [s for s in self._segments if s.first_block <= block][-1]
        rows = segment.taken + segment.quotas * (block - segment.first_block + rest / BLOCK)
        return [
            {
                "name": name,
                "share": count / max(num_rows, 1),
                "rows": round(count),
                "tokens": round(count * part.tokens_per_row),
                "epochs": _epochs(count, part),
            }
            for (name, part), count in zip(self.parts.items(), rows.tolist(), strict=True)
        ]

    def describe(self, num_rows: int) -> str:
        """`account` as lines of text."""
        width = max(map(len, self.parts))
        return "\n".join(
            f"  {line['name']:{width}}  {line['share']:6.1%} of the rows, {line['tokens']:,} tokens"
            + ("" if line["epochs"] is None else f", {line['epochs']:.2f} epochs")
            for line in self.account(num_rows)
        )

    def __str__(self) -> str:
        shares = self._segments[0].quotas / BLOCK
        return "\n".join(
            f"{name} ({share:.1%}): {part}" for (name, part), share in zip(self.parts.items(), shares, strict=True)
        )

    def _by_name(self, values: Sequence[Any]) -> dict[str, Any]:
        return dict(zip(self.parts, values, strict=True))

    def _shares(self, weights: Mapping[str, float]) -> tuple[float, ...]:
        """The weights in the order of the parts, checked."""
        names = set(self.parts)
        if weights.keys() != names:
            wrong = sorted(names ^ weights.keys())
            problem = f"the mixture has the sources {', '.join(self.parts)}, the weights differ in {', '.join(wrong)}"
            raise UserError(problem, key=WEIGHTS, hint="Give each a weight; 0 leaves it out.", code="weights")
        shares = tuple(float(weights[name]) for name in self.parts)
        if not all(math.isfinite(share) and share >= 0 for share in shares) or not sum(shares):
            problem = f"{_show(dict(weights))} are not shares"
            raise UserError(problem, key=WEIGHTS, hint="Give numbers of at least 0, not all 0.", code="weights")
        quotas = largest_remainder(np.array(shares), BLOCK)
        small = [name for name, share, quota in zip(self.parts, shares, quotas, strict=True) if share and not quota]
        if small:
            raise UserError(
                f"the share of {', '.join(small)} is less than one row in {BLOCK:,}",
                key=WEIGHTS,
                hint="Raise it, merge the source with another, or lower alpha where weights are by size.",
                code="small_weight",
            )
        return shares

    def _row_limits(self, max_epochs: Mapping[str, float]) -> list[int | None]:
        """The most rows that each source may give."""
        unknown = sorted(max_epochs.keys() - self.parts.keys())
        if unknown or not all(value > 0 for value in max_epochs.values()):
            problem = f"{', '.join(unknown)} is no source" if unknown else "a number is not above 0"
            raise UserError(problem, key=MAX_EPOCHS, hint=f"Sources: {', '.join(self.parts)}.", code="max_epochs")
        return [
            math.floor(max_epochs[name] * part.num_rows) if name in max_epochs else None
            for name, part in self.parts.items()
        ]

    def _set(self, changes: list[tuple[int, tuple[float, ...]]]) -> None:
        """Makes the segments of weights that change at some blocks. Blocks from `_end` on have no rows."""
        self._changes = changes
        limits = np.array([BLOCK * FOREVER if limit is None else limit for limit in self._limits])
        taken = np.zeros(len(limits), dtype=np.int64)
        self._segments: list[_Segment] = []
        self._end = FOREVER
        ends = [first for first, _ in changes[1:]] + [self._end]
        for (block, shares), end in zip(changes, ends, strict=True):
            while block < min(end, self._end):
                quotas = _capped(np.array(shares), limits - taken)
                if quotas is None:
                    self._end = block
                    break
                asked = quotas > 0
                length = min(end - block, int(((limits - taken)[asked] // quotas[asked]).min()))
                self._segments.append(_Segment(block, quotas, taken.copy()))
                block, taken = block + length, taken + length * quotas

    def _slots(self, blocks: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of every slot of these blocks, and its place among the rows of that source: `[blocks, 1024]`."""
        of_segment = np.searchsorted([s.first_block for s in self._segments], blocks, "right") - 1
        used, of_segment = np.unique(of_segment, return_inverse=True)
        segments = [self._segments[index] for index in used]
        sorted_sources = np.stack([np.repeat(np.arange(len(s.quotas), dtype=np.int16), s.quotas) for s in segments])
        draw = splitmix64(fold_in(seed, SLOTS, blocks)[:, None] ^ fold_in(np.arange(BLOCK)))
        permutation = draw.argsort(axis=1, kind="stable")
        sources = np.empty((len(blocks), BLOCK), dtype=np.int16)
        np.put_along_axis(sources, permutation, sorted_sources[of_segment], axis=1)
        # A stable sort by source lists the slots of each in order: how many come before a slot is its place there.
        first = np.stack([s.taken - s.quotas * s.first_block - (np.cumsum(s.quotas) - s.quotas) for s in segments])
        before = first[of_segment] + blocks[:, None] * np.stack([s.quotas for s in segments])[of_segment]
        listed = np.take_along_axis(before, sorted_sources[of_segment], axis=1) + np.arange(BLOCK)
        places = np.empty((len(blocks), BLOCK), dtype=np.int64)
        np.put_along_axis(places, sources.argsort(axis=1, kind="stable"), listed, axis=1)
        return sources, places


def exhausted(num_rows: int) -> UserError:
    """The error of a run that is longer than `max_epochs` lets the sources last: for `num_rows` rows."""
    return UserError(
        f"with these weights and limits the sources last for {num_rows:,} rows, and the run needs more",
        key=MAX_EPOCHS,
        hint="Raise it for a source, or train for fewer steps.",
        code="mixture_exhausted",
    )


def largest_remainder(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers in proportion to `shares` that sum to `total`; of equal remainders the first is rounded up."""
    exact = shares * (total / shares.sum())
    quotas = np.floor(exact).astype(np.int64)
    order = np.argsort(quotas - exact, kind="stable")
    quotas[order[: total - quotas.sum()]] += 1
    return quotas


def _capped(shares: np.ndarray, left: np.ndarray) -> np.ndarray | None:
    """The quotas of a block where no source gives more rows than it has left; None if they do not fill it."""
    quotas, short = np.zeros_like(left), left <= 0
    while True:
        open_shares = np.where(short, 0, shares)
        quotas[short & (shares > 0)] = left[short & (shares > 0)]
        rest = BLOCK - quotas[short].sum()
        if not open_shares.any():
            return quotas if rest == 0 else None
        quotas[~short] = largest_remainder(open_shares, rest)[~short]
        if not (now := (quotas > left) & ~short).any():
            return quotas
        short |= now


def _epochs(num_rows: float, part: Rows) -> float | None:
    try:
        return num_rows / part.num_rows
    except UserError as error:
        if error.code != "unfinished_stream":
            raise
        return None


def _show(value: Any) -> str:
    return str(value).replace("'", "")
