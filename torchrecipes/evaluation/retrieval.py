"""`Retrieval`: finds the relevant passages of a corpus for every query, exactly."""

import heapq
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
import torch
import xxhash

from torchrecipes.data.examples import ExampleSource
from torchrecipes.data.progress import Progress
from torchrecipes.devices import choose_device
from torchrecipes.distributed.collectives import all_gather_object, rank, world_size
from torchrecipes.errors import UserError
from torchrecipes.evaluation.beir import read_beir_texts, read_qrels
from torchrecipes.evaluation.embeddings import Encoder, Similarity, check_dims, unit_rows
from torchrecipes.evaluation.ranking import DEEPEST, ranking_metrics
from torchrecipes.evaluation.text_vectors import TextVectors, max_sim_scores
from torchrecipes.evaluation.top_k import TopK, add_dot_products

CHUNK = 16_384  # passages that are encoded, searched and forgotten at a time
LATE_CHUNK = 1024  # the same with a vector for every token


@dataclass
class RetrievalSet:
    """Queries, what is relevant to them, and the corpus.

    Attributes:
        queries: `Q` texts.
        relevant: for every query the grades of its relevant passages by their number in the corpus.
        itself: for every query the number of the passage that must not be found, as it is the query itself; -1: none.
        passages: gives the corpus' texts in the order of their numbers, every time that it is iterated over.
    """

    queries: list[str]
    relevant: list[dict[int, float]]
    itself: list[int]
    passages: Iterable[str]


