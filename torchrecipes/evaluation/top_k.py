"""The best passages of every query, exactly, over a corpus that comes in chunks."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

SCORES_AT_ONCE = 1 << 24  # of a block of queries with a chunk of passages: 64 MiB


class TopK:
    """Keeps the `k` highest scores of every query. Of equal scores, the passage with the lower number comes first.

    Args:
        num_queries: `Q`.
        k: scores to keep per query.
        device: where the scores are.

    Attributes:
        scores: `[Q, k]` float32, falling; -inf where there were fewer passages.
        numbers: `[Q, k]` int64 of the passages; -1 where there were fewer.
    """

    def __init__(self, num_queries: int, k: int, device: torch.device | str = "cpu"):
        self.k = k
        self.scores = torch.full((num_queries, k), -torch.inf, device=device)
        self.numbers = torch.full((num_queries, k), -1, device=device)

    def add(self, scores: Tensor, first: int, queries: slice = slice(None)) -> None:
        """Adds the scores of consecutive passages, whose numbers are higher than those of all before.

        Args:
            scores: `[q, m]` float32.
            first: the number of the first passage.
            queries: which `q` of the `Q`.
        """
        values, columns = best_columns(scores, self.k)
        # Earlier passages stand first and the sort is stable: of equal scores the lower number stays first.
        values = torch.cat([self.scores[queries], values], 1)
        numbers = torch.cat([self.numbers[queries], columns + first], 1)
        values, order = values.sort(dim=1, descending=True, stable=True)
        self.scores[queries], self.numbers[queries] = values[:, : self.k], numbers.gather(1, order)[:, : self.k]


def best_columns(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` highest values of every row, falling, and their columns; of equal values the first columns.

    `torch.topk` alone takes any of equal values, so that results would depend on the size of chunks.

    Args:
        scores: `[q, m]`.
        k: values per row; with fewer columns there are `m`.

    Returns:
        `[q, min(k, m)]` values, and their columns (int64).
    """
    if k >= scores.shape[1]:
        return scores.sort(dim=1, descending=True, stable=True)
    values, columns = scores.topk(k + 1, dim=1)
    tied = values[:, k] == values[:, k - 1]
    columns = columns[:, :k].sort(dim=1).values
    values, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    if tied.any():
        tied_values, tied_columns = scores[tied].sort(dim=1, descending=True, stable=True)
        values[tied], columns[tied] = tied_values[:, :k], tied_columns[:, :k]
    return values, columns


def add_dot_products(top: TopK, queries: Tensor, passages: Tensor, first: int) -> None:
    """Adds the dot products of all queries with a chunk of passages, a block of queries at a time.

    Args:
        top: of these queries.
        queries: `[Q, D]` float32.
        passages: `[m, D]` float32.
        first: the number of the first passage.
    """
    with full_precision():
        for block in blocks(len(queries), max(1, SCORES_AT_ONCE // max(1, len(passages)))):
            top.add(queries[block] @ passages.T, first, block)


def blocks(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of `size` that cover `count` items; the last may be shorter."""
    for begin in range(0, count, size):
        yield slice(begin, min(begin + size, count))


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiplies float32 matrices in float32, also where training has allowed TF32 or bfloat16 for them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
