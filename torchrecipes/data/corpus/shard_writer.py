"""Writes batches of tokens as shards, and `corpus.json` when the source has ended.

1. The documents of one source go, in its order, to the shards of one split or of several.
2. When the next document would make a shard too long, the shards of all splits are written: a commit. So the place in
   the source where it happened is one place for all of them, and nothing that was read before it is lost.
3. That place is in the header of the shards. After an interruption, the newest commit of which every file is there is
   found, what lies beyond it is removed, and reading continues from its place.

Where a shard ends depends on the documents alone, not on the batches.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
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
    """A batch of documents in the order of the source.

    Attributes:
        tokens: `[N]`, of all documents.
        lengths: int64 `[D]`, tokens of each document; 0: it has none of its own, and is counted only.
        counts: integers `[D, 4]`: characters, bytes, unknown tokens and names of special tokens in each document.
        splits: `[D]`, the place of each document's split in `ShardWriter.folders`. None: the first.
        columns: arrays `[D]` by name that the shards hold, too; the same names in every batch.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray
    splits: np.ndarray | None = None
    columns: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class SourcePosition:
    """A place between two documents of a source, and what was counted before it.

    Attributes:
        position: what `source.position()` gave at some document; None: the start of the source.
        skip: documents between there and this place.
        documents: documents of the source before this place.
        skipped, examples: `ReadStats` of the records before `position`.
        validation_limit: documents with a hash below it are for validation, where the split has been chosen.
    """

    position: dict[str, Any] | None = None
    skip: int = 0
    documents: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    validation_limit: int | None = None

    def after(self, documents: int) -> "SourcePosition":
        """The place so many documents later."""
        return replace(self, skip=self.skip + documents, documents=self.documents + documents)


@dataclass
class _Split:
    """Shards that are written, and documents that are in none yet."""

    folder: Path
    source: str  # fingerprint of what the shards are made from
    written: list[Statistics] = field(default_factory=list)
    tokens: list[np.ndarray] = field(default_factory=list)
    lengths: list[np.ndarray] = field(default_factory=list)
    columns: dict[str, list[np.ndarray]] = field(default_factory=dict)
    pending: Statistics = field(default_factory=Statistics)


