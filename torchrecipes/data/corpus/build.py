"""Builds a corpus: documents in, shards out.

1. This thread reads documents, decides by a hash of the text which split each belongs to, and collects batches.
2. Other threads tokenize the batches (`tokenizers` releases Python's lock, so threads do what processes would, without
   copies of the text). Results are taken in the order of the batches.
3. The tokens are collected until a shard is full. It is written under a temporary name and renamed, and says how far
   the source had been read (shard_writer.py).
4. `corpus.json` is written last. If the work is interrupted, complete shards remain; the next call reads on from there,
   `source.read(position)`. A source that has no `position` is read from its start, and the documents that the shards
   hold are skipped.

Where a shard ends depends on the documents alone, so the files are the same however the work was done. Domain names are
read in bulk (bulk.py), and which of them are for validation depends on their public suffix, too (`NameSplit`).
"""

import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xxhash

from torchrecipes.atomic_write import check_writable, write_atomically
from torchrecipes.data.corpus.shard_writer import (
    CORPUS_FILE,
    ShardWriter,
    SourcePosition,
    Tokenized,
    to_json,
    writing,
)
from torchrecipes.data.corpus.shards import COLUMNS_FORMAT, FORMAT
from torchrecipes.data.progress import Progress
from torchrecipes.data.sources.records import EXAMPLES_PER_REASON, Document, ReadStats, Source, require_documents
from torchrecipes.data.tokenizers.tokenizer import Tokenizer, one_thread
from torchrecipes.errors import UserError
from torchrecipes.file_lock import lock_folder

if TYPE_CHECKING:
    from torchrecipes.data.domains.name_split import NameSplit

SETTINGS_FILE = "prepare.json"
FEW = 100  # names of a public suffix from which on one of them at least is held out
HASHES = 1 << 64  # number of values of a document's hash
BATCH_CHARACTERS = 1 << 17  # tokenized at a time by one thread: encodings take 100 times as many bytes


def split_file(additions: int) -> str:
    """The file that says which domain names are held out, after so many additions to the corpus."""
    return f"split-{additions:05d}.safetensors"


def check_corpus_dir(
    folder: str | Path,
    source: Source | None = None,
    validation_fraction: float = 0,
    eval_samples: int | None = None,
) -> None:
    """Checks, before a tokenizer is trained, that a corpus is in `folder` or can be built there.

    Args:
        folder: as for `prepare_corpus`.
        source: if given, it is read until there is one document for training and one for validation.
        validation_fraction, eval_samples: as for `prepare_corpus`.

    Raises:
        UserError: the folder cannot be written (code `not_writable`); no documents; a single one, and a fraction of it
            is to be held out (`one_document`).
    """
    if not (Path(folder) / "train" / CORPUS_FILE).exists():
        check_writable(folder, key="data.corpus_dir")
        if source is not None:
            hashes: set[int] = set()
            for document in source:
                hashes.add(_hash(_encode(document)))
                if len(hashes) > 1 or eval_samples or not validation_fraction:
                    return
            require_documents(source, source.report)
            raise one_document()


def corpus_settings(
    source: Source,
    tokenizer: Tokenizer,
    validation_fraction: float,
    validation_source: Source | None,
    eval_samples: int | None,
    shard_tokens: int,
    is_stream: bool = False,
) -> dict[str, Any]:
    """What the files of a corpus depend on: `prepare.json`. Arguments: see `prepare_corpus`.

    Raises:
        UserError: an argument is out of range.
    """
    if not 0 <= validation_fraction < 1:
        hint = "Set a fraction of the documents, from 0 to below 1."
        raise UserError(f"{validation_fraction} is out of range", key="data.validation_fraction", hint=hint)
    if eval_samples is not None and eval_samples < 1:
        hint = "Set a number of documents, or null."
        raise UserError(f"{eval_samples} is less than 1", key="data.eval_samples", hint=hint)
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens is {shard_tokens}; it is 1 or more")
    if validation_source is not None:
        validation: dict[str, Any] = {"source": validation_source.fingerprint}
    elif eval_samples is not None:
        validation = {"samples": eval_samples}
    else:
        validation = {"fraction": validation_fraction}
        if validation_fraction and not is_stream and is_bulk(source, tokenizer):
            validation["names_per_suffix"] = FEW  # of a stream, no name is looked for ahead of the others
    return {
        "format": FORMAT if tokenizer.domain is None else COLUMNS_FORMAT,
        "source": source.fingerprint,
        "validation": validation,
        "tokenizer": tokenizer.fingerprint,
        "dtype": token_dtype(tokenizer).name,
        "shard_tokens": shard_tokens,
    }


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The type of a corpus' tokens."""
    if tokenizer.domain is not None:
        return np.dtype(np.uint8)
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


