"""`mine_hard_negatives`: passages that a model takes for relevant, and that are not.

1. The texts are read once: distinct passages and queries get numbers, and texts of one document are found (text_store).
2. Both are encoded into files, a chunk at a time.
3. For a block of pairs after the other, the index finds passages, the rules choose among them, and lines are written.

An interrupted run continues: finished embeddings and lines are kept in a folder until the last line is written.
"""

import json
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from torchrecipes.atomic_write import write_atomically
from torchrecipes.data.progress import Progress
from torchrecipes.errors import UserError
from torchrecipes.evaluation.embeddings import Encoder, unit_rows
from torchrecipes.evaluation.top_k import blocks
from torchrecipes.file_lock import lock_folder
from torchrecipes.mining.selection import RULES, NegativeRules, select_negatives
from torchrecipes.mining.text_store import TextStore
from torchrecipes.mining.vector_index import IndexKind, VectorIndex, build_index

CHUNK = 16_384  # texts that are encoded at a time
ROWS, CANDIDATES = 8192, 1 << 23  # pairs, and candidates of them, that are in memory at a time


@dataclass
class MiningStats:
    """What mining has found and left out.

    Attributes:
        pairs: read.
        queries: distinct ones among them.
        passages: distinct ones, of the corpus and of the pairs.
        written: pairs with negatives, each one line.
        negatives: of all lines.
        incomplete: lines with fewer negatives than asked for.
        without: pairs that were left out, with too few negatives.
        removed: candidates by the rule that removed them first: `positive` (one of the query, or of the same document),
            `query` (the query itself), `rank`, and the margins and limits.
        positive_score: mean over the lines.
        negative_score: mean over the negatives.
        above_positive: negatives that score higher than the positive of their line.
    """

    pairs: int = 0
    queries: int = 0
    passages: int = 0
    written: int = 0
    negatives: int = 0
    incomplete: int = 0
    without: int = 0
    removed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(RULES, 0))
    positive_score: float = 0.0
    negative_score: float = 0.0
    above_positive: int = 0

    def add(self, positive_score: float, negative_scores: list[float], is_incomplete: bool) -> None:
        """Count a line."""
        count = len(negative_scores)
        self.above_positive += sum(score > positive_score for score in negative_scores)
        self.positive_score += (positive_score - self.positive_score) / (self.written + 1)
        self.negative_score += (sum(negative_scores) - count * self.negative_score) / (self.negatives + count)
        self.written += 1
        self.negatives += count
        self.incomplete += is_incomplete

    def lines(self) -> list[str]:
        """Return what to print, line by line."""
        lines = [
            f"{self.pairs:,} pairs of {self.queries:,} queries; {self.passages:,} passages",
            f"{self.written:,} lines with {self.negatives:,} negatives; {self.incomplete:,} lines have fewer than "
            f"asked for; {self.without:,} pairs left out with too few",
        ]
        names = {"positive": "positives of the query", "query": "the query itself", "rank": "rank before the range"}
        lines += [f"removed {count:,}: {names.get(rule, rule)}" for rule, count in self.removed.items() if count]
        lines.append(
            f"mean score: positives {self.positive_score:.4f}, negatives {self.negative_score:.4f}; "
            f"{self.above_positive:,} negatives score higher than their positive"
        )
        return lines


