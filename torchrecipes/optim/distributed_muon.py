"""Gathers sharded matrices for a computation on whole matrices, and scatters the results.

`fully_shard` gives every rank some rows of a matrix. Each matrix is owned by one rank, which gathers its rows from the
others, computes, and scatters the rows of the result. Where ranks hold replicas (`ddp`, `hsdp`), one of them computes
and sends the result to the others. A stack of experts is sharded between experts: the rank that holds an expert
computes for it, and nothing is sent.

Matrices of one shape are computed as one batch and travel together. While a batch is computed, the next one arrives and
the results of the one before leave; experts, for which nothing has to arrive, come first.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from torchrecipes.errors import UserError
from torchrecipes.optim.newton_schulz import at_once


class MatrixShard(NamedTuple):
    """A rank's rows of some matrices of one shape.

    Attributes:
        number: index of the parameter in the list that `MatrixSharding.of` got.
        experts: (first, end) in the rank's part of a stack; None: the parameter is a matrix.
        first, last: the matrix' rows within the rank's rows of the parameter (of each expert).
        rows, columns: of the unsharded matrix.
        offset: index of row `first` in the unsharded matrix.
    """

    number: int
    experts: tuple[int, int] | None
    first: int
    last: int
    rows: int
    columns: int
    offset: int

    def of(self, local: Tensor) -> Tensor:
        """A view `[n, last - first, columns]` of the rank's part of the parameter, or of a tensor like it."""
        if self.experts is None:
            return local[None, self.first : self.last]
        return local[self.experts[0] : self.experts[1], self.first : self.last]

    def shape(self) -> tuple[int, int, int]:
        """The shape of that view."""
        count = 1 if self.experts is None else self.experts[1] - self.experts[0]
        return count, self.last - self.first, self.columns


class _Matrices(NamedTuple):
    """A matrix, or several experts of one owner."""

    owner: tuple[int, int]  # replica, shard
    pieces: dict[int, MatrixShard]  # by shard

    def shape(self) -> tuple[int, int, int]:
        piece = next(iter(self.pieces.values()))
        return piece.shape()[0], piece.rows, piece.columns

    def is_stack(self) -> bool:
        return next(iter(self.pieces.values())).experts is not None


class _Batch(NamedTuple):
    """The matrices of one shape, by their indices in the list of all, and what this rank has to do with them."""

    shape: tuple[int, int]
    numbers: list[int]  # all replicas'
    mine: list[int]  # of this rank to compute
    own: list[int]  # of `mine`, those that this rank holds rows of
    sent: list[list[int]]  # by owner: those that this rank holds rows of; none for itself
    asked: list[list[int]]  # by holder: of `mine`, those that it holds rows of; none for itself
    exchanged: bool  # between the ranks of a replica


