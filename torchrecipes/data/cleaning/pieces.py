"""Pieces of a source: what is cleaned at a time, finished or not, by this job or another.

1. A source of many files is cut into parts of consecutive files, 64 MB or more each; any other source is one part.
2. A part is cut into pieces of at most 8,192 documents and about 16 million characters. Parts and pieces depend on the
   source alone, so they are the same for any number of jobs.
3. Of N jobs, job i does the parts with number % N == i if there are N parts or more, and else the pieces with
   (part + piece) % N == i: then every job reads the whole source.
4. A piece is finished when its record is there, which is written last. An interrupted job continues after the pieces
   that are finished, from the position in the source that their records hold.
"""

import copy
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np

from torchrecipes.atomic_write import write_atomically
from torchrecipes.data.progress import Progress
from torchrecipes.data.sources.records import EXAMPLES_PER_REASON, Document, ReadStats, Source
from torchrecipes.data.sources.text_files import files
from torchrecipes.errors import UserError

PIECE_DOCUMENTS, PIECE_CHARACTERS = 8_192, 1 << 24
PART_BYTES = 1 << 26  # of files as stored


@dataclass(frozen=True)
class Input:
    """A source that is cleaned, or that others are compared with; its pieces are called `NAME-PART-PIECE`."""

    name: str
    source: Source
    is_reference: bool = False


@dataclass(frozen=True)
class Piece:
    """Consecutive documents of an input.

    Attributes:
        name: its name, in the order of the documents.
        documents: may be none, of the last piece of a part.
        skipped: counts and examples of the bad records before and between them.
        is_last: whether the part ends here.
        position: the position in the part after them, where the source has positions.
    """

    name: str
    documents: list[Document]
    skipped: ReadStats
    is_last: bool
    position: dict[str, Any] | None

    @property
    def characters(self) -> int:
        """Characters of all documents."""
        return sum(len(document.text) for document in self.documents)

    def record(self) -> dict[str, Any]:
        """Return what the record of every piece holds."""
        return {
            "documents": len(self.documents),
            "characters": self.characters,
            "skipped": self.skipped.skipped,
            "skipped_examples": self.skipped.examples,
            "is_last": self.is_last,
            "position": self.position,
        }