def mine_hard_negatives(
    encoder: Encoder,
    pairs: Iterable[Any],
    output: str | Path,
    *,
    corpus: Iterable[tuple[str | None, str]] = (),
    rules: NegativeRules | None = None,
    labels_are_ids: bool = False,
    min_negatives: int = 1,
    similarity: Literal["cosine", "dot"] = "cosine",
    index: IndexKind = "auto",
    rescore: Callable[[list[tuple[str, str]]], np.ndarray] | None = None,
    work_folder: str | Path | None = None,
    identity: str | None = None,
    report: Callable[[str], object] = print,
) -> MiningStats:
    """Finds hard negatives for pairs of a query and a passage, and writes JSON lines that `pairs` reads.

    Every line has `query`, `positive`, `negatives` (a list) and `scores`: of the positive, then of the negatives.

    A candidate is never one of these: a positive of the same query, in any pair; a text of the same document, by its
    identity or by its words; the query itself. What the other rules are, `NegativeRules` says.

    Memory holds hashes, the index where it is not exact, and blocks of fixed size; texts and embeddings are on disk.

    Args:
        encoder: has a method `encode`, as `TextEncoder`; its prompts are `query` and `passage`.
        pairs: examples of a query, a positive and any number of negatives (`torchrecipes.data.examples.pairs`). All
            their passages are candidates.
        output: the file to write. It must not exist.
        corpus: more candidates: identity (None: none) and text; blank texts are skipped.
        rules: which candidates become negatives.
        labels_are_ids: the label of a pair is the identity of its positive.
        min_negatives: pairs with fewer negatives are left out.
        similarity: what is a score: the cosine, or the dot product of embeddings as they are.
        index: how passages are found; see `build_index`.
        rescore: a cross-encoder: scores of pairs of a query and a passage, which replace those of the embeddings in the
            rules and in the output. Ranks are those of the embeddings.
        work_folder: for embeddings and the state of the run. It is kept: a run with the same model and data uses its
            embeddings again. None: a folder beside the output, deleted at the end.
        identity: what embeddings depend on beside the texts, such as the model's checksum and the length that texts are
            cut to. Only a run with the same identity continues an interrupted one. None: every run starts anew.
        report: takes lines of text.

    Raises:
        UserError: the output exists (code `exists`), there are no pairs (`no_examples`, `not_pairs`), no pair has
            enough negatives (`no_negatives`), or embeddings are not finite (`not_finite`).
    """
    output = Path(output)
    if output.exists():
        hint = "Delete it or give another file."
        raise UserError(f"{output} exists", key="output", hint=hint, code="exists")
    folder = Path(work_folder or output.with_name(f"{output.name}.work"))
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as files:
        for file in lock_folder(folder):
            files.enter_context(file)
        if work_folder is None:
            files.callback(_remove_if_useless, folder)
        stores = [TextStore(folder / f"{name}.txt") for name in ("queries", "passages")]
        for store in stores:
            files.callback(store.close)
        texts = _Texts(*stores, pairs, corpus, labels_are_ids)
        state = _State(folder, {"identity": identity, "similarity": similarity, "texts": texts.checksum})
        embed = _Embedder(encoder, similarity, folder, state)
        embeddings = embed("query", texts.queries), embed("passage", texts.passages)
        miner = _Miner(texts, *embeddings, rules or NegativeRules(), index, min_negatives, rescore, report)
        partial = folder / "negatives.jsonl"
        stats = miner.write(partial, state)
    if not stats.written:
        counts = "\n".join(f"  {line}" for line in stats.lines()[2:-1])
        raise UserError(
            f"no pair has {min_negatives} or more negatives\n{counts}",
            key="range",
            hint="Let lower ranks in, loosen the margins, or give a larger corpus.",
            code="no_negatives",
        )
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.move(partial, temporary)  # the work folder may be on another disk
    temporary.replace(output)
    if work_folder is None:
        shutil.rmtree(folder)
    return stats


def _remove_if_useless(folder: Path) -> None:
    """Removes a work folder in which nothing is encoded yet, as after a mistake in the data."""
    if not (folder / "state.json").exists():
        shutil.rmtree(folder)


