"""Writes batches of tokens as the shards and the `corpus.json` of one split.

Where a shard ends depends on the documents alone, not on the batches. Shards that an interrupted call wrote are found
and kept.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from torchrecipes.atomic_write import write_atomically
from torchrecipes.data.corpus.shards import FORMAT, Statistics, checksums, open_shard, shard_name, write_shard
from torchrecipes.data.sources.records import ReadStats
from torchrecipes.data.tokenizers.tokenizer import Tokenizer
from torchrecipes.errors import UserError

CORPUS_FILE = "corpus.json"


@dataclass
class Tokenized:
    """A batch of documents of one split: its tokens `[N]`, their number per document (0: skipped), and more counts.

    `counts` is int64 `[D, 3]`: characters, bytes and unknown tokens of each document.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray


class SplitWriter:
    """Collects the tokens of one split and writes its shards, after those that an earlier call left."""

    def __init__(self, folder: Path, split: str, settings: dict[str, Any]):
        self.folder, self.split, self.settings = folder, split, settings
        self.dtype = np.dtype(settings["dtype"])
        self.source = xxhash.xxh3_128_hexdigest(to_json(settings) + split.encode())
        self.finished = (folder / CORPUS_FILE).exists()
        self.shards: list[Statistics] = []
        self.tokens: list[np.ndarray] = []
        self.lengths: list[np.ndarray] = []
        self.current = Statistics()
        if not self.finished:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                self._find_shards()

    @property
    def seen(self) -> int:
        """How many documents of the source the shards hold already (empty ones counted)."""
        return sum(shard.seen for shard in self.shards)

    def add(self, batch: Tokenized) -> None:
        """Adds documents; writes a shard when the next document would make it too long."""
        ends = np.cumsum(batch.lengths)
        first, count = 0, len(batch.lengths)
        while first < count:
            room = self.settings["shard_tokens"] - self.current.tokens + (int(ends[first - 1]) if first else 0)
            last = max(first, int(ends.searchsorted(room, "right")))
            if last == first and not self.current.tokens:
                last = first + 1  # longer than a shard
            self._take(batch, first, last, ends)
            first = last
            if first < count and self.current.documents:
                self._write_shard()

    def finish(self, skipped: ReadStats, tokenizer: Tokenizer) -> None:
        """Writes the last shard and `corpus.json`.

        Raises:
            UserError: there are no documents.
        """
        if self.current.documents:
            self._write_shard()
        total = sum(self.shards, self.current)
        if not self.shards:
            raise UserError(
                f"all {total.seen:,} documents of the {self.split} data are empty after tokenization",
                hint="Check the source and the tokenizer's normalizer.",
                code="no_documents",
            )
        account = {
            "format": FORMAT,
            "split": self.split,
            "tokenizer": {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
            "settings": self.settings,
            "statistics": asdict(total),
            "skipped": skipped.lines()[1:],
            "shards": [self._describe(shard_name(i), shard) for i, shard in enumerate(self.shards)],
        }
        with writing(self.folder):
            write_atomically(self.folder / CORPUS_FILE, [to_json(account)])
        self.finished = True

    def _describe(self, name: str, shard: Statistics) -> dict[str, Any]:
        path = self.folder / name
        whole, arrays = checksums(path)
        counts = {"tokens": shard.tokens, "documents": shard.documents}
        return {"file": name, "size": path.stat().st_size, "xxh3": whole, "arrays_xxh3": arrays, **counts}

    def clear(self) -> None:
        """Removes the shards."""
        for i in range(len(self.shards)):
            (self.folder / shard_name(i)).unlink(missing_ok=True)

    def _find_shards(self) -> None:
        for leftover in self.folder.glob(".*.tmp"):  # of a process that was killed
            leftover.unlink()
        while (path := self.folder / shard_name(len(self.shards))).exists():
            try:
                _, source, statistics = open_shard(path, 0, 0)
            except (ValueError, KeyError, TypeError):
                break
            if source != self.source:
                break
            self.shards.append(statistics)
        kept = {shard_name(i) for i in range(len(self.shards))}
        for other in self.folder.glob("shard-*.safetensors"):  # after a corrupt one
            if other.name not in kept:
                other.unlink()

    def _take(self, batch: Tokenized, first: int, last: int, ends: np.ndarray) -> None:
        if first == last:
            return
        begin = int(ends[first - 1]) if first else 0
        lengths = batch.lengths[first:last]
        kept = lengths[lengths > 0]
        characters, num_bytes, unknown = batch.counts[first:last].sum(0).tolist()
        self.tokens.append(batch.tokens[begin : int(ends[last - 1])])
        self.lengths.append(kept)
        self.current += Statistics(
            seen=last - first,
            documents=len(kept),
            empty=last - first - len(kept),
            tokens=int(kept.sum()),
            characters=characters,
            bytes=num_bytes,
            unknown=unknown,
            shortest=int(kept.min()) if len(kept) else 0,
            longest=int(kept.max(initial=0)),
        )

    def _write_shard(self) -> None:
        offsets = np.zeros(self.current.documents + 1, np.int64)
        np.cumsum(np.concatenate(self.lengths), out=offsets[1:])
        path = self.folder / shard_name(len(self.shards))
        with writing(self.folder):
            write_shard(path, self.tokens, offsets, self.source, self.current)
        self.shards.append(self.current)
        self.tokens, self.lengths, self.current = [], [], Statistics()


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns an error of the disk into a message about `folder`.

    Raises:
        UserError: in place of an OSError inside (code `not_writable`).
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the corpus cannot be written to {folder} ({error.strerror or error})",
            key="data.corpus_dir",
            hint="Make room or give another folder. Complete shards are kept: the same command continues after them.",
            code="not_writable",
        ) from error


def to_json(content: dict[str, Any]) -> bytes:
    """The text of a JSON file for people, equal for equal content."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
