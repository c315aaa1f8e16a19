"""`import_documents`: files of several sources become shards of JSON lines and a manifest.

1. The files of every source are listed in order. Processes convert them ahead, a bounded number of files; results are
   taken in the order of the files.
2. The next document is one of the source that has the fewest tokens so far, so that all sources have equal shares when
   a target for all of them ends the work. A source ends with its files, or with the document that reaches its own
   target.
3. Documents are collected until a shard is full. It is written under a temporary name and renamed; then the position in
   every source is saved, so that an interrupted call continues after its last shard.
4. `manifest.json` is written last.

Which documents are written, and in which shards, follows from the files and the arguments alone.
"""

import json
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pyarrow
import xxhash

from torchrecipes.atomic_write import check_writable, write_atomically
from torchrecipes.config.suggest import did_you_mean
from torchrecipes.data.converting.convert_file import ConvertedFile, ImportedDocument, convert_file, merge
from torchrecipes.data.converting.find_inputs import InputFile, find_inputs
from torchrecipes.data.converting.manifest import ESTIMATE, UNKNOWN, SourceCounts, describe_source, skipped_lines
from torchrecipes.data.progress import Progress
from torchrecipes.data.sources.records import ReadStats
from torchrecipes.data.tokenizers import load_tokenizer
from torchrecipes.errors import UserError
from torchrecipes.file_lock import lock_folder

FORMAT = "torchrecipes-import-1"
MANIFEST = "manifest.json"
POSITIONS = ".positions.json"  # of a call that has not ended
BATCH_FILES, BATCH_BYTES = 32, 1 << 20  # converted by one process at a time
TEXT_FORMATS = "text", "markdown", "rst", "html"


def import_documents(
    output: str | Path,
    sources: Mapping[str, Sequence[str]],
    *,
    target_tokens: int | None = None,
    targets: Mapping[str, int] | None = None,
    tokenizer: str | None = None,
    licenses: Mapping[str, str] | None = None,
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
    shuffle: bool = False,
    text_column: str = "text",
    text_format: str = "text",
    max_file_mb: float = 16.0,
    time_limit: float = 60.0,
    shard_mb: float = 64.0,
    workers: int | None = None,
) -> dict[str, Any]:
    """Converts files into documents and writes them to `output`, or continues an interrupted call with equal arguments.

    Args:
        output: a folder, made if missing; `torchrecipes.data.sources.files` reads it.
        sources: name -> files and folders: Markdown, reStructuredText, HTML, plain text, source code, JSON lines,
            tables.
        target_tokens: tokens of all sources after which to stop, with the document that reaches them. None: no limit.
        targets: the same for some sources, by their names.
        tokenizer: a folder or file that `load_tokenizer` reads, which counts tokens, special ones included. None: a
            quarter of the characters of a document, rounded up.
        licenses: SPDX expressions by source, in place of what the files say; the name `*` is for all.
        exclude: patterns of files to skip, as in a .gitignore file.
        include: patterns of files to take; none: all.
        shuffle: take the files in the order of a hash of their names, so that a target takes a sample of them and not
            the first.
        text_column: of JSON lines and tables: the key of the text.
        text_format: of JSON lines and tables: what their texts are: text, markdown, rst or html.
        max_file_mb: larger files (10^6 bytes) are skipped, other than JSON lines and tables.
        time_limit: seconds for one file, after which it is skipped; 0: none.
        shard_mb: size of a shard (10^6 bytes, before compression).
        workers: processes that convert. 0: this one; None: one per core.

    Returns:
        The manifest.

    Raises:
        UserError: no such file, no documents (code `no_documents`), an invalid argument, a missing package; `output`
            holds something else (`other_import`) or cannot be written (`not_writable`).
    """
    targets, licenses, output = dict(targets or {}), dict(licenses or {}), Path(output)
    _check_names(sources, targets, "--target")
    _check_names(sources, [name for name in licenses if name != "*"], "--license")
    if text_format not in TEXT_FORMATS:
        hint = did_you_mean(text_format, TEXT_FORMATS, "Valid values")
        raise UserError(f"'{text_format}' is no format", key="--text-format", hint=hint, code="invalid_value")
    options = {"text_column": text_column, "text_format": text_format, "time_limit": time_limit}
    files, skipped, license_files = {}, {}, {}
    for name, paths in sources.items():
        found = find_inputs(paths, exclude, include, round(max_file_mb * 1e6), shuffle)
        files[name], skipped[name], license_files[name] = found
    settings = {
        "sources": {name: _fingerprint(files[name]) for name in sources},
        "tokens": _tokenizer(tokenizer).fingerprint if tokenizer else ESTIMATE,
        "target_tokens": target_tokens,
        "targets": targets,
        "licenses": licenses,
        "shard_mb": shard_mb,
        **options,
    }
    check_writable(output, key="--output")
    output.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        for file in lock_folder(output):
            stack.enter_context(file)
        if (manifest := _read(output, MANIFEST, settings)) is not None:
            print(f"{output} is complete already", file=sys.stderr, flush=True)
            return manifest
        saved = _read(output, POSITIONS, settings)
        if saved is None:
            counts = {name: SourceCounts() for name in sources}
            for name, records in skipped.items():
                stats = ReadStats(skipped=counts[name].skipped, examples=counts[name].examples)
                for record in records:
                    stats.add(record)
            shards = []
        else:
            counts = {name: SourceCounts(**saved["counts"][name]) for name in sources}
            shards = saved["shards"]
            print(f"{len(shards)} shards are complete: continuing after them", file=sys.stderr, flush=True)
        writer = _Shards(output, settings, counts, shards)
        pool = _pool(stack, workers)
        try:
            _take(files, counts, writer, pool, tokenizer, options, target_tokens, targets, licenses)
        except KeyboardInterrupt:
            print(
                f"\nInterrupted. {len(shards)} complete shards are kept in {output}; run the same command to continue.",
                file=sys.stderr,
                flush=True,
            )
            raise
        total = sum(count.documents for count in counts.values())
        if not total:
            lines = [f"no documents in {', '.join(sources)}"]
            lines += [f"{name}: {line}" for name, count in counts.items() for line in skipped_lines(count)]
            raise UserError("\n  ".join(lines), key="--source", code="no_documents")
        writer.write()
        manifest = {
            "format": FORMAT,
            "settings": settings,
            "documents": total,
            "characters": sum(count.characters for count in counts.values()),
            "tokens": sum(count.tokens for count in counts.values()),
            "sources": {
                name: describe_source(count, sources[name], license_files[name], len(files[name]), targets.get(name))
                for name, count in counts.items()
            },
            "shards": shards,
        }
        write_atomically(output / MANIFEST, [_to_json(manifest)])
        for name in (POSITIONS, ".lock"):  # complete: nobody has to wait for anything
            (output / name).unlink(missing_ok=True)
        return manifest


