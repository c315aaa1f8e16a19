"""The file format of a corpus: a shard is a safetensors file with `tokens` and `document_offsets`.

`tokens` is uint8, uint16 or uint32 `[N]`; `document_offsets` is int64 `[D+1]`, from 0 to N. The header's `__metadata__`
holds what the shard was made from, its statistics, and how far the source had been read, so that an interrupted call
can be continued after the last shard.

Shards may have columns: arrays `[D]` with a number of every document, such as the public suffix of a domain name. Those
that have are of format 3, others are of format 2, which has none.
"""

import contextlib
import errno
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import xxhash

from torchrecipes.atomic_write import write_atomically
from torchrecipes.errors import UserError

try:
    import resource
except ImportError:  # Windows
    resource = None

FORMAT = "torchrecipes-corpus-2"
COLUMNS_FORMAT = "torchrecipes-corpus-3"
FORMATS = (FORMAT, COLUMNS_FORMAT)
DTYPES = {"U8": np.dtype("u1"), "U16": np.dtype("<u2"), "U32": np.dtype("<u4")}
OFFSETS = np.dtype("<i8")


@dataclass
class Statistics:
    """Counts of one shard, or of several together.

    `seen` counts the documents of the source that were read for it, `documents` those that are in it; `empty` ones
    have no token but the special ones around a document. `shortest` and `longest` are in tokens, special ones included.
    `special_names` counts the names of special tokens in the text, such as `[MASK]`.
    """

    seen: int = 0
    documents: int = 0
    empty: int = 0
    tokens: int = 0
    characters: int = 0
    bytes: int = 0
    unknown: int = 0
    special_names: int = 0
    documents_with_special_names: int = 0
    shortest: int = 0
    longest: int = 0

    def __add__(self, other: "Statistics") -> "Statistics":
        sums = {field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)}
        # Of two shards, one may have no documents and so no shortest one.
        sums["shortest"] = min(self.shortest or other.shortest, other.shortest or self.shortest)
        sums["longest"] = max(self.longest, other.longest)
        return Statistics(**sums)


@dataclass(frozen=True, eq=False)
class Shard:
    """An open shard; arrays are read-only views of the file.

    Attributes:
        path: the file.
        token_offset: global position of its first token.
        document_offset: number of documents in the shards before it.
        tokens: uint8, uint16 or uint32 `[N]`.
        document_offsets: int64 `[D+1]`, positions in `tokens`.
        columns: arrays `[D]` by name.
    """

    path: Path
    token_offset: int
    document_offset: int
    tokens: np.ndarray
    document_offsets: np.ndarray
    columns: dict[str, np.ndarray] = field(default_factory=dict)


def shard_name(index: int) -> str:
    """The file name of shard number `index`, from 0."""
    return f"shard-{index:05d}.safetensors"


def write_shard(
    path: Path,
    tokens: list[np.ndarray],
    document_offsets: np.ndarray,
    metadata: dict[str, str],
    columns: Mapping[str, list[np.ndarray]] | None = None,
) -> None:
    """Writes a shard, complete or not at all.

    Args:
        path: the file.
        tokens: arrays of one type, uint8, uint16 or uint32, whose concatenation is the shard's tokens; one at least.
        document_offsets: int64 `[D+1]`.
        metadata: for the header; a checksum of the arrays is added (`arrays_xxh3`, as `checksums` gives it).
        columns: arrays of one type, as for `tokens`, whose concatenation is a column `[D]`, by the column's name.
    """
    codes = {dtype: code for code, dtype in DTYPES.items()} | {OFFSETS: "I64"}
    parts = {"document_offsets": [document_offsets.astype(OFFSETS, copy=False)], "tokens": tokens, **(columns or {})}
    # The widest come first, so that every array is aligned.
    names = sorted(parts, key=lambda name: -parts[name][0].dtype.itemsize)
    arrays: list[memoryview] = []
    entries, end, digest = {}, 0, xxhash.xxh3_64()
    for name in names:
        dtype, start = parts[name][0].dtype, end
        own = [memoryview(array).cast("B") for array in parts[name] if array.size]
        end += sum(map(len, own))
        entries[name] = {
            "dtype": codes[dtype], "shape": [(end - start) // dtype.itemsize], "data_offsets": [start, end]
        }  # fmt: skip
        arrays += own
    for array in arrays:
        digest.update(array)
    metadata = {"format": COLUMNS_FORMAT if columns else FORMAT, **metadata, "arrays_xxh3": digest.hexdigest()}
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write_atomically(path, [struct.pack("<Q", len(text)), text, *arrays])


def open_shard(path: Path, token_offset: int, document_offset: int) -> tuple[Shard, dict[str, str]]:
    """Maps a shard into memory.

    Returns:
        The shard, and the metadata of its header.

    Raises:
        OSError, ValueError, KeyError, TypeError: there is no such file, or it is no complete shard.
        UserError: more shards are open than a process may open files (code `too_many_files`).
    """
    content = map_file(path)
    size = len(content)
    header_size = int(content[:8].view("<u8")[0]) if size >= 8 else size
    if header_size > size - 8:
        raise ValueError("its header is corrupt")
    header = json.loads(bytes(content[8 : 8 + header_size]))
    metadata = header.pop("__metadata__")
    if metadata["format"] not in FORMATS:
        raise ValueError(f"its format is none of {', '.join(FORMATS)}")
    arrays, place = {}, 8 + header_size
    # Plain arrays over the map: slices of np.memmap itself cost three times as much.
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype = OFFSETS if name == "document_offsets" else DTYPES[entry["dtype"]]
        start, end = (8 + header_size + offset for offset in entry["data_offsets"])
        (length,) = entry["shape"]
        if (start, end) != (place, place + length * dtype.itemsize) or end > size:
            raise ValueError("its size is not what its header says")
        arrays[name] = np.ndarray(length, dtype, content, start)
        place = end
    offsets, tokens = arrays.pop("document_offsets"), arrays.pop("tokens")
    if place != size or len(offsets) < 2 or any(len(column) != len(offsets) - 1 for column in arrays.values()):
        raise ValueError("its size is not what its header says")
    return Shard(path, token_offset, document_offset, tokens, offsets, arrays), metadata


def map_file(path: Path) -> np.ndarray:
    """Map a file into memory: uint8 `[size]`, read-only; raises what `open_shard` does."""
    # A map keeps its file open, and a process may usually open 1,024: as many shards as 64 billion tokens take. The
    # limit may be raised without asking, up to another one, which is rarely below 4,096.
    try:
        with path.open("rb") as file:
            if resource is not None:
                soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
                next_free = os.dup(file.fileno())
                os.close(next_free)
                if soft != hard and next_free > 0.75 * soft:
                    with contextlib.suppress(ValueError, OSError):  # where no limit is none that can be set
                        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            return np.memmap(file, np.uint8, "r")
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        problem = f"{path} cannot be opened: this process may not open more files, and every shard is one"
        hint = "Raise the limit: ulimit -n 65536, or LimitNOFILE of a service."
        raise UserError(problem, hint=hint, code="too_many_files") from error


def checksums(path: Path) -> tuple[str, str]:
    """Returns the xxh3-64 (hex) of a shard's file, and of its arrays alone, whatever its header says."""
    whole, arrays = xxhash.xxh3_64(), xxhash.xxh3_64()
    with path.open("rb") as file:
        size = file.read(8)
        whole.update(size + file.read(min(int.from_bytes(size, "little"), 1 << 20)))
        while block := file.read(1 << 22):
            whole.update(block)
            arrays.update(block)
    return whole.hexdigest(), arrays.hexdigest()