class Retrieval:
    """MRR@10, nDCG@10 and recall@1, @10 and @100 of an exact search by cosine, or by MaxSim with late interaction.

    Give either `path` or `data`. The corpus is encoded a chunk at a time, so memory does not grow with it.

    Args:
        path: a folder in BEIR's layout: `corpus.jsonl`, `queries.jsonl`, `qrels/<split>.tsv`.
        data: examples of a query and a relevant passage, as `torchrecipes.data.examples.pairs` reads them. All passages
            are the corpus, negative ones too. Equal texts are one: a query may have several passages, and a passage
            several queries.
        split: of `qrels/`.
        max_queries: evaluate this many queries, chosen by a hash of their identity; None: all with a relevant passage.
        max_passages: search only this many passages: the relevant ones, and others chosen by a hash. The fewer, the
            easier the task. None: all.
        ignore_identical_ids: leave out the passage with the identity of the query, as BEIR does (with `data`: the equal
            text). Needed where queries are passages of the corpus (ArguAna, Quora); wrong where both merely have the
            same numbers.
        labels_are_ids: the label of an example is the identity of its passage's document (`label: passage_id` of
            `pairs`): all passages of that identity are relevant to its query.
        similarity: `cosine`, or `dot` for a model that was trained on dot products without normalization.

    Raises:
        UserError: both or none of `path` and `data` are given, or a number is out of range.
    """

    def __init__(
        self,
        path: str | None = None,
        data: ExampleSource | None = None,
        *,
        split: str = "test",
        max_queries: int | None = None,
        max_passages: int | None = None,
        ignore_identical_ids: bool = False,
        labels_are_ids: bool = False,
        similarity: Similarity = "cosine",
    ):
        if (path is None) == (data is None):
            hint = "path is a folder in BEIR's layout, data pairs of a query and a passage."
            raise UserError("give one of path and data", key="path", hint=hint, code="path_or_data")
        for key, value in (("max_queries", max_queries), ("max_passages", max_passages)):
            if value is not None and value < 1:
                raise UserError(f"{value} is not 1 or more", key=key, hint="null takes all.", code="out_of_range")
        self.path, self.data, self.split = path, data, split
        self.max_queries, self.max_passages = max_queries, max_passages
        self.ignore_identical_ids, self.labels_are_ids = ignore_identical_ids, labels_are_ids
        self.similarity = similarity

    def __call__(self, encoder: Encoder, dims: Sequence[int] = ()) -> dict[str, float]:
        """Evaluates an encoder.

        Args:
            encoder: has a method `encode`, as `TextEncoder`; prompts are `query` and `passage`.
            dims: Matryoshka dimensions to evaluate beside the full one.

        Returns:
            `mrr@10`, `ndcg@10`, `recall@1`, `recall@10`, `recall@100`, the same on all ranks; with `_dim<d>` after the
            name for every Matryoshka dimension.

        Raises:
            UserError: the data cannot be read or holds nothing to evaluate; a dimension is out of range.
        """
        task = self.task
        queries = encoder.encode(task.queries, prompt="query")
        if isinstance(queries, TextVectors):
            return self._by_max_sim(encoder, queries, dims)
        check_dims(dims, queries.shape[1])
        mine = _share(len(task.queries))
        widths = (None, *dims)
        device = choose_device()
        sides = [torch.from_numpy(self._rows(queries[mine], dim)).to(device) for dim in widths]
        tops = [TopK(len(side), DEEPEST + self.ignore_identical_ids, device) for side in sides]
        is_finite, first = bool(np.isfinite(queries).all()), 0
        for chunk in _chunks(task.passages, CHUNK):
            embeddings = encoder.encode(chunk, prompt="passage")
            is_finite = is_finite and bool(np.isfinite(embeddings).all())
            for dim, side, top in zip(widths, sides, tops, strict=True):
                add_dot_products(top, side, torch.from_numpy(self._rows(embeddings, dim)).to(device), first)
            first += len(chunk)
        results = {}
        for dim, top in zip(widths, tops, strict=True):
            suffix = "" if dim is None else f"_dim{dim}"
            results |= {f"{name}{suffix}": value for name, value in self._metrics(top).items()}
        return results if is_finite else dict.fromkeys(results, float("nan"))

    def _by_max_sim(self, encoder: Encoder, queries: TextVectors, dims: Sequence[int]) -> dict[str, float]:
        """The same by MaxSim, for late interaction."""
        if dims:
            problem = "a model with late interaction is evaluated with all of its dimensions"
            raise UserError(problem, key="dims", hint="Leave them out.", code="several_vectors")
        mine = queries[_share(len(queries))]
        device = choose_device()
        top = TopK(len(mine), DEEPEST + self.ignore_identical_ids, device)
        is_finite, first = bool(np.isfinite(queries.vectors).all()), 0
        for chunk in _chunks(self.task.passages, LATE_CHUNK):
            found = encoder.encode(chunk, prompt="passage")
            is_finite = is_finite and bool(np.isfinite(found.vectors).all())
            top.add(max_sim_scores(mine, found, device), first)
            first += len(chunk)
        results = self._metrics(top)
        return results if is_finite else dict.fromkeys(results, float("nan"))

    def _metrics(self, top: TopK) -> dict[str, float]:
        ranked = np.concatenate(all_gather_object(top.numbers.cpu().numpy()))
        if self.ignore_identical_ids:
            ranked = _without(ranked, self.task.itself)
        return ranking_metrics(ranked, self.task.relevant)

    def _rows(self, embeddings: np.ndarray, dim: int | None) -> np.ndarray:
        return unit_rows(embeddings, dim) if self.similarity == "cosine" else np.ascontiguousarray(embeddings[:, :dim])

    @cached_property
    def task(self) -> RetrievalSet:
        """The queries, the corpus and what is relevant.

        Raises:
            UserError: a file is missing or broken, a relevant passage is not in the corpus (code `unknown_passage`), or
                there is nothing to evaluate (`no_examples`).
        """
        task = self._read_beir() if self.path is not None else self._read_pairs()
        if not task.queries:
            problem = "no query has a relevant passage"
            raise UserError(problem, key="path" if self.data is None else "data", code="no_examples")
        return task

    def _read_beir(self) -> RetrievalSet:
        labels = read_qrels(self.path, self.split)
        queries = {name: text for name, text in read_beir_texts(self.path, "queries") if name in labels}
        if missing := labels.keys() - queries.keys():
            problem = f"{self.path}: {len(missing)} queries of qrels/{self.split}.tsv are not in queries.jsonl"
            raise UserError(f"{problem}, such as {min(missing)}", key="path", code="unknown_query")
        names = _fewest_hashes(list(queries), self.max_queries)
        needed = {passage for name in names for passage in labels[name]}
        sought = needed.union(names) if self.ignore_identical_ids else needed
        hashes, place = array("Q"), {}
        for name, _ in read_beir_texts(self.path, "corpus"):
            if name in sought:
                place[name] = len(hashes)
            hashes.append(_hash(name))
        if missing := needed - place.keys():
            problem = f"{self.path}: {len(missing)} relevant passages are not in corpus.jsonl"
            raise UserError(f"{problem}, such as {min(missing)}", key="path", code="unknown_passage")
        kept = _kept(hashes, [place[name] for name in needed], self.max_passages)
        number = {index: number for number, index in enumerate(kept)}
        return RetrievalSet(
            [queries[name] for name in names],
            [{number[place[passage]]: grade for passage, grade in labels[name].items()} for name in names],
            [number.get(place.get(name, -1), -1) if self.ignore_identical_ids else -1 for name in names],
            _BEIRPassages(self.path, kept),
        )

    def _read_pairs(self) -> RetrievalSet:
        relevant: dict[str, set[int]] = {}
        number: dict[str, int] = {}
        of_document: dict[str, set[int]] = {}
        documents: dict[str, set[str]] = {}  # of every query
        for example in self.data:
            is_scored = getattr(self.data, "kind", None) == "scored_pairs"
            if len(example.texts) < 2 or is_scored:
                hint = "Read it with torchrecipes.data.examples.pairs."
                found = "a scored pair" if is_scored else "one text"
                problem = f"{example.source}: {found}, not a query and a passage that is relevant to it"
                raise UserError(problem, key="data", hint=hint, code="not_pairs")
            query, *passages = example.texts
            for passage in passages:
                number.setdefault(passage, len(number))
            relevant.setdefault(query, set()).add(number[passages[0]])
            if self.labels_are_ids:
                of_document.setdefault(str(example.label), set()).add(number[passages[0]])
                documents.setdefault(query, set()).add(str(example.label))
        for query, names in documents.items():
            relevant[query].update(*(of_document[name] for name in names))
        names = _fewest_hashes(list(relevant), self.max_queries)
        needed = {index for name in names for index in relevant[name]}
        hashes = array("Q", map(_hash, number))
        kept = _kept(hashes, needed, self.max_passages)
        renumbered, texts = {index: number for number, index in enumerate(kept)}, list(number)
        return RetrievalSet(
            names,
            [dict.fromkeys((renumbered[index] for index in relevant[name]), 1.0) for name in names],
            [renumbered.get(number.get(name, -1), -1) for name in names],
            [texts[index] for index in kept],
        )