def _take(
    files: dict[str, list[InputFile]],
    counts: dict[str, SourceCounts],
    writer: "_Shards",
    pool: ProcessPoolExecutor | None,
    tokenizer: str | None,
    options: dict[str, Any],
    target_tokens: int | None,
    targets: dict[str, int],
    licenses: dict[str, str],
) -> None:
    """Takes documents of the sources in turn until they or their targets end."""
    progress = Progress("importing", sum(file.size for found in files.values() for file in found))
    progress.add(0, 0, skipped_bytes=sum(count.input_bytes for count in counts.values()))
    streams = {
        name: _documents(_converted(found[counts[name].file :], pool, tokenizer, options), counts[name], progress)
        for name, found in files.items()
    }
    try:
        total = sum(count.tokens for count in counts.values())
        active = [name for name in files if name not in targets or counts[name].tokens < targets[name]]
        while active and (target_tokens is None or total < target_tokens):
            name = min(active, key=lambda name: counts[name].tokens)
            count = counts[name]
            document, tokens = next(streams[name], (None, 0))
            if document is None:
                active.remove(name)
                continue
            license = licenses.get(name, licenses.get("*", document.license))
            language = document.language
            total += tokens
            count.documents += 1
            count.characters += len(document.text)
            count.tokens += tokens
            count.licenses[license or UNKNOWN] = count.licenses.get(license or UNKNOWN, 0) + 1
            if language:
                count.languages[language] = count.languages.get(language, 0) + 1
            progress.add(1, 0, tokens)
            writer.add(
                {"text": document.text, "source": f"{name}/{document.source}", "license": license, "language": language}
            )
            if name in targets and count.tokens >= targets[name]:
                active.remove(name)
    finally:
        progress.close()


def _documents(
    converted: Iterator[tuple[InputFile, ConvertedFile, list[int]]], count: SourceCounts, progress: Progress
) -> Iterator[tuple[ImportedDocument, int]]:
    """Yields documents with their tokens, after the position in `count`, and moves it."""
    for file, (documents, skipped, digest), tokens in converted:
        if not count.taken:  # else an earlier call began the file
            merge(ReadStats(skipped=count.skipped, examples=count.examples), skipped)
            if documents:
                count.inputs += 1
                count.input_bytes += file.size
                described = f"{count.inputs_xxh3}\n{file.name}\n{digest}"
                count.inputs_xxh3 = xxhash.xxh3_128_hexdigest(described.encode())
        for document, length in zip(documents[count.taken :], tokens[count.taken :], strict=True):
            count.taken += 1
            yield document, length
        progress.add(0, file.size)
        count.file += 1
        count.taken = 0


def _converted(
    files: Sequence[InputFile], pool: ProcessPoolExecutor | None, tokenizer: str | None, options: dict[str, Any]
) -> Iterator[tuple[InputFile, ConvertedFile, list[int]]]:
    """Yields every file with its documents and their tokens, in order; the pool works ahead on a bounded number."""
    if pool is None:
        for file in files:
            yield file, *_convert_batch([file], tokenizer, options)[0]
        return
    ahead: deque = deque()
    for batch in _batches(files):
        ahead.append((batch, pool.submit(_convert_batch, batch, tokenizer, options)))
        if len(ahead) > 2 * pool._max_workers:
            done, future = ahead.popleft()
            for file, result in zip(done, future.result(), strict=True):
                yield file, *result
    for done, future in ahead:
        for file, result in zip(done, future.result(), strict=True):
            yield file, *result


