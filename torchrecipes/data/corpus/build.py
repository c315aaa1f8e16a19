"""Builds a corpus: documents in, shards out.

1. This thread reads documents, decides by a hash of the text which split each belongs to, and collects batches.
2. Other threads tokenize the batches (`tokenizers` releases Python's lock, so threads do what processes would, without
   copies of the text). Results are taken in the order of the batches.
3. The tokens of a split are collected until a shard is full. It is written under a temporary name and renamed.
4. `corpus.json` is written last. If the work is interrupted, complete shards remain; the next call reads the source
   from its start, skips the documents that these shards hold, and continues.

Where a shard ends depends on the documents alone, so the files are the same however the work was done.
"""

import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from torchrecipes.atomic_write import check_writable, write_atomically
from torchrecipes.data.corpus.shard_writer import CORPUS_FILE, SplitWriter, Tokenized, to_json, writing
from torchrecipes.data.corpus.shards import FORMAT
from torchrecipes.data.progress import Progress
from torchrecipes.data.sources.records import Document, ReadStats, Source, require_documents
from torchrecipes.data.tokenizers.tokenizer import Tokenizer, one_thread
from torchrecipes.errors import UserError
from torchrecipes.file_lock import lock_folder

SETTINGS_FILE = "prepare.json"
HASHES = 1 << 64  # number of values of a document's hash
BATCH_CHARACTERS = 1 << 17  # tokenized at a time by one thread: encodings take 100 times as many bytes


