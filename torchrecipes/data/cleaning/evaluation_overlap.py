"""`decontaminate`: removes from training documents what occurs in evaluation sets.

The method is that of GPT-3 (Brown et al. 2020, "Language Models are Few-Shot Learners", appendix C): word 13-grams,
without case and punctuation, that a training document has in common with an evaluation document. Those that more than
10 training documents have are ignored: most are common phrases.

Stages, as in `torchrecipes.data.cleaning.stages`:

1. `count`: how many training documents have each n-gram of the evaluation sets.
2. `filter`: documents without an overlap are kept, others treated as asked for.
3. `merge`, one job: the report, with the share of each evaluation set that occurs in the training documents.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from torchrecipes.config.suggest import did_you_mean
from torchrecipes.data.cleaning import pieces as cut
from torchrecipes.data.cleaning.ngrams import Words, hash_words, in_batches, ngram_hashes
from torchrecipes.data.cleaning.output import Output, check_shards, run_stages, write_lines
from torchrecipes.data.cleaning.pieces import Input, Piece, add_skipped, finished_pieces, process_pieces, save_array
from torchrecipes.data.cleaning.report import Tally
from torchrecipes.data.sources.records import Document, ReadStats, Source, require_documents
from torchrecipes.errors import UserError

FORMAT = 1  # raise it when the same input gives other documents than before
STAGES = ("count", "filter", "merge")
ACTIONS = ("cut", "remove", "report")
WINDOW, SHORTEST, MOST_PIECES = 200, 200, 10  # characters, characters, pieces: GPT-3, appendix C


def decontaminate(
    source: Source,
    output_dir: str | Path,
    eval_sets: Sequence[Source],
    *,
    n: int = 13,
    action: str = "cut",
    max_share: float = 0.0,
    max_documents: int | None = 10,
    shard_index: int = 0,
    num_shards: int = 1,
    stage: str | None = None,
    workers: int | None = 0,
) -> dict[str, Any] | None:
    """Removes what evaluation sets and training documents have in common. Continues after an interruption.

    Args:
        source: the training documents.
        output_dir: see `torchrecipes.data.cleaning.output`.
        eval_sets: the evaluation sets; nothing is removed from them.
        n: words of an n-gram. Evaluation documents with fewer are not compared.
        action: "cut" removes the n-grams with 200 characters on both sides, which splits a document; pieces of less
            than 200 characters are dropped, and documents of more than 10 pieces. "remove" removes the document.
            "report" only counts.
        max_share: the action is taken where more than this share of a document's n-grams is in an evaluation set.
        max_documents: n-grams in more training documents than this are ignored; None: none are.
        shard_index: number of this job, from 0.
        num_shards: number of jobs that share the work.
        stage: what this job does; None: all stages, for a single job.
        workers: as in `clean`.

    Returns:
        The report; None from a stage of several.

    Raises:
        UserError: an invalid value (code `invalid_value`, `out_of_range`), evaluation documents all shorter than n
            words (`no_ngrams`), and as in `clean`.
    """
    if action not in ACTIONS:
        hint = did_you_mean(action, ACTIONS, "Valid values")
        raise UserError(f"'{action}' is not a valid value", key="--action", hint=hint, code="invalid_value")
    for option, value, low, high in (("-n", n, 1, 100), ("--max-share", max_share, 0, 1)):
        if not low <= value <= high:
            hint = f"Give {low} to {high}."
            raise UserError(f"{value} is out of range", key=option, hint=hint, code="out_of_range")
    check_shards(shard_index, num_shards, stage, STAGES)
    job = _Job(Output(Path(output_dir)), source, tuple(eval_sets), n, action, max_share, max_documents)
    if job.output.open(job.settings):
        print(f"{output_dir} is complete: nothing is left to do", file=sys.stderr, flush=True)
        return job.output.read_report()
    shard = {"shard_index": shard_index, "num_shards": num_shards, "workers": workers}
    run_stages(
        job.output,
        {"count": lambda: job.count(**shard), "filter": lambda: job.filter(**shard), "merge": job.merge},
        STAGES if stage is None else [stage],
        f"{shard_index}-of-{num_shards}",
    )
    return job.output.read_report() if stage is None else None


@dataclass(frozen=True)
class _Job:
    output: Output
    source: Source
    eval_sets: tuple[Source, ...]
    n: int
    action: str
    max_share: float
    max_documents: int | None

    @property
    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("n", "action", "max_share", "max_documents")}

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "job": "decontaminate",
            "format": FORMAT,
            "inputs": {"part": self.source.fingerprint},
            "evaluation": [one.fingerprint for one in self.eval_sets],
            "options": self.options,
            "pieces": [cut.PIECE_DOCUMENTS, cut.PIECE_CHARACTERS, cut.PART_BYTES],
        }

    @property
    def input(self) -> Input:
        return Input("part", self.source)

    @property
    def counted(self) -> Path:
        return self.output.work / "counted"

    @property
    def filtered(self) -> Path:
        return self.output.work / "filtered"

    def count(self, **job: int | None) -> None:
        work = _Count(self._all_ngrams(), self.counted, self.n)
        process_pieces("counting", [self.input], self.counted, work, **job)

    def filter(self, **job: int | None) -> None:
        work = _Filter(self._compared_ngrams(), self.output.documents, self.n, self.action, self.max_share)
        process_pieces("filtering", [self.input], self.filtered, work, **job)

    def _all_ngrams(self) -> Path:
        """Return the file of the n-grams of the evaluation sets, sorted; the first job that asks for it makes it."""
        file = self.output.work / "ngrams.npy"
        with self.output.locked("ngrams", wait=True):
            if not file.exists():
                found = [hashes for one in self.eval_sets for hashes in _evaluation_ngrams(one, self.n) if hashes.size]
                if not found:
                    problem = f"no document of the evaluation sets has {self.n} words or more"
                    raise UserError(problem, key="--eval-sets", hint="Lower -n.", code="no_ngrams")
                save_array(file, np.unique(np.concatenate(found)))
        return file

    def _counts(self) -> np.ndarray:
        """Return for each n-gram of the evaluation sets the number of training documents that have it."""
        counts = np.zeros(len(np.load(self._all_ngrams(), mmap_mode="r")), np.int64)
        for name, _ in finished_pieces([self.input], self.counted):
            numbers, documents = np.load(self.counted / f"{name}.npy")
            counts[numbers] += documents
        return counts

    def _is_compared(self, counts: np.ndarray) -> np.ndarray:
        return np.ones(len(counts), bool) if self.max_documents is None else counts <= self.max_documents

    def _compared_ngrams(self) -> Path:
        file = self.output.work / "compared.npy"
        with self.output.locked("compared", wait=True):
            if not file.exists():
                save_array(file, np.load(self._all_ngrams())[self._is_compared(self._counts())])
        return file

    def merge(self) -> None:
        tally, skipped, overlapping, written = Tally(), ReadStats(), 0, 0
        for _, record in finished_pieces([self.input], self.filtered):
            add_skipped(skipped, record)
            skipped.documents += record["documents"]
            tally.add_record(record)
            overlapping += record["overlapping"]
            written += record["written"]
        require_documents(self.source, skipped)
        counts = self._counts()
        seen = (counts > 0) & self._is_compared(counts)
        self.output.write_report(
            {
                "job": "decontaminate",
                "input": self.source.name,
                "steps": {"decontaminate": self.options},
                "overlapping_documents": overlapping,
                "written_documents": written,
                "ignored_ngrams": int((~self._is_compared(counts)).sum()),
                "references": [self._evaluation(one, np.load(self._all_ngrams()), seen) for one in self.eval_sets],
                **tally.to_dict(),
                "bad_records": {
                    reason: {"records": count, "examples": skipped.examples[reason]}
                    for reason, count in skipped.skipped.items()
                },
            }
        )
        self.output.finish(self.settings)

    def _evaluation(self, source: Source, ngrams: np.ndarray, seen: np.ndarray) -> dict[str, Any]:
        """Return how much of an evaluation set occurs in the training documents."""
        documents = short = touched = 0
        share = 0.0
        for hashes in _evaluation_ngrams(source, self.n):
            documents += 1
            if not hashes.size:
                short += 1
                continue
            found = seen[np.searchsorted(ngrams, hashes)]
            touched += bool(found.any())
            share += found.mean()
        return {
            "name": source.name,
            "kind": "evaluation",
            "documents": documents,
            f"shorter than {self.n} words": short,
            "with an n-gram in training": touched,
            "mean share of n-grams in training": f"{share / max(1, documents - short):.1%}",
        }


@dataclass(frozen=True)
class _Overlaps:
    """The n-grams of a text that are in a sorted array: their positions in that, and in the text."""

    numbers: np.ndarray
    positions: np.ndarray
    total: int


def _overlaps(texts: Sequence[str], ngrams: np.ndarray, n: int) -> Iterator[tuple[_Overlaps, Words]]:
    """Yield for each text its overlaps, and its words."""
    for batch in in_batches(texts):
        words = hash_words(texts[batch])
        hashes, offsets = ngram_hashes(words, n)
        places = np.minimum(np.searchsorted(ngrams, hashes), max(0, len(ngrams) - 1))
        matches = np.flatnonzero(ngrams[places] == hashes) if len(ngrams) else np.zeros(0, np.int64)
        edges = np.searchsorted(matches, offsets)
        for number in range(len(offsets) - 1):
            here = matches[edges[number] : edges[number + 1]]
            own = slice(words.offsets[number], words.offsets[number + 1])
            of_text = Words(words.hashes[own], np.array([0, own.stop - own.start]), words.starts[own], words.stops[own])
            total = int(offsets[number + 1] - offsets[number])
            yield _Overlaps(places[here], here - offsets[number], total), of_text


def _evaluation_ngrams(source: Source, n: int) -> Iterator[np.ndarray]:
    """Yield the hashes of the n-grams of each document; none where it has fewer than n words."""
    for document in source:
        words = hash_words([document.text])
        yield ngram_hashes(words, n).hashes if len(words.hashes) >= n else np.zeros(0, np.uint64)


@cache
def _load(file: Path) -> np.ndarray:
    return np.load(file, mmap_mode="r")


@dataclass(frozen=True)
class _Count:
    """Counts the documents of a piece that have each n-gram."""

    ngrams: Path
    folder: Path
    n: int

    def __call__(self, piece: Piece) -> dict[str, Any]:
        texts = [document.text for document in piece.documents]
        numbers = [np.unique(found.numbers) for found, _ in _overlaps(texts, _load(self.ngrams), self.n)]
        counts = np.unique(np.concatenate([np.zeros(0, np.int64), *numbers]), return_counts=True)
        save_array(self.folder / f"{piece.name}.npy", np.stack(counts))
        return {}


@dataclass(frozen=True)
class _Filter:
    """Writes the documents of a piece, without what overlaps."""

    ngrams: Path
    folder: Path
    n: int
    action: str
    max_share: float

    def __call__(self, piece: Piece) -> dict[str, Any]:
        tally, overlapping, kept = Tally(), 0, []
        texts = [document.text for document in piece.documents]
        for document, (found, words) in zip(piece.documents, _overlaps(texts, _load(self.ngrams), self.n), strict=True):
            share = len(found.positions) / max(1, found.total)
            if not len(found.positions) or share <= self.max_share:
                kept.append(document)
                continue
            overlapping += 1
            rule, documents = self._treat(document, found.positions, words)
            kept += documents
            if not documents:
                tally.add_removed(rule, len(document.text))
            elif self.action == "cut":
                tally.add_changed(rule, len(document.text) - sum(len(one.text) for one in documents))
            if tally.wants_example(rule):
                first = found.positions[0]
                text = document.text[words.starts[first] : words.stops[first + self.n - 1]]
                count = f"{len(found.positions):,} of {found.total:,} {self.n}-grams ({share:.1%}), the first one"
                tally.add_example(rule, document.source, text, count)
        if self.action != "report":
            lines = (json.dumps(document._asdict(), ensure_ascii=False).encode() for document in kept)
            write_lines(self.folder / f"{piece.name}.jsonl.zst", lines)
        return {"overlapping": overlapping, "written": len(kept), **tally.to_record()}

    def _treat(self, document: Document, positions: np.ndarray, words: Words) -> tuple[str, list[Document]]:
        """Return the rule that applies to a document with overlaps, and what is left of it."""
        if self.action == "report":
            return "overlap", [document]
        if self.action == "remove":
            return "overlap", []
        left = cut_around(document.text, words.starts[positions], words.stops[positions + self.n - 1])
        if len(left) > MOST_PIECES:
            return "overlap.too_many_pieces", []
        if len(left) == 1:
            return "overlap.cut", [document._replace(text=left[0])]
        names = [document.source, *(f"{document.source} (piece {number})" for number in range(2, len(left) + 1))]
        pieces = [document._replace(text=text, source=name) for text, name in zip(left, names, strict=False)]
        return ("overlap.cut" if left else "overlap.nothing_left"), pieces


def cut_around(text: str, starts: np.ndarray, stops: np.ndarray) -> list[str]:
    """Return the pieces of `text` that are 200 characters or more away from all spans, and 200 characters long or more.

    Args:
        text: a document.
        starts: where the spans begin, rising.
        stops: where they end.
    """
    pieces, begin = [], 0
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        if start - WINDOW > begin:
            pieces.append(text[begin : start - WINDOW])
        begin = max(begin, stop + WINDOW)
    pieces.append(text[begin:])
    return [piece for piece in pieces if len(piece) >= SHORTEST and not piece.isspace()]