def is_bulk(source: Any, tokenizer: Tokenizer) -> bool:
    """Whether a source gives domain names in bulk (bulk.py), for a tokenizer of domain names.

    Raises:
        UserError: they have other rules for public suffixes (code `other_suffix_list`).
    """
    if tokenizer.domain is None or not hasattr(source, "blocks"):
        return False
    if source.suffixes.fingerprint != tokenizer.domain.suffix_list.fingerprint:
        raise UserError(
            f"{source.name} splits names by other rules for public suffixes than the tokenizer",
            key="data.source.public_suffix_list",
            hint="Give both the same public_suffix_list and only_icann. The rules of a tokenizer that is there are the "
            "words of public_suffix_rules in its tokenizer_config.json: write one per line to a file, and give that.",
            code="other_suffix_list",
        )
    return True


def build_corpus(
    folder: Path,
    source: Source,
    tokenizer: Tokenizer,
    settings: dict[str, Any],
    validation_source: Source | None = None,
    tokenizer_threads: int | None = None,
    throttle: Callable[[int], None] | None = None,
    split: "NameSplit | None" = None,
) -> bool:
    """Builds what is missing of the corpora `folder/train` and `folder/validation`.

    Args:
        folder, source, tokenizer, validation_source, tokenizer_threads: see `prepare_corpus`.
        settings: what `corpus_settings` gave.
        throttle: for shards that are read while they are written: called with the number of training shards after every
            batch, it may wait. No document is looked for ahead of the others, so there may be none for validation.
        split: which domain names are for validation; None: it is chosen here.

    Returns:
        Whether anything was missing.
    """
    threads = num_threads(tokenizer_threads)
    samples, fraction = (settings["validation"].get(key, 0) for key in ("samples", "fraction"))
    splits = ["train", "validation"] if validation_source is not None or samples or fraction else ["train"]

    def complete() -> bool:
        return all((folder / split / CORPUS_FILE).exists() for split in splits)

    if _same_settings(folder, settings) and complete():
        return False
    with locked(folder):
        if not _same_settings(folder, settings):
            with writing(folder):
                write_atomically(folder / SETTINGS_FILE, [to_json(settings)])
        elif complete():
            return False  # another process built it while this one waited
        folders = {split: folder / split for split in splits}
        if validation_source is None:
            parts = [(source, ShardWriter(folders, settings))]
        else:
            parts = [
                (one, ShardWriter({split: folders[split]}, settings))
                for one, split in ((source, "train"), (validation_source, "validation"))
            ]
        try:
            for one, writer in parts:
                if all((part / CORPUS_FILE).exists() for part in writer.folders.values()):
                    continue
                if is_bulk(one, tokenizer):
                    if fraction and split is None:
                        split = _choose_names(folder / split_file(0), one, fraction, threads, throttle is not None)
                    from torchrecipes.data.corpus.bulk import NameReader  # it needs this module

                    reader: Any = NameReader(one, tokenizer, writer.position, split, samples)
                else:
                    limit = writer.position.validation_limit
                    if limit is None:
                        limit = int(fraction * HASHES)
                        if limit and throttle is None:
                            limit = _validation_limit(one, limit)
                        writer.position = replace(writer.position, validation_limit=limit)
                    reader = DocumentReader(one, tokenizer, writer.position, samples)
                _tokenize_source(reader, tokenizer, writer, threads, throttle)
        except KeyboardInterrupt:
            saved = sum(sum(writer.num_shards.values()) for _, writer in parts)
            kept = f"{saved} complete shards are kept in {folder}; run the same command to continue after them."
            again = "No shard was complete yet; run the same command to start again."
            print(f"\nInterrupted while tokenizing. {kept if saved else again}", file=sys.stderr, flush=True)
            raise
    return True


def _validation_limit(source: Source, limit: int) -> int:
    """Return the hash below which a document is for validation: `limit`, or more so that at least one document is.

    Reads the source up to its first such document; where there is none, the document with the lowest hash is taken.

    Raises:
        UserError: all documents have one text (code `one_document`).
    """
    lowest, highest = HASHES, 0
    for document in source:
        value = _hash(_encode(document))
        if value < limit:
            return limit
        lowest, highest = min(lowest, value), max(highest, value)
    require_documents(source, source.report)
    if lowest == highest:
        raise one_document()
    return lowest + 1


def one_document() -> UserError:
    """The mistake of holding out a fraction of a single document."""
    return UserError(
        "the source holds one document, so none can be held out for validation",
        key="data.validation_fraction",
        hint="Split the text with sample_by: paragraph or line; or hold out its end with two sources, "
        "torchrecipes.data.sources.text_span stop=0.9 and, as data.eval_sets.validation, start=0.9; or give another "
        "data.eval_sets.validation; or train without validation: data.validation_fraction=0 eval_every=null.",
        code="one_document",
    )