def check_corpus_dir(folder: str | Path, source: Source | None = None, validation_fraction: float = 0) -> None:
    """Checks, before a tokenizer is trained, that a corpus is in `folder` or can be built there.

    Args:
        folder: as for `prepare_corpus`.
        source: if given, it is read until there is one document for training and one for validation.
        validation_fraction: as for `prepare_corpus`.

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
                if len(hashes) > 1 or not validation_fraction:
                    return
            require_documents(source, source.report)
            raise _one_document()


def build_corpus(
    folder: Path,
    source: Source,
    tokenizer: Tokenizer,
    validation_fraction: float,
    validation_source: Source | None,
    tokenizer_threads: int | None,
    shard_tokens: int,
) -> bool:
    """Builds what is missing of the corpora `folder/train` and `folder/validation`. Arguments: see `prepare_corpus`.

    Returns:
        Whether anything was missing.
    """
    if not 0 <= validation_fraction < 1:
        hint = "Set a fraction of the documents, from 0 to below 1."
        raise UserError(f"{validation_fraction} is out of range", key="data.validation_fraction", hint=hint)
    if tokenizer_threads is not None and tokenizer_threads < 0:
        hint = "Set 0 or more, or null for one per core."
        raise UserError(f"{tokenizer_threads} is negative", key="data.tokenizer_threads", hint=hint)
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens is {shard_tokens}; it is 1 or more")
    if validation_source is not None:
        validation: dict[str, Any] = {"source": validation_source.fingerprint}
    else:
        validation = {"fraction": validation_fraction}
    settings = {
        "format": FORMAT,
        "source": source.fingerprint,
        "validation": validation,
        "tokenizer": tokenizer.fingerprint,
        "dtype": "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
        "shard_tokens": shard_tokens,
    }
    splits = ["train", "validation"] if validation_source is not None or validation_fraction else ["train"]

    def complete() -> bool:
        return all((folder / split / CORPUS_FILE).exists() for split in splits)

    if _same_settings(folder, settings) and complete():
        return False
    with _locked(folder):
        if not _same_settings(folder, settings):
            with writing(folder):
                write_atomically(folder / SETTINGS_FILE, [to_json(settings)])
        elif complete():
            return False  # another process built it while this one waited
        threads = tokenizer_threads
        if threads is None:
            threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        writers = {split: SplitWriter(folder / split, split, settings) for split in splits}
        try:
            if validation_source is None:
                limit = _validation_limit(source, validation_fraction)
                _tokenize_source(source, tokenizer, writers, limit, threads)
            else:
                _tokenize_source(source, tokenizer, {"train": writers["train"]}, 0, threads)
                validation_writer = {"validation": writers["validation"]}
                _tokenize_source(validation_source, tokenizer, validation_writer, HASHES, threads)
        except KeyboardInterrupt:
            saved = sum(len(writer.shards) for writer in writers.values())
            kept = f"{saved} complete shards are kept in {folder}; run the same command to continue after them."
            again = "No shard was complete yet; run the same command to start again."
            print(f"\nInterrupted while tokenizing. {kept if saved else again}", file=sys.stderr, flush=True)
            raise
    return True


def _validation_limit(source: Source, fraction: float) -> int:
    """Return the hash below which a document is for validation, so that at least one document is.

    Reads the source up to its first such document; where there is none, the document with the lowest hash is taken.

    Raises:
        UserError: all documents have one text (code `one_document`).
    """
    limit, lowest, highest = int(fraction * HASHES), HASHES, 0
    if not limit:
        return 0
    for document in source:
        value = _hash(_encode(document))
        if value < limit:
            return limit
        lowest, highest = min(lowest, value), max(highest, value)
    require_documents(source, source.report)
    if lowest == highest:
        raise _one_document()
    return lowest + 1


def _one_document() -> UserError:
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
    """Documents as they were read, as (text, bytes of UTF-8) by split."""

    documents: dict[str, list[tuple[str, int]]]
    skipped_bytes: int  # of documents that are in shards already


def _tokenize_source(
    source: Source, tokenizer: Tokenizer, writers: dict[str, SplitWriter], validation_limit: int, threads: int
) -> None:
    """Reads a source to its end and finishes `writers`: documents with a hash below the limit are for validation."""
    if all(writer.finished for writer in writers.values()):
        return
    done = sum(len(writer.shards) for writer in writers.values())
    if done:
        print(f"{done} shards are complete from an earlier call: continuing after them", file=sys.stderr, flush=True)
    progress = Progress("tokenizing", source.num_bytes)
    backend = tokenizer.text_backend

    def tokenize(batch: Batch) -> dict[str, Tokenized]:
        return {
            split: _tokenize(documents, backend, tokenizer.unknown_id, writers[split].dtype)
            for split, documents in batch.documents.items()
            if documents
        }

    try:
        results = _in_order(tokenize, _batches(source, writers, validation_limit), threads)
        with one_thread(), closing(results):
            for batch, result in results:
                for split, tokenized in result.items():
                    writers[split].add(tokenized)
                    progress.add(len(tokenized.lengths), int(tokenized.counts[:, 1].sum()), len(tokenized.tokens))
                progress.add(0, 0, skipped_bytes=batch.skipped_bytes)
    finally:
        progress.close()
    report = source.report
    require_documents(source, report)
    train = writers.get("train")
    if train is not None and not train.seen and not train.current.seen and not train.finished:
        for writer in writers.values():  # the remedy is another setting: nothing must be in its way
            writer.clear()
        raise UserError(
            f"all {report.documents:,} documents are for validation, none is for training",
            key="data.validation_fraction",
            hint="Lower it.",
            code="no_training_documents",
        )
    for split, writer in writers.items():
        if not writer.finished:
            # What a source skipped is reported once.
            writer.finish(ReadStats() if split == "validation" and len(writers) > 1 else report, tokenizer)


def _batches(source: Source, writers: dict[str, SplitWriter], validation_limit: int) -> Iterator[Batch]:
    to_skip = {split: sys.maxsize if writer.finished else writer.seen for split, writer in writers.items()}
    documents, characters, skipped_bytes = {split: [] for split in writers}, 0, 0
    for document in source:
        content = _encode(document)
        split = "validation" if _hash(content) < validation_limit else "train"
        if to_skip[split]:
            to_skip[split] -= 1
            skipped_bytes += len(content)
        else:
            documents[split].append((document.text, len(content)))
            characters += len(document.text)
        if characters >= BATCH_CHARACTERS or skipped_bytes >= 64 * BATCH_CHARACTERS:
            yield Batch(documents, skipped_bytes)
            documents, characters, skipped_bytes = {split: [] for split in writers}, 0, 0
    yield Batch(documents, skipped_bytes)


def _tokenize(documents: list[tuple[str, int]], backend: Any, unknown_id: int | None, dtype: np.dtype) -> Tokenized:
    ids = [encoding.ids for encoding in backend.encode_batch_fast([text for text, _ in documents])]
    around = backend.num_special_tokens_to_add(is_pair=False)
    ids = [one if len(one) > around else [] for one in ids]
    lengths = np.array([len(one) for one in ids], np.int64)
    tokens = np.concatenate([np.array(one, dtype) for one in ids])
    counts = np.array([(len(text), num_bytes, 0) for text, num_bytes in documents], np.int64)
    if unknown_id is not None:
        before = np.concatenate([[0], np.cumsum(tokens == unknown_id)])[np.concatenate([[0], np.cumsum(lengths)])]
        counts[:, 2] = np.diff(before)
    return Tokenized(tokens, lengths, counts)


def _in_order(work: Callable[[Any], Any], items: Iterator[Any], threads: int) -> Iterator[tuple[Any, Any]]:
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
        raise UserError(
            "\n  ".join([f"{folder} holds a corpus that was built from something else:", *lines]),
            key="data.corpus_dir",
            hint=f"Give another folder, or delete {folder}.",
            code="other_corpus",
        )
    return True


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from building in the same folder."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        locks = lock_folder(folder, wait=True)
    try:
        yield
    finally:
        for lock in locks:
            lock.close()
