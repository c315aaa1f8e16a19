"""How a corpus is made: documents in, shards out.

1. This thread reads documents, decides by a hash of the text which split each belongs to, and gathers batches.
2. Other threads tokenize the batches (tokenizers works outside of Python's lock, so threads do what processes would,
   without copies of the text). Results are taken in the order of the batches.
3. The tokens of a split are gathered until a shard is full. It is written under a temporary name and renamed.
4. `corpus.json` is written last. What is there when the work is interrupted is a number of whole shards; the next call
   reads the source from its start, passes the documents that these shards hold, and goes on.

Where a shard ends depends on the documents alone, so the files are the same however the work was done.
"""

import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from torchrecipes.atomic_write import write_atomically
from torchrecipes.data.corpus.shard_writer import CORPUS_FILE, SplitWriter, Tokenized, to_json, writing
from torchrecipes.data.corpus.shards import FORMAT
from torchrecipes.data.progress import Progress
from torchrecipes.data.sources.records import ReadStats, Source, require_documents
from torchrecipes.data.tokenizers.tokenizer import Tokenizer, one_thread
from torchrecipes.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: two runs must not prepare the same folder at once
    fcntl = None

SETTINGS_FILE = "prepare.json"
BATCH_CHARACTERS = 1 << 17  # tokenized at a time by one thread: the objects of tokenizers take 100 times as many bytes


def prepare(
    folder: Path,
    source: Source,
    tokenizer: Tokenizer,
    validation_fraction: float,
    validation_source: Source | None,
    num_workers: int | None,
    shard_tokens: int,
) -> bool:
    """Makes what is missing of the corpora `folder/train` and `folder/validation`. Arguments: see `prepare_corpus`.

    Returns:
        Whether anything was missing.
    """
    if not 0 <= validation_fraction < 1:
        raise UserError(
            f"data.validation_fraction is {validation_fraction}; it is a share of the documents, from 0 to below 1."
        )
    if shard_tokens < 1 or (num_workers is not None and num_workers < 0):
        raise UserError(
            f"shard_tokens={shard_tokens}, num_workers={num_workers}: the first is 1 or more, the other 0 or more."
        )
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
            return False  # another process was at it while this one waited
        if num_workers is None:
            num_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        writers = {split: SplitWriter(folder / split, split, settings) for split in splits}
        if validation_source is None:
            limit = int(validation_fraction * 2**64)

            def split_of(text: bytes) -> str:
                return "validation" if xxhash.xxh3_64_intdigest(text) < limit else "train"

            _tokenize_source(source, tokenizer, writers, split_of, num_workers)
        else:
            _tokenize_source(source, tokenizer, {"train": writers["train"]}, lambda _: "train", num_workers)
            validation_writer = {"validation": writers["validation"]}
            _tokenize_source(validation_source, tokenizer, validation_writer, lambda _: "validation", num_workers)
    return True


@dataclass
class Batch:
    """Documents as they were read, by split."""

    texts: dict[str, list[str]]
    bytes: dict[str, list[int]]
    num_characters: int = 0
    passed_bytes: int = 0  # of documents that are in shards already

    def add(self, split: str, text: str, num_bytes: int) -> None:
        """Adds a document of `num_bytes` bytes of UTF-8."""
        self.texts[split].append(text)
        self.bytes[split].append(num_bytes)
        self.num_characters += len(text)


def _tokenize_source(
    source: Source,
    tokenizer: Tokenizer,
    writers: dict[str, SplitWriter],
    split_of: Callable[[bytes], str],
    num_workers: int,
) -> None:
    """Reads a source to its end, and finishes `writers`, the splits that its documents go to."""
    if all(writer.finished for writer in writers.values()):
        return
    done = sum(len(writer.shards) for writer in writers.values())
    if done:
        print(f"{done} shards are complete from an earlier call: going on behind them", file=sys.stderr, flush=True)
    progress = Progress("tokenizing", source.num_bytes)
    backend = tokenizer.text_backend

    def tokenize(batch: Batch) -> dict[str, Tokenized]:
        return {
            split: _tokenize(texts, batch.bytes[split], backend, tokenizer.unknown_id, writers[split].dtype)
            for split, texts in batch.texts.items()
            if texts
        }

    try:
        results = _in_order(tokenize, _batches(source, writers, split_of), num_workers)
        with one_thread(), closing(results):
            for batch, result in results:
                for split, tokenized in result.items():
                    writers[split].add(tokenized)
                    progress.add(len(tokenized.lengths), int(tokenized.bytes.sum()), len(tokenized.tokens))
                progress.add(0, 0, skipped_bytes=batch.passed_bytes)
    finally:
        progress.close()
    report = source.report
    require_documents(source, report)
    for split, writer in writers.items():
        if not writer.seen and not writer.current.seen and not writer.finished:
            for each in writers.values():  # the remedy is another setting: nothing must be in its way
                each.clear()
            raise UserError(_none_for(split, report.documents))
    for split, writer in writers.items():
        if not writer.finished:
            # What a source leaves out is told once.
            writer.finish(ReadStats() if split == "validation" and len(writers) > 1 else report, tokenizer)