class ShardWriter:
    """Collects tokens and writes shards, after those that an interrupted call left.

    Args:
        folders: name of each split -> its folder, made if missing.
        settings: what the tokens are made from, JSON-able; has `dtype` and `shard_tokens`. Shards of other settings are
            never continued, but replaced.

    Attributes:
        position: the place in the source from which reading continues.
    """

    def __init__(self, folders: dict[str, Path], settings: dict[str, Any]):
        self.settings, self.dtype = settings, np.dtype(settings["dtype"])
        self.folders, self.position = folders, SourcePosition()
        self._splits = {
            split: _Split(folder, xxhash.xxh3_128_hexdigest(to_json(settings) + split.encode()))
            for split, folder in folders.items()
        }
        for folder in folders.values():
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                for leftover in folder.glob(".*.tmp"):  # of a process that was killed
                    leftover.unlink()
        self._continue()

    @property
    def num_shards(self) -> dict[str, int]:
        """Shards that are written, by split."""
        return {name: len(split.written) for name, split in self._splits.items()}

    def add(self, batch: Tokenized, start: SourcePosition | None = None) -> None:
        """Adds documents; writes shards when the next document would make one too long.

        Args:
            batch: the documents.
            start: the place of the first of them in the source. None: after those that were added before.
        """
        start, count = start or self.position, len(batch.lengths)
        first = 0
        while first < count:
            last = self._fitting(batch, first)
            self._take(batch, first, last)
            first = last
            self.position = start.after(first)
            if first < count:
                self._commit()

    def finish(self, skipped: ReadStats, tokenizer: Tokenizer) -> None:
        """Writes the last shards and every `corpus.json`.

        Args:
            skipped: what the source has skipped; it is stated in the first split's.
            tokenizer: what made the tokens.

        Raises:
            UserError: a split has no documents (code `no_documents`).
        """
        if any(split.pending.documents for split in self._splits.values()):
            self._commit()
        for name, split in self._splits.items():
            if not split.written:
                raise UserError(
                    f"all {self.statistics(name).seen:,} documents of the {name} data are empty after tokenization",
                    hint="Check the source and the tokenizer's normalizer.",
                    code="no_documents",
                )
        for number, name in reversed(list(enumerate(self._splits))):
            account = {
                "format": self.settings.get("format", FORMAT),
                "split": name,
                "tokenizer": {
                    "fingerprint": tokenizer.fingerprint,
                    "vocab_size": tokenizer.vocab_size,
                    "special_tokens": tokenizer.special_tokens,
                },
                "settings": self.settings,
                "source_position": asdict(self.position),
                "statistics": asdict(self.statistics(name)),
                "skipped": skipped.lines()[1:] if number == 0 else [],
                "shards": self.describe_shards(name),
            }
            with writing(self.folders[name]):
                write_atomically(self.folders[name] / CORPUS_FILE, [to_json(account)])

    def statistics(self, name: str) -> Statistics:
        """Counts of all documents of a split, in shards or pending."""
        return sum(self._splits[name].written, self._splits[name].pending)

    def describe_shards(self, name: str) -> list[dict[str, Any]]:
        """The shards of a split that are written, as `corpus.json` lists them."""
        split, shards = self._splits[name], []
        for number, statistics in enumerate(split.written):
            path = split.folder / shard_name(number)
            whole, arrays = checksums(path)
            counts = {"tokens": statistics.tokens, "documents": statistics.documents}
            shards.append(
                {"file": path.name, "size": path.stat().st_size, "xxh3": whole, "arrays_xxh3": arrays, **counts}
            )
        return shards

    def clear(self) -> None:
        """Removes the shards."""
        for split in self._splits.values():
            for number in range(len(split.written)):
                (split.folder / shard_name(number)).unlink(missing_ok=True)

    def _continue(self) -> None:
        """Finds the newest commit of which every file is there, and removes what lies beyond it."""
        found: dict[str, list[Statistics]] = {}
        commits = [{"shards": dict.fromkeys(self._splits, 0), "pending": {}, "position": asdict(self.position)}]
        for name, split in self._splits.items():
            found[name] = []
            while (path := split.folder / shard_name(len(found[name]))).exists():
                try:
                    _, metadata = open_shard(path, 0, 0)
                    if metadata["source"] != split.source:
                        break
                    commits.append(json.loads(metadata["commit"]))
                    found[name].append(Statistics(**json.loads(metadata["statistics"])))
                except (ValueError, KeyError, TypeError):
                    break
        complete = [
            commit for commit in commits if all(commit["shards"][name] <= len(found[name]) for name in self._splits)
        ]
        newest = max(complete, key=lambda commit: commit["position"]["documents"])
        self.position = SourcePosition(**newest["position"])
        for name, split in self._splits.items():
            split.written = found[name][: newest["shards"][name]]
            split.pending = Statistics(**newest["pending"].get(name, {}))
            kept = {shard_name(i) for i in range(len(split.written))}
            for other in split.folder.glob("shard-*.safetensors"):
                if other.name not in kept:
                    other.unlink()

    def _fitting(self, batch: Tokenized, first: int) -> int:
        """The documents up to this one, exclusive, fit into the shards that are being filled."""
        last = len(batch.lengths)
        most = max(split.pending.tokens for split in self._splits.values()) + int(batch.lengths[first:].sum())
        if most <= self.settings["shard_tokens"]:
            return last
        for number, split in enumerate(self._splits.values()):
            own = np.arange(first, last)
            if batch.splits is not None:
                own = own[batch.splits[first:last] == number]
            ends = np.cumsum(batch.lengths[own])
            fitting = int(ends.searchsorted(self.settings["shard_tokens"] - split.pending.tokens, "right"))
            if fitting == 0 and not split.pending.tokens:
                fitting = 1  # longer than a shard
            if fitting < len(own):
                last = int(own[fitting])
        return last

    def _take(self, batch: Tokenized, first: int, last: int) -> None:
        lengths, counts = batch.lengths[first:last], batch.counts[first:last]
        begin = int(batch.lengths[:first].sum())
        tokens = batch.tokens[begin : begin + int(lengths.sum())]
        for number, split in enumerate(self._splits.values()):
            own = batch.splits[first:last] == number if batch.splits is not None else np.full(len(lengths), number == 0)
            if not own.any():
                continue
            own_lengths = lengths[own]
            kept = own_lengths[own_lengths > 0]
            # By column: of millions of domain names they are contiguous.
            characters, num_bytes, unknown, special_names = (int(one[own].sum(dtype=np.int64)) for one in counts.T)
            split.tokens += _tokens_of(tokens, lengths, own)
            split.lengths.append(kept)
            for column, values in batch.columns.items():
                split.columns.setdefault(column, []).append(values[first:last][own & (lengths > 0)])
            split.pending += Statistics(
                seen=len(own_lengths),
                documents=len(kept),
                empty=len(own_lengths) - len(kept),
                tokens=int(kept.sum()),
                characters=characters,
                bytes=num_bytes,
                unknown=unknown,
                special_names=special_names,
                documents_with_special_names=int((counts[own, 3] > 0).sum()),
                shortest=int(kept.min()) if len(kept) else 0,
                longest=int(kept.max(initial=0)),
            )

    def _commit(self) -> None:
        """Writes what is pending of every split; the first split last, so that with its shard the commit is there."""
        due = [name for name, split in self._splits.items() if split.pending.documents]
        commit = {
            "shards": {name: len(split.written) + (name in due) for name, split in self._splits.items()},
            "pending": {
                name: asdict(split.pending)
                for name, split in self._splits.items()
                if split.pending.seen and name not in due
            },
            "position": asdict(self.position),
        }
        for name in reversed(due):
            split = self._splits[name]
            offsets = np.zeros(split.pending.documents + 1, np.int64)
            np.cumsum(np.concatenate(split.lengths), out=offsets[1:])
            metadata = {
                "source": split.source,
                "statistics": json.dumps(asdict(split.pending)),
                "commit": json.dumps(commit),
            }
            with writing(split.folder):
                path = split.folder / shard_name(len(split.written))
                write_shard(path, split.tokens, offsets, metadata, split.columns)
            split.written.append(split.pending)
            split.tokens, split.lengths, split.columns, split.pending = [], [], {}, Statistics()


def _tokens_of(tokens: np.ndarray, lengths: np.ndarray, chosen: np.ndarray) -> list[np.ndarray]:
    """The tokens of some documents, as slices where few of them are between others."""
    edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False))  # where a run of chosen documents starts, ends
    if len(edges) > len(chosen) // 8:
        return [tokens[np.repeat(chosen, lengths)]]
    places = np.concatenate([[0], np.cumsum(lengths)])[edges].tolist()
    return [tokens[i:j] for i, j in zip(places[::2], places[1::2], strict=True)]


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