def _batches(files: Sequence[InputFile]) -> Iterator[list[InputFile]]:
    batch, size = [], 0
    for file in files:
        batch.append(file)
        size += file.size
        if len(batch) == BATCH_FILES or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _convert_batch(
    files: list[InputFile], tokenizer: str | None, options: dict[str, Any]
) -> list[tuple[ConvertedFile, list[int]]]:
    results = []
    for file in files:
        converted = convert_file(file, **options)
        texts = [document.text for document in converted.documents]
        if tokenizer and texts:
            tokens = [len(encoding.ids) for encoding in _tokenizer(tokenizer).text_backend.encode_batch_fast(texts)]
        else:
            tokens = [-(-len(text) // 4) for text in texts]
        results.append((converted, tokens))
    return results


@cache
def _tokenizer(path: str) -> Any:
    # Only its lengths are used, so that it does not matter which special tokens it has for which model.
    try:
        return load_tokenizer(path, required=())
    except UserError as error:
        raise UserError(error.problem, key="--tokenizer", hint=error.hint, code=error.code) from None


def _pool(stack: ExitStack, workers: int | None) -> ProcessPoolExecutor | None:
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers == 0:
        return None
    # A fork shares the libraries that this process has loaded, torch among them, which take seconds to import.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pool = ProcessPoolExecutor(workers, context, initializer=_begin_worker)
    stack.callback(pool.shutdown, cancel_futures=True)
    return pool


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends it

    def end_with_parent() -> None:  # which may be killed
        wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


class _Shards:
    """Collects rows and writes shards, each with the positions after it."""

    def __init__(
        self, folder: Path, settings: dict[str, Any], counts: dict[str, SourceCounts], shards: list[dict[str, Any]]
    ):
        self.folder, self.settings, self.counts, self.shards = folder, settings, counts, shards
        self.codec = pyarrow.Codec("zstd", compression_level=3)
        self.rows: list[bytes] = []
        self.size = 0
        for leftover in [*folder.glob(".*.tmp"), *folder.glob("documents-*.jsonl.zst")]:
            if leftover.name not in {shard["file"] for shard in shards}:  # of a process that was killed
                leftover.unlink()

    def add(self, row: dict[str, Any]) -> None:
        """Adds a row; writes the shard that is full with it."""
        self.rows.append(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self.size += len(self.rows[-1])
        if self.size >= self.settings["shard_mb"] * 1e6:
            self.write()

    def write(self) -> None:
        """Writes the rows that are there as a shard."""
        if not self.rows:
            return
        name = f"documents-{len(self.shards):05d}.jsonl.zst"
        content = self.codec.compress(b"".join(self.rows), asbytes=True)
        write_atomically(self.folder / name, [content])
        digest = xxhash.xxh3_128_hexdigest(content)
        described = {
            "file": name,
            "documents": len(self.rows),
            "bytes": self.size,
            "size": len(content),
            "xxh3": digest,
        }
        self.shards.append(described)
        counts = {name: asdict(count) for name, count in self.counts.items()}
        saved = {"settings": self.settings, "counts": counts, "shards": self.shards}
        write_atomically(self.folder / POSITIONS, [_to_json(saved)])
        self.rows, self.size = [], 0


def _read(folder: Path, name: str, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Reads a file of an earlier call with these settings; None where there is none.

    Raises:
        UserError: it is of another call (code `other_import`).
    """
    hint = f"Give another folder, or delete {folder}."
    try:
        content = json.loads((folder / name).read_text("utf-8"))
        differ = [key for key, value in settings.items() if content["settings"].get(key) != value]
    except FileNotFoundError:
        if name == POSITIONS and (others := sorted(folder.glob("[!.]*"))):
            interrupted = all(path.name.startswith("documents-") for path in others)
            if not interrupted:
                problem = f"{folder} holds something else: {others[0].name}"
                raise UserError(problem, key="--output", hint=hint, code="other_import") from None
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / name} cannot be read ({error})", hint=hint, code="other_import") from error
    if differ:
        what = "what files are there, or what they are," if differ == ["sources"] else ", ".join(differ)
        problem = f"{folder} holds an import of other settings: {what} changed"
        raise UserError(problem, key="--output", hint=hint, code="other_import")
    return content


def _fingerprint(files: Sequence[InputFile]) -> str:
    digest = xxhash.xxh3_128()
    for file in files:
        digest.update(f"{file.name}\n{file.size}\n{file.modified_ns}\n{file.license}\n".encode())
    return digest.hexdigest()


def _check_names(sources: Mapping[str, Any], names: Sequence[str] | Mapping[str, Any], option: str) -> None:
    for name in names:
        if name not in sources:
            hint = did_you_mean(name, list(sources), "The sources are")
            raise UserError(f"there is no source '{name}'", key=option, hint=hint, code="no_such_source")


def _to_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