def _none_for(split: str, documents: int) -> str:
    """That no document is for a split, and what to do about it."""
    instead = "give data.validation_source, or train without validation: data.validation_fraction=0 eval_every=null."
    if documents <= 2:  # no share of so few is likely to give both splits one
        return f"there is no document for {split} among {documents}, too few to draw from: {instead}"
    share = f"higher ({max(0.1, min(0.5, 3 / documents)):.1g} is good for so few)" if split == "validation" else "lower"
    return (
        f"none of the {documents:,} documents is for {split}: they are drawn with the probability "
        f"data.validation_fraction by a hash of the text. Set it {share}, {instead}"
    )


def _batches(source: Source, writers: dict[str, SplitWriter], split_of: Callable[[bytes], str]) -> Iterator[Batch]:
    to_pass = {split: sys.maxsize if writer.finished else writer.seen for split, writer in writers.items()}

    def new() -> Batch:
        return Batch({split: [] for split in writers}, {split: [] for split in writers})

    batch = new()
    for document in source:
        try:
            content = document.text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"{document.source}: not text that can be encoded ({error}). Repair or remove it."
            ) from error
        split = split_of(content)
        if to_pass[split]:
            to_pass[split] -= 1
            batch.passed_bytes += len(content)
        else:
            batch.add(split, document.text, len(content))
        if batch.num_characters >= BATCH_CHARACTERS or batch.passed_bytes >= 64 * BATCH_CHARACTERS:
            yield batch
            batch = new()
    yield batch


def _tokenize(
    texts: list[str], num_bytes: list[int], backend: Any, unknown_id: int | None, dtype: np.dtype
) -> Tokenized:
    ids = [encoding.ids for encoding in backend.encode_batch_fast(texts)]
    around = backend.num_special_tokens_to_add(is_pair=False)
    ids = [one if len(one) > around else [] for one in ids]
    lengths = np.array([len(one) for one in ids], np.int64)
    tokens = np.concatenate([np.array(one, dtype) for one in ids])
    if unknown_id is None:
        unknown = np.zeros(len(ids), np.int64)
    else:
        before = np.concatenate([[0], np.cumsum(tokens == unknown_id)])[np.concatenate([[0], np.cumsum(lengths)])]
        unknown = np.diff(before)
    characters = np.array([len(text) for text in texts], np.int64)
    return Tokenized(tokens, lengths, characters, np.array(num_bytes, np.int64), unknown)


def _in_order(work: Callable[[Any], Any], items: Iterator[Any], num_workers: int) -> Iterator[tuple[Any, Any]]:
    """Every item with `work(item)`, in order; `num_workers` threads work ahead, on a bounded number of items."""
    if num_workers == 0:
        for item in items:
            yield item, work(item)
        return
    pool = ThreadPoolExecutor(num_workers)
    try:
        ahead: deque = deque()
        for item in items:
            ahead.append((item, pool.submit(work, item)))
            if len(ahead) > 2 * num_workers:
                done, future = ahead.popleft()
                yield done, future.result()
        for done, future in ahead:
            yield done, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _same_settings(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder holds a corpus, complete or begun, of these settings; False where it holds none.

    Raises:
        UserError: it holds one of other settings.
    """
    file = folder / SETTINGS_FILE
    if not any(folder.glob("*/shard-*.safetensors")):
        return False
    try:
        made_with = dict(json.loads(file.read_text("utf-8")))
    except FileNotFoundError:
        raise UserError(
            f"{folder}: holds shards, but no {SETTINGS_FILE} that says of what. Choose another folder."
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file}: cannot be read ({error}). Delete {folder} to prepare the corpus again.") from error
    differ = [key for key, value in settings.items() if made_with.get(key) != value]
    if differ:
        lines = [f"{key}: {made_with.get(key)} there, {settings[key]} now" for key in differ]
        if "source" in differ or ("validation" in differ and "source" in settings["validation"]):
            lines.append("(a source changes with its files' names, sizes and times, and with how they are read)")
        raise UserError(
            "\n  ".join([f"{folder}: holds a corpus that was prepared from something else:", *lines])
            + f"\nGive this one another folder, or delete {folder}."
        )
    return True


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from preparing the same folder; the lock goes when its holder does, even when killed."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    with lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{folder}: another process prepares this corpus; waiting for it", file=sys.stderr, flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError:  # a file system without locks
                pass
        yield
