"""`mds_tokens`: folders of MosaicML Streaming (MDS), each sample of which is a document of token ids.

A shard is the number n of samples (uint32), n + 1 places in bytes (uint32), a copy of its settings, and the samples: of
each the sizes of its columns of variable size (uint32), then its columns one after the other. `index.json` names the
shards, their columns and encodings.
"""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from torchrecipes.data.token_files.source import TokenFile, TokenSource
from torchrecipes.errors import UserError

INTEGERS = {"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"}


def mds_tokens(path: str, column: str = "tokens", dtype: str | None = None) -> TokenSource:
    """Documents in the MDS shards of a folder, uncompressed.

    Args:
        path: the folder, with `index.json`.
        column: holds the ids: bytes, or an `ndarray` of one dimension.
        dtype: of ids in a column of bytes, such as `uint16`; an `ndarray` column says its own.

    Raises:
        UserError: no such folder (code `no_such_file`) or column (`no_column`), a compressed shard or an encoding
            without integers (`unsupported_format`).
    """
    folder = Path(path).expanduser()
    try:
        index = json.loads((folder / "index.json").read_bytes())["shards"]
    except FileNotFoundError:
        raise UserError(f"there is no {folder.absolute()}/index.json", key="path", code="no_such_file") from None
    except (ValueError, KeyError, TypeError) as error:
        problem = f"{folder}/index.json cannot be read ({error})"
        raise UserError(problem, key="path", code="corrupt_corpus") from None
    layouts = [_layout(folder, shard, column, dtype) for shard in index]
    return TokenSource(str(folder), [layout["path"] for layout in layouts], partial(_read, layouts))


def _layout(folder: Path, shard: dict[str, Any], column: str, dtype: str | None) -> dict[str, Any]:
    """Where the column is in a shard: what `_read_shard` takes."""
    names = shard.get("column_names", [])
    if column not in names:
        hint = f"Name one of its columns: {', '.join(names)}."
        raise UserError(f"{folder} has no column {column}", key="column", hint=hint, code="no_column")
    if shard.get("format") != "mds" or shard.get("compression"):
        what = f"compressed with {shard['compression']}" if shard.get("compression") else f"{shard.get('format')} files"
        hint = "Write the shards again with compression=None: compressed ones cannot be read by memory map."
        raise UserError(f"the shards of {folder} are {what}", key="path", hint=hint, code="unsupported_format")
    number = names.index(column)
    encoding = shard["column_encodings"][number]
    found = re.fullmatch(r"ndarray:(\w+)(?::([\d,]+))?", encoding)
    kind = found[1] if found else dtype if encoding == "bytes" else None
    if kind not in INTEGERS:
        hint = "Name the ids' dtype: dtype=uint16." if encoding == "bytes" else "bytes and ndarray:DTYPE are read."
        problem = f"the column {column} is encoded as {encoding}"
        raise UserError(problem, key="dtype" if encoding == "bytes" else "column", hint=hint, code="unsupported_format")
    return {
        "path": folder / shard["raw_data"]["basename"],
        "samples": shard["samples"],
        "dtype": kind,
        "sizes": shard["column_sizes"],
        "number": number,
        "has_shape": bool(found) and found[2] is None,
    }


def _read(layouts: list[dict[str, Any]]) -> list[TokenFile]:
    return [_read_shard(**layout) for layout in layouts]


def _read_shard(
    path: Path, samples: int, dtype: str, sizes: list[int | None], number: int, has_shape: bool
) -> TokenFile:
    try:
        content = np.memmap(path, np.uint8, "r")
        places = np.frombuffer(content[4 : 4 + 4 * (samples + 1)], "<u4").astype(np.int64)
        if int(content[:4].view("<u4")[0]) != samples or places[-1] != len(content):
            raise ValueError("its size or number of samples is not what index.json says")
    except FileNotFoundError:
        raise UserError(f"there is no {path}", key="path", code="no_such_file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is corrupt: {error}", key="path", code="corrupt_corpus") from None
    variable = [i for i, size in enumerate(sizes) if size is None]
    heads = places[:-1, None] + 4 * np.arange(len(variable))
    own = np.empty((samples, len(sizes)), np.int64)  # bytes of every column of every sample
    for i, size in enumerate(sizes):
        own[:, i] = size if size is not None else _uint32(content, heads[:, variable.index(i)])
    starts = places[:-1] + 4 * len(variable) + own[:, :number].sum(1)
    lengths = own[:, number]
    if has_shape:
        # Before the values: a byte, dimensions * 4 + the logarithm of the bytes of a dimension, and the dimensions.
        first = content[starts].astype(np.int64)
        if (first >> 2 != 1).any():
            problem = f"{path}: an array of {int((first >> 2).max())} dimensions"
            raise UserError(problem, key="column", hint="Write arrays of one dimension.", code="unsupported_format")
        head = 1 + (1 << (first & 3))
        starts, lengths = starts + head, lengths - head
    ids = np.dtype(dtype).newbyteorder("<")
    if (lengths % ids.itemsize).any():
        problem = f"{path}: samples are not of whole {dtype} ids"
        raise UserError(problem, key="dtype", hint="Name the dtype they were written with.", code="corrupt_corpus")
    offsets = np.concatenate([[0], np.cumsum(lengths // ids.itemsize)])
    return TokenFile(path, ScatteredTokens(content, starts, offsets, ids), offsets)


class ScatteredTokens:
    """Ids with other bytes between the documents, with what rows need of an array: dtype, length, slices, indices."""

    def __init__(self, content: np.ndarray, starts: np.ndarray, offsets: np.ndarray, dtype: np.dtype):
        self.content, self.starts, self.offsets, self.dtype = content, starts, offsets, dtype

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def documents(self, start: int, stop: int) -> "ScatteredTokens":
        """Those of the documents from number `start` up to `stop`."""
        offsets = self.offsets[start : stop + 1]
        return ScatteredTokens(self.content, self.starts[start:stop], offsets - offsets[0], self.dtype)

    def __getitem__(self, span: slice | np.ndarray) -> np.ndarray:
        size = self.dtype.itemsize
        if not isinstance(span, slice):
            document = self.offsets.searchsorted(span, "right") - 1
            places = self.starts[document] + (span - self.offsets[document]) * size
            return self.content[places[:, None] + np.arange(size)].view(self.dtype)[:, 0]
        start, stop, _ = span.indices(len(self))
        first = int(self.offsets.searchsorted(start, "right")) - 1
        pieces = []
        while start < stop:
            end = min(stop, int(self.offsets[first + 1]))
            place = int(self.starts[first]) + (start - int(self.offsets[first])) * size
            pieces.append(np.ndarray(end - start, self.dtype, self.content, place))
            start, first = end, first + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, self.dtype), *pieces])


def _uint32(content: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The numbers at these places in bytes, int64."""
    return (content[places[:, None] + np.arange(4)].astype(np.int64) << np.arange(0, 32, 8)).sum(1)