def _hash(text: bytes) -> int:
    return xxhash.xxh3_64_intdigest(text)


def _encode(document: Document) -> bytes:
    try:
        return document.text.encode("utf-8")
    except UnicodeEncodeError as error:
        problem = f"{document.source} cannot be encoded as UTF-8 ({error})"
        raise UserError(problem, hint="Repair or remove it.", code="bad_record") from error


class Batch(NamedTuple):
    """Documents as they were read."""

    start: SourcePosition  # of the first of them
    documents: list[tuple[str, int]]  # text, bytes of UTF-8
    splits: list[int]  # 0: train, 1: validation


def _choose_names(path: Path, source: Any, fraction: float, threads: int, is_stream: bool) -> "NameSplit":
    from torchrecipes.data.domains.name_split import first_split, split_names

    limit = int(fraction * HASHES)
    if is_stream:
        return first_split(limit)
    return split_names(path, source, limit, threads)


def _tokenize_source(
    reader: Any,
    tokenizer: Tokenizer,
    writer: ShardWriter,
    threads: int,
    throttle: Callable[[int], None] | None,
) -> None:
    """Reads a source from the writer's position to its end."""
    source = reader.source
    progress = Progress("tokenizing", source.num_bytes)
    if complete := sum(writer.num_shards.values()):
        message = f"{complete} shards are complete from an earlier call: continuing after them"
        print(message, file=sys.stderr, flush=True)
        progress.add(0, 0, skipped_bytes=sum(writer.statistics(split).bytes for split in writer.folders))
    try:
        with one_thread(), closing(reader.batches(threads)) as batches:
            for start, tokenized in batches:
                if len(tokenized.lengths):
                    writer.add(tokenized, start)
                if throttle is not None:
                    throttle(writer.num_shards["train"])
                num_bytes = int(tokenized.counts[:, 1].sum(dtype=np.int64))
                progress.add(len(tokenized.lengths), num_bytes, len(tokenized.tokens))
    finally:
        progress.close()
    report = reader.report
    report.documents = writer.position.documents
    require_documents(source, report)
    if "train" in writer.folders and not writer.statistics("train").seen:
        writer.clear()  # the remedy is another setting: nothing must be in its way
        raise UserError(
            f"all {report.documents:,} documents are for validation, none is for training",
            key="data.eval_samples" if reader.samples else "data.validation_fraction",
            hint="Lower it.",
            code="no_training_documents",
        )
    writer.finish(report, tokenizer)


class DocumentReader:
    """Reads documents from a position on; the first `samples` of the source are for validation.

    Attributes:
        report: what was skipped in the source, from its start to where it was read.
    """

    def __init__(self, source: Source, tokenizer: Tokenizer, start: SourcePosition, samples: int):
        self.source, self.tokenizer, self.start, self.samples = source, tokenizer, start, samples

    @property
    def report(self) -> ReadStats:  # noqa: D102, see above
        return _add_skipped(self.start, self.source.report)

    def batches(self, threads: int) -> Iterator[tuple[SourcePosition, Tokenized]]:
        """Yields the documents in batches, each with the place of its first document."""
        backend = self.tokenizer.text_backend
        batches = _batches(self.source, self.start, self.samples)
        results = in_order(lambda batch: _tokenize(batch.documents, backend, self.tokenizer), batches, threads)
        with closing(results):
            for batch, tokenized in results:
                tokenized.splits = np.array(batch.splits)
                yield batch.start, tokenized


def _batches(source: Source, start: SourcePosition, samples: int) -> Iterator[Batch]:
    """Yields the documents after `start`.

    Batches end at the same documents wherever reading begins, and a position is asked for at their ends alone.
    """
    place = replace(start, skip=0, documents=start.documents - start.skip)  # of the beginning of the batch
    to_skip, read, characters, documents, splits = start.skip, 0, 0, [], []
    for document in source if start.position is None else source.read(start.position):
        content = _encode(document)
        read += 1
        characters += len(document.text)
        if read > to_skip:
            is_validation = place.documents + read <= samples or _hash(content) < start.validation_limit
            documents.append((document.text, len(content)))
            splits.append(int(is_validation))
        if characters >= BATCH_CHARACTERS:
            position = source.position() if hasattr(source, "position") else None
            yield Batch(place.after(min(to_skip, read)), documents, splits)
            if position is None:
                place = place.after(read)
            else:
                report = _add_skipped(start, source.report)
                place = SourcePosition(
                    position, 0, place.documents + read, report.skipped, report.examples, start.validation_limit
                )
            to_skip, read, characters, documents, splits = max(0, to_skip - read), 0, 0, [], []
    yield Batch(place.after(min(to_skip, read)), documents, splits)