class MatrixSharding:
    """The matrices of the parameters on one mesh, and their owners; made by `of`, the same on every rank."""

    def __init__(self, mesh: DeviceMesh | None, parameters: dict[int, Tensor], fused: dict[int, tuple[int, ...]]):
        self._device = next(iter(parameters.values())).device
        self._groups: list[dist.ProcessGroup | None] = [None, None]  # ranks with the same shard; with the same replica
        self._sizes, self._place = (1, 1), (0, 0)  # (replicas, shards), and this rank's place
        if mesh is not None:
            place = mesh.get_coordinate()
            if mesh.ndim == 1:
                self._sizes, self._place = (1, mesh.size()), (0, place[0])
                self._groups[1] = mesh.get_group()
            else:
                self._sizes, self._place = (mesh.size(0), mesh.size(1)), (place[0], place[1])
                self._groups = [mesh.get_group(0), mesh.get_group(1)]
        self._matrices = self._share(parameters, fused)
        alike: dict[tuple, list[int]] = {}
        for i, one in enumerate(self._matrices):  # experts are first
            alike.setdefault((one.is_stack(), *one.shape()[1:]), []).append(i)
        self._batches = [self._batch(numbers) for numbers in alike.values()]

    @classmethod
    def of(cls, parameters: list[Tensor], fused: list[tuple[int, ...] | None]) -> list["MatrixSharding"]:
        """One for every mesh that parameters are on, and one for plain tensors.

        Args:
            parameters: `[R, C]`, or `[E, R, C]` for stacks.
            fused: for each the rows of its parts, which are matrices of their own, or None.

        Raises:
            UserError: a parameter is not sharded as `fully_shard` does it.
        """
        by_mesh: dict[DeviceMesh | None, dict[int, Tensor]] = {}
        for number, parameter in enumerate(parameters):
            mesh = None
            if isinstance(parameter, DTensor):
                mesh = parameter.device_mesh
                expected = ((Shard(0),), (Replicate(), Shard(0)))[mesh.ndim - 1 : mesh.ndim]
                if parameter.placements not in expected:
                    raise UserError(
                        f"muon takes parameters that fully_shard has sharded along the first dimension; one of shape "
                        f"{list(parameter.shape)} is placed as {parameter.placements} on a mesh {tuple(mesh.shape)}",
                        key="adamw_param_patterns",
                        hint="Give it to AdamW with a pattern of its name.",
                        code="unsupported_sharding",
                    )
            by_mesh.setdefault(mesh, {})[number] = parameter
        return [
            cls(mesh, found, {i: fused[i] or (parameter.shape[-2],) for i, parameter in found.items()})
            for mesh, found in by_mesh.items()
        ]

    def map(
        self,
        read: Callable[[list[MatrixShard]], Sequence[Tensor]],
        compute: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
    ) -> Iterator[tuple[list[MatrixShard], list[Tensor]]]:
        """Applies `compute` to every matrix. A collective: all ranks call it. Nothing waits for the device.

        Args:
            read: returns this rank's rows of some matrices, `[n, r, C]` each; called once for every matrix.
            compute: `[n, R, C]` -> the same shape, for n matrices at once.
            dtype: of the matrices that are sent and computed.

        Yields:
            Shards that this rank holds, of matrices of one shape, and their rows of the results, `[n, r, C]` in
            `dtype`. Every shard comes once.
        """
        if self._sizes == (1, 1):
            yield from self._map_alone(read, compute, dtype)
            return
        arriving = leaving = spreading = None
        for batch in [*self._batches, None, None, None]:
            following = batch and self._gather(batch, read, dtype)
            computed = arriving and self._compute_and_scatter(*arriving, compute, dtype)
            spread = leaving and self._to_replicas(*leaving, dtype)
            if spreading:
                found, finish = spreading
                finish()
                yield [self._matrices[i].pieces[self._place[1]] for i in found], list(found.values())
            arriving, leaving, spreading = following, computed, spread

    def _map_alone(
        self,
        read: Callable[[list[MatrixShard]], Sequence[Tensor]],
        compute: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
    ) -> Iterator[tuple[list[MatrixShard], list[Tensor]]]:
        """`map` for one rank: a few matrices at a time, in little memory that is reused."""
        for batch in self._batches:
            largest = max(math.prod(self._matrices[i].shape()) for i in batch.numbers)
            count = max(1, at_once(self._device) // max(1, largest))
            for start in range(0, len(batch.numbers), count):
                some = batch.numbers[start : start + count]
                pieces = [self._matrices[i].pieces[0] for i in some]
                stack, places = self._stack(batch.shape, some, dtype)
                torch._foreach_copy_(list(places.values()), read(pieces))
                counts = [len(place) for place in places.values()]
                yield pieces, list(compute(stack).split(counts))

    def _batch(self, numbers: list[int]) -> _Batch:
        replica, shard = self._place
        ours = [i for i in numbers if self._matrices[i].owner[0] == replica]
        mine = [i for i in ours if self._matrices[i].owner[1] == shard]
        held = [i for i in ours if shard in self._matrices[i].pieces]
        others = [t for t in range(self._sizes[1]) if t != shard]
        sent = {t: [i for i in held if self._matrices[i].owner[1] == t] for t in others}
        asked = {t: [i for i in mine if t in self._matrices[i].pieces] for t in others}
        return _Batch(
            self._matrices[numbers[0]].shape()[1:],
            numbers,
            mine,
            [i for i in mine if i in held],
            [sent.get(t, []) for t in range(self._sizes[1])],
            [asked.get(t, []) for t in range(self._sizes[1])],
            any(self._matrices[i].pieces.keys() != {self._matrices[i].owner[1]} for i in ours),
        )

    def _gather(
        self, batch: _Batch, read: Callable[[list[MatrixShard]], Sequence[Tensor]], dtype: torch.dtype
    ) -> tuple[_Batch, Tensor, Callable[[], None]]:
        """The stack of matrices that this rank computes, and a function that waits until all rows are in it."""
        shard = self._place[1]
        stack, whole = self._stack(batch.shape, batch.mine, dtype)
        numbers = [*batch.own, *(i for some in batch.sent for i in some)]
        rows = read([self._matrices[i].pieces[shard] for i in numbers]) if numbers else []
        if batch.own:
            torch._foreach_copy_([self._rows_of(whole, i, shard) for i in batch.own], rows[: len(batch.own)])
        if not batch.exchanged:
            return batch, stack, _nothing
        to = [(t, i) for t, some in enumerate(batch.asked) for i in some]
        sizes = [[math.prod(self._matrices[i].pieces[t].shape()) for i in some] for t, some in enumerate(batch.asked)]
        shapes = [self._matrices[i].pieces[t].shape() for t, i in to]
        arrived, work = self._exchange(rows[len(batch.own) :], batch.sent, shapes, sizes, dtype)

        def finish() -> None:
            work.wait()  # of the device's stream, not of the host
            if to:
                torch._foreach_copy_([self._rows_of(whole, i, t) for t, i in to], arrived)

        return batch, stack, finish

    def _compute_and_scatter(
        self,
        batch: _Batch,
        stack: Tensor,
        finish: Callable[[], None],
        compute: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
    ) -> tuple[_Batch, dict[int, Tensor], Callable[[], None]]:
        """This rank's rows of the results of a replica, and a function that waits until all of them are there."""
        finish()
        shard = self._place[1]
        results = compute(stack) if batch.mine else stack
        whole = dict(zip(batch.mine, results.split([self._matrices[i].shape()[0] for i in batch.mine]), strict=True))
        found = {i: self._rows_of(whole, i, shard) for i in batch.own}
        if not batch.exchanged:
            return batch, found, _nothing
        rows = [self._rows_of(whole, i, t) for t, some in enumerate(batch.asked) for i in some]
        numbers = [i for some in batch.sent for i in some]
        sizes = [[math.prod(self._matrices[i].pieces[shard].shape()) for i in some] for some in batch.sent]
        shapes = [self._matrices[i].pieces[shard].shape() for i in numbers]
        arrived, work = self._exchange(rows, batch.asked, shapes, sizes, dtype)
        return batch, found | dict(zip(numbers, arrived, strict=True)), work.wait

    def _to_replicas(
        self, batch: _Batch, found: dict[int, Tensor], finish: Callable[[], None], dtype: torch.dtype
    ) -> tuple[dict[int, Tensor], Callable[[], None]]:
        """The results for this shard from all replicas, and a function that waits for them."""
        if self._sizes[0] == 1:
            return found, finish
        finish()
        shard = self._place[1]
        numbers: list[list[int]] = [[] for _ in range(self._sizes[0])]
        for i in batch.numbers:
            if shard in self._matrices[i].pieces:
                numbers[self._matrices[i].owner[0]].append(i)
        shapes = [[self._matrices[i].pieces[shard].shape() for i in some] for some in numbers]
        size = max(sum(math.prod(shape) for shape in some) for some in shapes)  # of one length everywhere
        if size == 0:  # other shards have the rows of these small matrices
            return {}, _nothing
        ours = torch.zeros(size, dtype=dtype, device=self._device)
        if found:
            places = _views(ours, [found[i].shape for i in numbers[self._place[0]]])
            torch._foreach_copy_(places, [found[i] for i in numbers[self._place[0]]])
        theirs = self._empty(size * self._sizes[0], dtype)
        # Newer versions of PyTorch call it all_gather_single and deprecate the old name.
        gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
        work = gather(theirs, ours, group=self._groups[0], async_op=True)
        spread = {
            i: rows
            for c, some in enumerate(numbers)
            for i, rows in zip(some, _views(theirs[c * size :], shapes[c]), strict=True)
        }
        return spread, work.wait

    def _stack(
        self, shape: tuple[int, int], numbers: list[int], dtype: torch.dtype
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """An empty stack `[n, R, C]` for matrices of one shape, and the view for each of `numbers`."""
        counts = [self._matrices[i].shape()[0] for i in numbers]
        stack = torch.empty(sum(counts), *shape, dtype=dtype, device=self._device)
        return stack, dict(zip(numbers, stack.split(counts), strict=True))

    def _rows_of(self, whole: dict[int, Tensor], i: int, shard: int) -> Tensor:
        """A view of the rows of matrix i that a rank holds."""
        piece = self._matrices[i].pieces[shard]
        return whole[i][:, piece.offset : piece.offset + piece.last - piece.first]

    def _exchange(
        self,
        rows: Sequence[Tensor],
        receivers: list[list[int]],
        shapes: list[tuple[int, ...]],
        sizes: list[list[int]],
        dtype: torch.dtype,
    ) -> tuple[list[Tensor], dist.Work]:
        """Begins to send rows to the shards of this replica, and to receive those of `shapes`.

        Args:
            rows: one for each matrix in `receivers`, which are by shard.
            shapes, sizes: of what is received; the numbers of elements are by sender.
        """
        numel = iter([x.numel() for x in rows])
        counts = [sum(next(numel) for _ in some) for some in receivers]
        sent = self._empty(sum(counts), dtype)
        if rows:
            torch._foreach_copy_(_views(sent, [x.shape for x in rows]), list(rows))
        received = self._empty(sum(map(sum, sizes)), dtype)
        work = dist.all_to_all_single(
            received, sent, [sum(some) for some in sizes], counts, group=self._groups[1], async_op=True
        )
        return _views(received, shapes), work

    def _empty(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=self._device)

    def _share(self, parameters: dict[int, Tensor], fused: dict[int, tuple[int, ...]]) -> list[_Matrices]:
        """Assigns every matrix, the largest first, to the rank that has the least to compute so far."""
        replicas, shards = self._sizes
        load = {(c, s): 0 for c in range(replicas) for s in range(shards)}
        shared = []
        stacks = [number for number, parameter in parameters.items() if parameter.ndim == 3]
        for number in stacks:
            columns, start = parameters[number].shape[-1], 0
            for rows in fused[number]:
                for s in range(shards):
                    first, last = _range_of(s, shards, len(parameters[number]))
                    for c in range(replicas):
                        a, b = _range_of(c, replicas, last - first)
                        if a < b:
                            piece = MatrixShard(number, (a, b), start, start + rows, rows, columns, 0)
                            shared.append(_Matrices((c, s), {s: piece}))
                            load[c, s] += (b - a) * _cost(rows, columns)
                start += rows
        whole = []
        for number in parameters.keys() - set(stacks):
            (total, columns), start = parameters[number].shape, 0
            for rows in fused[number]:
                whole.append((_cost(rows, columns), -number, start, rows, columns, total))
                start += rows
        for cost, negative, start, rows, columns, total in sorted(whole, reverse=True):
            owner = min(load, key=lambda rank: (load[rank], rank))
            load[owner] += cost
            pieces = {}
            for s in range(shards):
                first, last = _range_of(s, shards, total)
                a, b = max(first, start), min(last, start + rows)
                if a < b:
                    pieces[s] = MatrixShard(-negative, None, a - first, b - first, rows, columns, a - start)
            shared.append(_Matrices(owner, pieces))
        return shared


def _views(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Views of these shapes, one after another from the beginning of a flat tensor."""
    sizes = [math.prod(shape) for shape in shapes]
    return [part.view(shape) for part, shape in zip(flat[: sum(sizes)].split(sizes), shapes, strict=True)]


def _nothing() -> None:
    """There is nothing to wait for."""


def _range_of(rank: int, ranks: int, total: int) -> tuple[int, int]:
    """(First, end) of a rank's part of `total` rows, as DTensor and `torch.chunk` split them."""
    size = -(-total // ranks)
    return min(rank * size, total), min((rank + 1) * size, total)


def _cost(rows: int, columns: int) -> int:
    """Multiplications of a Newton-Schulz step."""
    small, large = sorted((rows, columns))
    return small * small * (2 * large + small)
