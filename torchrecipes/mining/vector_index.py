"""Finds the vectors with the highest dot products: exactly, or with an index of faiss or usearch.

Vectors are read from a memory map, a chunk at a time. An index finds candidates; their scores always are exact.
"""

import importlib
import math
from collections.abc import Callable
from typing import Any, Literal, Protocol

import numpy as np
import torch

from torchrecipes.devices import choose_device
from torchrecipes.errors import UserError
from torchrecipes.evaluation.top_k import TopK, add_dot_products, blocks

IndexKind = Literal["auto", "exact", "faiss", "usearch"]

EXACT_BELOW = 1_000_000  # vectors: with fewer, an index takes longer to build than it saves
CHUNK = 1 << 16  # vectors that are in memory at a time
RECALL, RECALL_QUERIES = 0.95, 256  # what an index must find of the exact result, measured with so many queries
SPARE = 2  # an index is asked for so many times more than is wanted; exact scores choose among them


class VectorIndex(Protocol):
    """Finds vectors by their dot product with queries."""

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return `[q, k]` float32 scores, falling, and `[q, k]` int64 numbers of vectors; -inf and -1: none."""
        ...


class ExactIndex:
    """Compares queries with all vectors.

    Args:
        vectors: `[n, D]` float32, an array or a memory map.
        device: where products are computed; None: a GPU if there is one.
    """

    def __init__(self, vectors: np.ndarray, device: str | torch.device | None = None):
        self.vectors = vectors
        self.device = torch.device(device) if device else choose_device()

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return `[q, k]` float32 scores, falling, and `[q, k]` int64 numbers; of equal scores the lower number first.

        Args:
            queries: `[q, D]` float32.
            k: vectors per query; where there are fewer, scores are -inf and numbers -1.
        """
        top = TopK(len(queries), k, self.device)
        mine = torch.from_numpy(np.ascontiguousarray(queries)).to(self.device)
        for part in blocks(len(self.vectors), CHUNK):
            chunk = torch.from_numpy(np.array(self.vectors[part])).to(self.device)
            add_dot_products(top, mine, chunk, part.start)
        return top.scores.cpu().numpy(), top.numbers.cpu().numpy()