def _add_skipped(start: SourcePosition, report: ReadStats) -> ReadStats:
    """The records that a source skipped, before `start` and since."""
    skipped = ReadStats(skipped=dict(start.skipped), examples={key: list(some) for key, some in start.examples.items()})
    for reason, count in report.skipped.items():
        skipped.skipped[reason] = skipped.skipped.get(reason, 0) + count
        examples = skipped.examples.setdefault(reason, [])
        examples += report.examples[reason][: EXAMPLES_PER_REASON - len(examples)]
    return skipped


def _tokenize(documents: list[tuple[str, int]], backend: Any, tokenizer: Tokenizer) -> Tokenized:
    dtype = token_dtype(tokenizer)
    ids = [encoding.ids for encoding in backend.encode_batch_fast([text for text, _ in documents])]
    around = backend.num_special_tokens_to_add(is_pair=False)
    ids = [one if len(one) > around else [] for one in ids]
    lengths = np.array([len(one) for one in ids], np.int64)
    tokens = np.concatenate([np.array(one, dtype) for one in ids] or [np.empty(0, dtype)])
    rows = [(len(text), num_bytes, 0, tokenizer.count_special_names(text)) for text, num_bytes in documents]
    counts = np.array(rows, np.int64).reshape(-1, 4)
    if tokenizer.unknown_id is not None:
        before = np.concatenate([[0], np.cumsum(tokens == tokenizer.unknown_id)])[
            np.concatenate([[0], np.cumsum(lengths)])
        ]
        counts[:, 2] = np.diff(before)
    columns = tokenizer.domain.columns(tokens, lengths) if tokenizer.domain is not None else {}
    return Tokenized(tokens, lengths, counts, columns=columns)


def num_threads(tokenizer_threads: int | None) -> int:
    """Return the number of threads that tokenize; None: one per core.

    Raises:
        UserError: it is negative.
    """
    if tokenizer_threads is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if tokenizer_threads < 0:
        hint = "Set 0 or more, or null for one per core."
        raise UserError(f"{tokenizer_threads} is negative", key="data.tokenizer_threads", hint=hint)
    return tokenizer_threads


def in_order(work: Callable[[Any], Any], items: Iterator[Any], threads: int) -> Iterator[tuple[Any, Any]]:
    """Yield every item with `work(item)`, in order; `threads` threads work ahead on a bounded number of items."""
    if threads == 0:
        for item in items:
            yield item, work(item)
        return
    pool = ThreadPoolExecutor(threads)
    try:
        ahead: deque = deque()
        for item in items:
            ahead.append((item, pool.submit(work, item)))
            if len(ahead) > 2 * threads:
                done, future = ahead.popleft()
                yield done, future.result()
        for done, future in ahead:
            yield done, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _same_settings(folder: Path, settings: dict[str, Any]) -> bool:
    """Return whether the folder holds a corpus with these settings, complete or not; False where it holds none.

    Raises:
        UserError: it holds one with other settings (code `other_corpus`).
    """
    file = folder / SETTINGS_FILE
    if not any(folder.glob("*/shard-*.safetensors")):
        return False
    try:
        made_with = dict(json.loads(file.read_text("utf-8")))
    except FileNotFoundError:
        problem = f"{folder} holds shards, but no {SETTINGS_FILE} that says what they were made from"
        raise UserError(problem, key="data.corpus_dir", hint="Give another folder.", code="corrupt_corpus") from None
    except (OSError, ValueError, TypeError) as error:
        hint = f"Delete {folder} to build the corpus again."
        raise UserError(f"{file} cannot be read ({error})", hint=hint, code="corrupt_corpus") from error
    differ = [key for key, value in settings.items() if made_with.get(key) != value]
    if differ:
        lines = [f"{key}: {made_with.get(key)} saved, {settings[key]} current" for key in differ]
        if "source" in differ or ("validation" in differ and "source" in settings["validation"]):
            lines.append("(a source changes with the content and order of its files, and with how they are read)")
        hint = f"Give another folder, or delete {folder}."
        saved = dict(made_with.get("validation") or {})
        if differ == ["validation"] and "fraction" in saved and saved.keys() == settings["validation"].keys():
            hint = f"Set data.validation_fraction={saved['fraction']}, or give another folder."
        raise UserError(
            "\n  ".join([f"{folder} holds a corpus that was built from something else:", *lines]),
            key="data.corpus_dir",
            hint=hint,
            code="other_corpus",
        )
    return True


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from building in the same folder."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        locks = lock_folder(folder, wait=True)
    try:
        yield
    finally:
        for lock in locks:
            lock.close()