def process_pieces(
    what: str,
    inputs: Sequence[Input],
    records: Path,
    work: Callable[[Piece], dict[str, Any]],
    *,
    shard_index: int = 0,
    num_shards: int = 1,
    workers: int | None = None,
) -> None:
    """Calls `work` with every piece of this job that is not finished, and writes the records that it returns.

    Args:
        what: first words of the progress bar.
        inputs: whose pieces.
        records: folder of the records.
        work: can be pickled, and does the same whenever a piece is done again. It runs in worker processes.
        shard_index: number of this job.
        num_shards: number of jobs.
        workers: processes beside this one, which reads; 0: it does all. None: one per core, as far as the source has
            work for several.
    """
    records.mkdir(parents=True, exist_ok=True)
    total = sum(one.source.num_bytes for one in inputs)
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = min(cores, total // num_shards // PIECE_CHARACTERS)
        workers = workers if workers > 1 else 0
    progress = Progress(what, total // num_shards)
    try:
        pieces = _own_pieces(inputs, records, shard_index, num_shards, progress)
        for documents, characters in _in_workers(_Finish(work, records), pieces, workers):
            progress.add(documents, characters)
    finally:
        progress.close()


def finished_pieces(inputs: Iterable[Input], records: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the record of every piece, in the order of the documents.

    Raises:
        UserError: some are not finished (code `unfinished_stage`).
    """
    for one in inputs:
        for part in range(len(_parts(one.source))):
            is_last, number = False, 0
            while not is_last:
                name = _name(one, part, number)
                record = read_record(records, name)
                if record is None:
                    problem = f"the piece {name} is not finished"
                    hint = "Run all jobs of the earlier stages to their end first, with the same inputs and steps."
                    raise UserError(problem, key="--stage", hint=hint, code="unfinished_stage")
                yield name, record
                is_last, number = record["is_last"], number + 1


def read_record(records: Path, name: str) -> dict[str, Any] | None:
    """Return the record of a piece, None where it is not finished."""
    try:
        return json.loads((records / f"{name}.json").read_text("utf-8"))
    except FileNotFoundError:
        return None


def save_array(file: Path, array: np.ndarray) -> None:
    """Writes a `.npy` file that is complete or not there."""
    buffer = BytesIO()
    np.save(buffer, array)
    write_atomically(file, [buffer.getbuffer()])


def add_skipped(total: ReadStats, record: dict[str, Any]) -> None:
    """Adds the bad records of a piece to `total`."""
    for reason, count in record["skipped"].items():
        total.skipped[reason] = total.skipped.get(reason, 0) + count
        examples = total.examples.setdefault(reason, [])
        examples += record["skipped_examples"][reason][: EXAMPLES_PER_REASON - len(examples)]


@dataclass(frozen=True)
class _Finish:
    work: Callable[[Piece], dict[str, Any]]
    records: Path

    def __call__(self, piece: Piece) -> tuple[int, int]:
        record = piece.record() | self.work(piece)
        write_atomically(self.records / f"{piece.name}.json", [json.dumps(record, ensure_ascii=False).encode()])
        return record["documents"], record["characters"]


def _name(one: Input, part: int, number: int) -> str:
    return f"{one.name}-{part:05d}-{number:05d}"


def _parts(source: Source) -> list[Source]:
    if not isinstance(source, files):
        return [source]
    groups, size = [[]], 0
    for file in source.found:
        if size >= PART_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(file)
        size += file.size
    parts = []
    for number, group in enumerate(groups):
        part = copy.copy(source)
        part.found, part.skipped = group, source.skipped if number == 0 else []
        parts.append(part)
    return parts


def _own_pieces(
    inputs: Sequence[Input], records: Path, shard_index: int, num_shards: int, progress: Progress
) -> Iterator[Piece]:
    """Yield the pieces of a job that are not finished."""
    for one in inputs:
        parts = _parts(one.source)
        for part, source in enumerate(parts):
            if len(parts) >= num_shards:
                own, step = (0, 1) if part % num_shards == shard_index else (None, 1)
            else:
                own, step = (shard_index - part) % num_shards, num_shards
            if own is not None:
                yield from _unfinished(one, part, source, records, range(own, 1 << 62, step), progress)


def _unfinished(
    one: Input, part: int, source: Source, records: Path, own: range, progress: Progress
) -> Iterator[Piece]:
    first, position = 0, None
    for number in own:  # those at the beginning that are finished need not be read
        record = read_record(records, _name(one, part, number))
        if record is None:
            break
        progress.add(0, 0, skipped_bytes=record["characters"])
        if record["is_last"]:
            return
        if record["position"] is not None:
            first, position = number + 1, record["position"]
    for piece in _read_pieces(one, part, source, first, position):
        number = int(piece.name.rpartition("-")[2])
        if number in own and read_record(records, piece.name) is None:
            yield piece


def _read_pieces(
    one: Input, part: int, source: Source, number: int, position: dict[str, Any] | None
) -> Iterator[Piece]:
    has_positions = hasattr(source, "position")
    documents = iter(source) if position is None else source.read(position)
    found: list[Document] = []
    characters, before = 0, ReadStats()

    def piece(is_last: bool) -> Piece:
        nonlocal before
        now = source.report
        skipped = {
            reason: count - before.skipped.get(reason, 0)
            for reason, count in now.skipped.items()
            if count > before.skipped.get(reason, 0)
        }
        examples = {reason: now.examples[reason][len(before.examples.get(reason, [])) :] for reason in skipped}
        before = copy.deepcopy(now)
        at = source.position() if has_positions and not is_last else None
        return Piece(_name(one, part, number), found, ReadStats(0, 0, skipped, examples), is_last, at)

    for document in documents:
        found.append(document)
        characters += len(document.text)
        if len(found) >= PIECE_DOCUMENTS or characters >= PIECE_CHARACTERS:
            yield piece(is_last=False)
            number, found, characters = number + 1, [], 0
    yield piece(is_last=True)


def _end_with_parent() -> None:
    # A pool's worker would wait for ever for a parent that was killed.
    def watch() -> None:
        wait([parent_process().sentinel])
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def _in_workers(work: Callable[[Piece], Any], pieces: Iterator[Piece], workers: int) -> Iterator[Any]:
    if workers == 0:
        yield from map(work, pieces)
        return
    # Not forked from this process, which may have threads; and each worker is a copy of one that has imported all.
    context = get_context("forkserver")
    context.set_forkserver_preload(["torchrecipes.data.cleaning"])
    pool = ProcessPoolExecutor(workers, context, initializer=_end_with_parent)
    try:
        ahead: deque = deque()
        for piece in pieces:
            ahead.append(pool.submit(work, piece))
            if len(ahead) > workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