class _Texts:
    """All texts, and for every query the documents of its positives."""

    def __init__(
        self,
        queries: TextStore,
        passages: TextStore,
        pairs: Iterable[Any],
        corpus: Iterable[tuple[str | None, str]],
        labels_are_ids: bool,
    ):
        self.queries, self.passages = queries, passages
        pair_query, pair_positive = array("q"), array("q")
        progress = Progress("reading")
        try:
            for identity, text in corpus:
                if text.strip():
                    self.passages.add(text, identity)
                progress.add(1, len(text))
            for example in pairs:
                if len(example.texts) < 2:
                    problem = f"{example.source}: {len(example.texts)} text, not a query and a positive"
                    raise UserError(problem, key="data", code="not_pairs")
                query, positive, *others = example.texts
                pair_query.append(self.queries.add(query))
                pair_positive.append(self.passages.add(positive, example.label if labels_are_ids else None))
                for text in others:
                    self.passages.add(text)
                progress.add(1, sum(map(len, example.texts)))
        finally:
            progress.close()
        if not pair_query:
            raise UserError("there are no pairs", key="data", code="no_examples")
        count = len(self.passages)
        self.pair_query = np.frombuffer(pair_query, np.int64)
        self.pair_positive = np.frombuffer(pair_positive, np.int64)
        self.document = self.passages.documents()
        # Query and document of every positive as one number, rising.
        self.positives = np.unique(self.pair_query * count + self.document[self.pair_positive])
        itself = array("q")
        for part in blocks(len(self.queries), CHUNK):
            itself.extend(self.passages.find(text) for text in self.queries.read(range(part.start, part.stop)))
        self.itself = np.frombuffer(itself, np.int64)
        sizes = np.bincount(self.document, minlength=count)
        owner, document = np.divmod(self.positives, count)
        excluded = np.bincount(owner, sizes[document], len(self.queries)).astype(np.int64)
        self.excluded = excluded + np.where(self.itself >= 0, sizes[self.document[self.itself]], 0)

    @property
    def checksum(self) -> str:
        return f"{self.queries.checksum}-{self.passages.checksum}"

    @property
    def pairs_checksum(self) -> str:
        return xxhash.xxh3_128_hexdigest(b"".join((self.pair_query, self.pair_positive, self.document)))

    def blocks(self, done: int, last_rank: int) -> Iterator[slice]:
        """Slices of the pairs from `done` on, each with a limited number of candidates."""
        while done < len(self.pair_query):
            size = ROWS
            while size > 1 and size * self.depth(slice(done, done + size), last_rank) > CANDIDATES:
                size //= 2
            yield slice(done, min(done + size, len(self.pair_query)))
            done += size

    def depth(self, block: slice, last_rank: int) -> int:
        """How many passages to find for the queries of a block, so that enough are left without the excluded ones."""
        return min(len(self.passages), last_rank + int(self.excluded[self.pair_query[block]].max()))

    def exclusions(self, queries: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """1 where a passage is a document of a positive of its query, 2 where it is the query itself, else 0."""
        document = self.document[numbers]
        keys = queries[:, None] * len(self.passages) + document
        place = np.minimum(np.searchsorted(self.positives, keys), len(self.positives) - 1)
        itself = self.itself[queries][:, None]
        excluded = np.where((itself >= 0) & (document == self.document[itself]), 2, 0)
        excluded[self.positives[place] == keys] = 1
        return excluded


@dataclass
class _Miner:
    """Searches and chooses, for a block of pairs after the other."""

    texts: _Texts
    queries: np.ndarray
    passages: np.ndarray
    rules: NegativeRules
    index: IndexKind
    min_negatives: int
    rescore: Callable[[list[tuple[str, str]]], np.ndarray] | None
    report: Callable[[str], object]

    def write(self, path: Path, state: "_State") -> MiningStats:
        """Writes the lines that are not written yet."""
        texts = self.texts
        settings = {"rules": asdict(self.rules) | {"range": list(self.rules.range)}, "index": self.index}
        settings |= {"min_negatives": self.min_negatives, "rescored": self.rescore is not None}
        stats = state.begin_lines(settings | {"pairs": texts.pairs_checksum}, path)
        stats.pairs, stats.queries, stats.passages = len(texts.pair_query), len(texts.queries), len(texts.passages)
        index = build_index(self.passages, self.index, seed=self.rules.seed, report=self.report)
        progress = Progress("mining")
        progress.add(state.pairs_done, 0)
        try:
            with path.open("ab") as file:
                for block in texts.blocks(state.pairs_done, self.rules.range[1]):
                    lines = self._mine(block, index, stats)
                    data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
                    file.write(data)
                    file.flush()
                    state.save(pairs=block.stop, bytes=file.tell(), stats=asdict(stats))
                    progress.add(block.stop - block.start, len(data))
        finally:
            progress.close()
        return stats

    def _mine(self, block: slice, index: VectorIndex, stats: MiningStats) -> Iterator[dict[str, Any]]:
        """The lines of a block of pairs."""
        texts, rules = self.texts, self.rules
        asked, row_query = np.unique(texts.pair_query[block], return_inverse=True)
        positive = texts.pair_positive[block]
        scores, numbers = index.search(np.asarray(self.queries[asked]), texts.depth(block, rules.range[1]))
        excluded = texts.exclusions(asked, numbers)
        query_texts = texts.queries.read(asked.tolist())
        positive_texts = texts.passages.read(positive.tolist())
        if self.rescore is None:
            positive_scores = np.einsum("nd,nd->n", self.queries[asked][row_query], self.passages[positive])
        else:
            candidate = (numbers >= 0) & (excluded == 0)
            rank = np.cumsum(candidate, axis=1) - 1
            rows, columns = np.nonzero(candidate & (rank >= rules.range[0]) & (rank < rules.range[1]))
            found = texts.passages.read(numbers[rows, columns].tolist())
            scores[rows, columns] = self.rescore(
                [(query_texts[row], text) for row, text in zip(rows, found, strict=True)]
            )
            own = [(query_texts[row], text) for row, text in zip(row_query, positive_texts, strict=True)]
            positive_scores = np.asarray(self.rescore(own), np.float32)
        examples = np.arange(block.start, block.stop)
        places, removed = select_negatives(
            rules, numbers[row_query], scores[row_query], positive_scores, excluded[row_query], examples
        )
        for rule, count in zip(RULES, removed.tolist(), strict=True):
            stats.removed[rule] += count
        counts = (places >= 0).sum(1)
        for row, (count, query) in enumerate(zip(counts.tolist(), row_query.tolist(), strict=True)):
            if count < max(1, self.min_negatives):
                stats.without += 1
                continue
            picked = places[row, :count]
            own, *values = [float(positive_scores[row]), *scores[query, picked].tolist()]
            stats.add(own, values, count < rules.num_negatives)
            yield {
                "query": query_texts[query],
                "positive": positive_texts[row],
                "negatives": texts.passages.read(numbers[query, picked].tolist()),
                "scores": [round(value, 6) for value in (own, *values)],
            }


class _State:
    """What is done, in a file of the work folder."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.path, self.settings, self.done = folder / "state.json", settings, {}
        try:
            saved = json.loads(self.path.read_bytes())
        except (OSError, ValueError):
            return
        if saved["settings"] == settings and settings["identity"] is not None:
            self.done = saved["done"]

    def begin_lines(self, selection: dict[str, Any], path: Path) -> MiningStats:
        """Keeps the lines that are written already, if they were chosen in the same way; what they have counted."""
        if self.done.get("selection") == selection and path.exists():
            with path.open("r+b") as file:
                file.truncate(self.done["bytes"])
            return MiningStats(**self.done["stats"])
        path.write_bytes(b"")
        self.done |= {"selection": selection, "pairs": 0, "bytes": 0, "stats": asdict(MiningStats())}
        return MiningStats()

    @property
    def pairs_done(self) -> int:
        return self.done["pairs"]

    def save(self, **done: Any) -> None:
        self.done |= done
        write_atomically(self.path, [json.dumps({"settings": self.settings, "done": self.done}).encode()])


class _Embedder:
    """Encodes texts into a file, and maps it into memory."""

    def __init__(self, encoder: Encoder, similarity: str, folder: Path, state: _State):
        self.encoder, self.similarity, self.folder, self.state = encoder, similarity, folder, state

    def __call__(self, prompt: str, texts: TextStore) -> np.ndarray:
        """`[texts, D]` float32, read only."""
        path, key = self.folder / f"{prompt}.f32", f"{prompt}_embeddings"
        done, width = self.state.done.get(key, (0, 0)) if path.exists() else (0, 0)
        progress = Progress({"query": "encoding queries"}.get(prompt, "encoding passages"), texts.num_bytes())
        progress.add(done, 0, skipped_bytes=texts.num_bytes(slice(0, done)))
        with path.open("r+b" if done else "wb") as file:
            file.truncate(done * width * 4)
            file.seek(0, 2)
            try:
                for part in blocks(len(texts), CHUNK):
                    if part.stop <= done:
                        continue
                    chunk = texts.read(range(part.start, part.stop))
                    embeddings = np.asarray(self.encoder.encode(chunk, prompt=prompt), np.float32)
                    if not np.isfinite(embeddings).all():
                        raise UserError("the model's embeddings are not finite numbers", key="model", code="not_finite")
                    if self.similarity == "cosine":
                        embeddings = unit_rows(embeddings)
                    file.write(np.ascontiguousarray(embeddings).data)
                    file.flush()
                    width = embeddings.shape[1]
                    self.state.save(**{key: [part.stop, width]})
                    progress.add(len(chunk), texts.num_bytes(part))
            finally:
                progress.close()
        return np.memmap(path, np.float32, "r", shape=(len(texts), width))
