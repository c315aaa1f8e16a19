"""Gathers sharded matrices for a computation on whole matrices, and scatters the results.

`fully_shard` gives every rank some rows of a matrix. Each matrix is owned by one rank, which gathers its rows from the
others, computes, and scatters the rows of the result, all matrices in one exchange. Where ranks hold replicas (`ddp`,
`hsdp`), one of them computes and sends the result to the others. A stack of experts is sharded between experts: the
rank that holds an expert computes for it, and nothing is sent.
"""

import math
from collections.abc import Callable, Iterator
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
        self, read: Callable[[MatrixShard], Tensor], compute: Callable[[Tensor], Tensor], dtype: torch.dtype
    ) -> Iterator[tuple[MatrixShard, Tensor]]:
        """Applies `compute` to every matrix. A collective: all ranks call it.

        Args:
            read: returns this rank's rows of a matrix, `[n, r, C]`; called once for each.
            compute: `[n, R, C]` -> the same shape, for n matrices at once.
            dtype: of the matrices that are sent and computed.

        Yields:
            Every shard that this rank holds, and its rows of the result, `[n, r, C]` in `dtype`.
        """
        if self._sizes == (1, 1):
            yield from self._map_alone(read, compute, dtype)
            return
        replica, shard = self._place
        shards = range(self._sizes[1])
        mine = [i for i, one in enumerate(self._matrices) if one.owner == self._place]
        held = [[i for i in self._of_replica(replica) if self._matrices[i].owner[1] == t] for t in shards]
        held = [[i for i in some if shard in self._matrices[i].pieces] for some in held]  # by owner
        asked = [[i for i in mine if t in self._matrices[i].pieces] for t in shards]  # by holder

        stacks, whole = self._stacks(mine, dtype)
        for i in held[shard]:
            self._rows_of(whole, i, shard).copy_(read(self._matrices[i].pieces[shard]))
        if self._exchanged:
            sent = [[read(self._matrices[i].pieces[shard]) for i in held[t]] if t != shard else [] for t in shards]
            shapes = [[self._matrices[i].pieces[t].shape() for i in asked[t]] if t != shard else [] for t in shards]
            for t, got in enumerate(self._exchange(sent, shapes, dtype)):
                for i, rows in zip(asked[t] if t != shard else [], got, strict=True):
                    self._rows_of(whole, i, t).copy_(rows)
            del sent

        whole = {}
        while stacks:
            numbers, stack = stacks.pop()
            counts = [self._matrices[i].shape()[0] for i in numbers]
            whole |= dict(zip(numbers, compute(stack).split(counts), strict=True))
            del stack
        found = {i: self._rows_of(whole, i, shard) for i in held[shard]}
        if self._exchanged:
            sent = [[self._rows_of(whole, i, t) for i in asked[t]] if t != shard else [] for t in shards]
            shapes = [[self._matrices[i].pieces[shard].shape() for i in held[t]] if t != shard else [] for t in shards]
            for t, got in enumerate(self._exchange(sent, shapes, dtype)):
                found |= dict(zip(held[t] if t != shard else [], got, strict=True))
            del sent
        del whole
        if self._sizes[0] > 1:
            found = self._gather_replicas(found, dtype)
        for i, result in found.items():
            yield self._matrices[i].pieces[shard], result

    def _map_alone(
        self, read: Callable[[MatrixShard], Tensor], compute: Callable[[Tensor], Tensor], dtype: torch.dtype
    ) -> Iterator[tuple[MatrixShard, Tensor]]:
        """`map` for one rank: a few matrices at a time, in little memory that is reused."""
        alike: dict[tuple[int, int], list[int]] = {}
        for i, one in enumerate(self._matrices):
            alike.setdefault(one.shape()[1:], []).append(i)
        for numbers in alike.values():
            largest = max(math.prod(self._matrices[i].shape()) for i in numbers)
            count = max(1, at_once(self._device) // max(1, largest))
            for start in range(0, len(numbers), count):
                some = numbers[start : start + count]
                ((_, stack),), places = self._stacks(some, dtype)
                for i in some:
                    places[i].copy_(read(self._matrices[i].pieces[0]))
                found = compute(stack).split([self._matrices[i].shape()[0] for i in some])
                for i, result in zip(some, found, strict=True):
                    yield self._matrices[i].pieces[0], result

    def _of_replica(self, replica: int) -> list[int]:
        return [i for i, one in enumerate(self._matrices) if one.owner[0] == replica]

    def _stacks(self, mine: list[int], dtype: torch.dtype) -> tuple[list[tuple[list[int], Tensor]], dict[int, Tensor]]:
        """Empty stacks for owned matrices, by shape: (their numbers, `[n, R, C]`); and the view for each matrix."""
        alike: dict[tuple[int, int], list[int]] = {}
        for i in mine:
            alike.setdefault(self._matrices[i].shape()[1:], []).append(i)
        stacks, whole = [], {}
        for shape, numbers in alike.items():
            counts = [self._matrices[i].shape()[0] for i in numbers]
            stack = torch.empty(sum(counts), *shape, dtype=dtype, device=self._device)
            stacks.append((numbers, stack))
            whole |= dict(zip(numbers, stack.split(counts), strict=True))
        return stacks, whole

    def _rows_of(self, whole: dict[int, Tensor], i: int, shard: int) -> Tensor:
        """A view of the rows of matrix i that a rank holds."""
        piece = self._matrices[i].pieces[shard]
        return whole[i][:, piece.offset : piece.offset + piece.last - piece.first]

    def _exchange(
        self, sent: list[list[Tensor]], shapes: list[list[tuple[int, ...]]], dtype: torch.dtype
    ) -> list[list[Tensor]]:
        """Sends tensors to each shard of this replica, and receives those of `shapes` from each."""
        flat = [torch.cat([x.to(dtype).flatten() for x in some]) if some else self._empty(0, dtype) for some in sent]
        sizes = [sum(math.prod(shape) for shape in some) for some in shapes]
        received = self._empty(sum(sizes), dtype)
        dist.all_to_all_single(received, torch.cat(flat), sizes, [len(x) for x in flat], group=self._groups[1])
        return [_unflatten(x, some) for x, some in zip(received.split(sizes), shapes, strict=True)]

    def _gather_replicas(self, found: dict[int, Tensor], dtype: torch.dtype) -> dict[int, Tensor]:
        """The results for this shard from all replicas."""
        replicas, shard = range(self._sizes[0]), self._place[1]
        numbers = [[i for i in self._of_replica(c) if shard in self._matrices[i].pieces] for c in replicas]
        shapes = [[self._matrices[i].pieces[shard].shape() for i in some] for some in numbers]
        sizes = [sum(math.prod(shape) for shape in some) for some in shapes]
        ours = self._empty(max(sizes), dtype)  # of one length everywhere
        start = 0
        for i in numbers[self._place[0]]:
            ours[start : start + found[i].numel()] = found[i].flatten()
            start += found[i].numel()
        theirs = self._empty(max(sizes) * len(replicas), dtype)
        # Newer versions of PyTorch call it all_gather_single and deprecate the old name.
        gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
        gather(theirs, ours, group=self._groups[0])
        return {
            i: rows
            for c, part in enumerate(theirs.split(max(1, max(sizes))))
            for i, rows in zip(numbers[c], _unflatten(part[: sizes[c]], shapes[c]), strict=True)
        }

    def _empty(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=self._device)

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
        self._exchanged = shards > 1 and bool(whole)
        return shared


def _unflatten(flat: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    parts = flat.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _range_of(rank: int, ranks: int, total: int) -> tuple[int, int]:
    """(First, end) of a rank's part of `total` rows, as DTensor and `torch.chunk` split them."""
    size = -(-total // ranks)
    return min(rank * size, total), min((rank + 1) * size, total)


def _cost(rows: int, columns: int) -> int:
    """Multiplications of a Newton-Schulz step."""
    small, large = sorted((rows, columns))
    return small * small * (2 * large + small)