@dataclass
class _BEIRPassages:
    """The passages of a corpus at some places in it, in their order, read from disk every time."""

    path: str
    kept: Sequence[int]

    def __iter__(self) -> Iterator[str]:
        wanted = iter(self.kept)
        index = next(wanted, None)
        for place, (_, text) in enumerate(read_beir_texts(self.path, "corpus")):
            if place == index:
                yield text
                index = next(wanted, None)


def _chunks(passages: Iterable[str], size: int) -> Iterator[list[str]]:
    """Consecutive passages; rank 0 shows the progress where there are several chunks."""
    passages, progress = iter(passages), None
    try:
        while chunk := list(islice(passages, size)):
            yield chunk
            if progress is None and len(chunk) == size and rank() == 0:
                progress = Progress("searching")
            if progress is not None:
                progress.add(len(chunk), sum(map(len, chunk)))
    finally:
        if progress is not None:
            progress.close()


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())


def _fewest_hashes(names: list[str], count: int | None) -> list[str]:
    """`count` of the names, in their order: those whose hashes are lowest, so that the choice is fair and fixed."""
    if count is None or count >= len(names):
        return names
    chosen = set(heapq.nsmallest(count, names, key=lambda name: (_hash(name), name)))
    return [name for name in names if name in chosen]


def _kept(hashes: Sequence[int], needed: Iterable[int], count: int | None) -> Sequence[int]:
    """The places of `count` passages, rising: those needed, then those whose hashes are lowest."""
    if count is None or count >= len(hashes):
        return range(len(hashes))
    needed = set(needed)
    others = (index for index in range(len(hashes)) if index not in needed)
    fill = heapq.nsmallest(max(0, count - len(needed)), others, key=lambda index: (hashes[index], index))
    return sorted(needed.union(fill))


def _share(count: int) -> slice:
    """This rank's part of `count` items."""
    return slice(count * rank() // world_size(), count * (rank() + 1) // world_size())


def _without(ranked: np.ndarray, itself: Sequence[int]) -> np.ndarray:
    """The ranked numbers without the one of each row that is the query itself."""
    keep = ranked != np.array(itself)[:, None]
    order = np.argsort(~keep, axis=1, kind="stable")  # what is kept first, in its order
    return np.take_along_axis(ranked, order, axis=1)[:, : ranked.shape[1] - 1]
