"""Opens corpora that other tools have tokenized (`sources/tokenized.py`) as a `Corpus`.

1. `prepare_tokenized` reads all tokens once: their largest must be an id of the tokenizer. It writes a `corpus.json`
   whose shards name the files where they lie, and the starts of documents, which every tool keeps in its own form.
2. Documents become `eos text`, as those that are tokenized here: whether a tool puts eos before or after a text, the
   token begins the document that follows.
3. MDS has other bytes between the tokens: its tokens are copied into shards.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from torchrecipes.atomic_write import write_atomically
from torchrecipes.data.corpus.shard_writer import CORPUS_FILE, to_json, writing
from torchrecipes.data.corpus.shards import FORMAT, Shard, Statistics, checksums, shard_name, write_shard
from torchrecipes.data.progress import Progress
from torchrecipes.data.sources.records import content_checksum
from torchrecipes.data.sources.tokenized import tokenized
from torchrecipes.data.tokenizers.tokenizer import Tokenizer
from torchrecipes.errors import UserError

CHUNK = 1 << 24  # tokens that are looked at together


def prepare_tokenized(folder: Path, source: tokenized, tokenizer: Tokenizer, settings: dict[str, Any]) -> None:
    """Writes what a `Corpus` in `folder/train`, and one in `folder/validation` where there are samples for it, needs.

    Args:
        folder: as for `prepare_corpus`.
        source: the corpus.
        tokenizer: the one it was made with.
        settings: what `corpus_settings` gave.

    Raises:
        UserError: an id that the tokenizer does not have (code `other_tokenizer`), a fraction to be held out
            (`no_text`), fewer documents than samples (`no_training_documents`), or files that are not in the format.
    """
    if settings["validation"].get("fraction"):
        raise UserError(
            f"{source.path} is tokenized already, so no fraction of its texts can be chosen for validation",
            key="data.validation_fraction",
            hint="Set it to 0, and data.eval_samples to a number of documents or data.eval_split to another split; or "
            "name a text with data.eval_sets; or set eval_every=null.",
            code="no_text",
        )
    eos_id = tokenizer.eos_id if source.eos_id is None else source.eos_id
    progress = Progress("reading tokens", source.num_bytes)
    samples = settings["validation"].get("samples", 0)
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}
    totals = {split: Statistics() for split in parts}
    left = source.max_documents
    try:
        with writing(folder):
            for split in parts:
                (folder / split).mkdir(parents=True, exist_ok=True)
        for tokens, offsets, place in _read(source, eos_id, tokenizer, progress):
            if left is not None:
                offsets, left = offsets[: left + 1], left - min(left, len(offsets) - 1)
            first = min(samples - totals["validation"].documents, len(offsets) - 1)
            for split, own in (("validation", offsets[: first + 1]), ("train", offsets[first:])):
                if len(own) > 1:
                    shard = len(parts[split])
                    write = _reference if place else _copy
                    with writing(folder):
                        parts[split].append(write(folder / split, shard, tokens, own, place, settings))
                    totals[split] += _statistics(own)
            if left == 0:
                break
    finally:
        progress.close()
    if not parts["train"]:
        problem = f"{source.path} holds {totals['validation'].documents:,} documents, all of them for validation"
        raise UserError(problem, key="data.eval_samples", hint="Lower it.", code="no_training_documents")
    for split, shards in parts.items():
        if shards:
            account = {
                "format": FORMAT,
                "split": split,
                "tokenizer": {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
                "settings": settings,
                "statistics": asdict(totals[split]),
                "skipped": [],
                "shards": shards,
            }
            with writing(folder):
                write_atomically(folder / split / CORPUS_FILE, [to_json(account)])


def open_reference(folder: Path, stated: dict[str, Any], token_offset: int, document_offset: int) -> Shard:
    """Maps the tokens that a `corpus.json` names, and the starts of their documents.

    Raises:
        OSError, ValueError, KeyError: a file is missing or has another size.
    """
    path = Path(stated["file"])
    content = np.memmap(path, np.uint8, "r")
    tokens = np.ndarray(stated["tokens"], np.dtype(stated["reference"]["dtype"]), content, stated["reference"]["byte"])
    offsets = np.load(folder / stated["reference"]["documents"], mmap_mode="r")
    return Shard(path, token_offset, document_offset, tokens, np.asarray(offsets))


def check_reference(stated: dict[str, Any]) -> bool:
    """Returns whether the file that a `corpus.json` names is the one that it was."""
    return content_checksum(stated["file"]) == stated["xxh3"]


def _read(source: tokenized, eos_id: int | None, tokenizer: Tokenizer, progress: Progress):
    """Yield tokens, the starts of documents and the end, and the file where they lie, or None to copy them."""
    if source.format == "mds":
        for documents in source.copied():
            tokens = np.concatenate([document.reshape(-1) for document in documents])
            ends = np.cumsum([document.size for document in documents])
            yield tokens, _starts(source, tokens, ends, eos_id, tokenizer, progress), None
        return
    for file in source.files():
        tokens = file.tokens()
        yield tokens, _starts(source, tokens, file.ends, eos_id, tokenizer, progress), file


def _starts(
    source: tokenized,
    tokens: np.ndarray,
    ends: np.ndarray | None,
    eos_id: int | None,
    tokenizer: Tokenizer,
    progress: Progress,
) -> np.ndarray:
    """Checks the ids; returns the positions at which documents start, and the end, int64."""
    is_split = ends is None or source.format == "mds"
    found = []
    for start in range(0, len(tokens), CHUNK):
        chunk = tokens[start : start + CHUNK]
        largest, smallest = int(chunk.max()), int(chunk.min())
        if largest >= tokenizer.vocab_size or smallest < 0:
            raise UserError(
                f"{source.path} holds the token {largest if smallest >= 0 else smallest}, and the tokenizer has the "
                f"ids 0 to {tokenizer.vocab_size - 1}",
                key="tokenizer",
                hint="Load the tokenizer that the corpus was made with, or check dtype.",
                code="other_tokenizer",
            )
        if is_split and eos_id is not None:
            found.append(np.flatnonzero(chunk == eos_id) + start)
        progress.add(0, chunk.nbytes, len(chunk))
    length = len(tokens)
    starts = np.zeros(1, np.int64)
    if ends is not None:
        starts = np.concatenate([starts, ends[:-1]]).astype(np.int64)
        if eos_id is not None:
            inside = (starts > 0) & (starts < length)
            before = tokens[np.maximum(starts - 1, 0)] == eos_id
            at = tokens[np.minimum(starts, length - 1)] == eos_id
            starts = starts - (inside & before & ~at)
    if found:
        marks = np.concatenate(found)
        last_of_run = np.append(marks[1:] != marks[:-1] + 1, True)  # between two of them there is no text
        starts = np.concatenate([starts, marks[last_of_run & (marks < length - 1)]])
    starts = np.unique(starts)
    return np.append(starts[starts < length], length)


def _reference(folder: Path, number: int, tokens: np.ndarray, offsets: np.ndarray, file: Any, _: Any) -> dict[str, Any]:
    name = f"documents-{number:05d}.npy"
    temporary = folder / f".{name}.tmp"
    with temporary.open("wb") as target:
        np.save(target, offsets - offsets[0])
    temporary.rename(folder / name)
    path = file.path.absolute()
    checksum = content_checksum(path)
    byte = file.byte + int(offsets[0]) * tokens.itemsize
    return {
        "file": str(path),
        "size": path.stat().st_size,
        "xxh3": checksum,
        "arrays_xxh3": f"{checksum}-{byte}-{content_checksum(folder / name)}",
        "tokens": int(offsets[-1] - offsets[0]),
        "documents": len(offsets) - 1,
        "reference": {"dtype": tokens.dtype.str, "byte": byte, "documents": name},
    }


def _copy(
    folder: Path, number: int, tokens: np.ndarray, offsets: np.ndarray, _: None, settings: dict[str, Any]
) -> dict[str, Any]:
    path = folder / shard_name(number)
    own = tokens[offsets[0] : offsets[-1]].astype(settings["dtype"])
    write_shard(path, [own], offsets - offsets[0], {"source": settings["source"]})
    whole, arrays = checksums(path)
    counts = {"tokens": len(own), "documents": len(offsets) - 1}
    return {"file": path.name, "size": path.stat().st_size, "xxh3": whole, "arrays_xxh3": arrays, **counts}


def _statistics(offsets: np.ndarray) -> Statistics:
    lengths = np.diff(offsets)
    return Statistics(
        seen=len(lengths),
        documents=len(lengths),
        tokens=int(lengths.sum()),
        shortest=int(lengths.min()),
        longest=int(lengths.max()),
    )