class ApproximateIndex:
    """An index that finds most of the best vectors, in a fraction of the time; scores are exact.

    Its effort is doubled until it finds `RECALL` of what an exact search does, for a sample of queries.

    Args:
        vectors: `[n, D]` float32, an array or a memory map.
        find: `(queries, k, effort)` gives `[q, k]` int64 numbers of vectors, -1 where there are fewer.
        effort: at first.
        highest: effort at most.
        report: takes a line about the recall.
    """

    def __init__(
        self,
        vectors: np.ndarray,
        find: Callable[[np.ndarray, int, int], np.ndarray],
        effort: int,
        highest: int,
        report: Callable[[str], object] = print,
    ):
        self.vectors, self.find, self.effort, self.highest, self.report = vectors, find, effort, highest, report
        self.recall = math.nan

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return `[q, k]` float32 exact scores, falling, and `[q, k]` int64 numbers; -inf and -1: none.

        Args:
            queries: `[q, D]` float32.
            k: vectors per query.
        """
        if math.isnan(self.recall):
            self._tune(queries, k)
        return self._search(queries, k)

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        found = self.find(queries, min(SPARE * k, len(self.vectors)), self.effort)
        scores = np.full(found.shape, -np.inf, np.float32)
        for row, (query, numbers) in enumerate(zip(queries, found, strict=True)):
            known = numbers >= 0
            scores[row, known] = self.vectors[numbers[known]] @ query
        order = np.lexsort((found, -scores), axis=1)[:, :k]
        short = k - order.shape[1]
        scores, found = np.take_along_axis(scores, order, 1), np.take_along_axis(found, order, 1)
        return np.pad(scores, ((0, 0), (0, short)), constant_values=-np.inf), np.pad(
            found, ((0, 0), (0, short)), constant_values=-1
        )

    def _tune(self, queries: np.ndarray, k: int) -> None:
        sample = queries[:: max(1, len(queries) // RECALL_QUERIES)][:RECALL_QUERIES]
        exact = ExactIndex(self.vectors).search(sample, k)[1]
        while True:
            found = self._search(sample, k)[1]
            both = sum(len(np.intersect1d(a[a >= 0], b)) for a, b in zip(exact, found, strict=True))
            self.recall = both / max(1, int((exact >= 0).sum()))
            if self.recall >= RECALL or self.effort >= self.highest:
                break
            self.effort = min(2 * self.effort, self.highest)
        self.report(
            f"the index finds {self.recall:.1%} of the {k} best of {len(self.vectors):,} vectors "
            f"(effort {self.effort}, {len(sample)} queries)"
        )


def build_index(
    vectors: np.ndarray, kind: IndexKind = "auto", *, seed: int = 0, report: Callable[[str], object] = print
) -> ExactIndex | ApproximateIndex:
    """Return an index over vectors.

    Args:
        vectors: `[n, D]` float32, an array or a memory map.
        kind: `exact`; `faiss`: inverted lists (IVF) of vectors in 8 bits; `usearch`: a graph (HNSW) of vectors in
            bfloat16; `auto`: exact below a million vectors, else the first of faiss and usearch that is installed.
        seed: of the sample that the lists are learned from.
        report: takes lines about what is built.

    Raises:
        UserError: its package is not installed (code `missing_package`).
    """
    if kind == "auto":
        kind = "exact" if len(vectors) < EXACT_BELOW else _installed()
        if kind == "exact" and len(vectors) >= EXACT_BELOW:
            report("searching exactly; an index is faster: pip install 'torchrecipes[index]'")
    if kind == "exact":
        return ExactIndex(vectors)
    report(f"building an index of {len(vectors):,} vectors with {kind}")
    return (_faiss if kind == "faiss" else _usearch)(vectors, seed, report)


def _faiss(vectors: np.ndarray, seed: int, report: Callable[[str], object]) -> ApproximateIndex:
    faiss = _import("faiss")
    count, width = vectors.shape
    lists = int(min(4 * math.sqrt(count), max(1, count // 39)))  # faiss asks for 39 to 256 vectors per list to learn
    index = faiss.index_factory(width, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    sample = np.random.default_rng(seed).choice(count, min(count, 128 * lists), replace=False)
    index.train(np.ascontiguousarray(vectors[np.sort(sample)]))
    for part in blocks(count, CHUNK):
        index.add(np.ascontiguousarray(vectors[part]))

    def find(queries: np.ndarray, k: int, effort: int) -> np.ndarray:
        index.nprobe = effort
        return index.search(np.ascontiguousarray(queries), k)[1]

    return ApproximateIndex(vectors, find, min(16, lists), lists, report)


def _usearch(vectors: np.ndarray, seed: int, report: Callable[[str], object]) -> ApproximateIndex:  # noqa: ARG001
    usearch = _import("usearch.index")
    index = usearch.Index(ndim=vectors.shape[1], metric="ip", dtype="bf16", connectivity=32, expansion_add=128)
    for part in blocks(len(vectors), CHUNK):
        index.add(np.arange(part.start, part.stop), np.ascontiguousarray(vectors[part]))

    def find(queries: np.ndarray, k: int, effort: int) -> np.ndarray:
        index.expansion_search = max(effort, k)
        matches = index.search(np.ascontiguousarray(queries), k)
        numbers = np.full((len(queries), k), -1)
        keys, counts = np.atleast_2d(matches.keys), np.atleast_1d(getattr(matches, "counts", len(matches.keys)))
        for row, count in enumerate(counts):
            numbers[row, :count] = keys[row, :count]
        return numbers

    return ApproximateIndex(vectors, find, 128, 4096, report)


def _installed() -> IndexKind:
    for name in ("faiss", "usearch"):
        try:
            _import("usearch.index" if name == "usearch" else name)
            return name
        except UserError:
            continue
    return "exact"


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        name = module.partition(".")[0]
        raise UserError(
            f"--index {name} needs a package that is not installed",
            key="index",
            hint="Install it: pip install 'torchrecipes[index]'. Or search exactly: exact.",
            code="missing_package",
        ) from None
