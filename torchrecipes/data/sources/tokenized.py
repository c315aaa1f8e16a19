"""`tokenized`: a corpus that another tool has tokenized, read where it lies.

It has tokens and no text: nothing is tokenized, and no tokenizer can be trained on it. `tokenized_elsewhere` of
`data.corpus` opens it as a `Corpus`.

nanogpt     a flat file of uint16 or uint32 ids, `train.bin` (Karpathy's nanoGPT); with the header of llm.c, too
megatron    `NAME.bin` and `NAME.idx` (Megatron-LM, NeMo, GPT-NeoX)
datatrove   `NAME.ds` and `NAME.ds.index`
mds         a folder with `index.json` (mosaicml-streaming), plain or zstd; copied once, since other bytes lie between
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from torchrecipes.config.suggest import did_you_mean
from torchrecipes.data.sources.dataset_repository import HELD_OUT, TRAINING
from torchrecipes.data.sources.records import Document, ReadStats, content_checksum
from torchrecipes.errors import UserError

FORMATS = ("nanogpt", "megatron", "datatrove", "mds")
DTYPES = ("uint8", "int8", "int16", "uint16", "int32", "uint32", "int64")
LLM_C = {20240520: "uint16", 20240801: "uint32"}  # the first int32 of a file of llm.c, whose header has 256 of them
MEGATRON_HEADER = b"MMIDIDX\x00\x00"
MEGATRON_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}


@dataclass
class TokenFile:
    """Tokens in one file, one after the other.

    Attributes:
        path: the file.
        byte: where the tokens start.
        count: number of tokens.
        dtype: of a token, as `numpy` names it, little-endian.
        ends: int64, the ends of documents in tokens, from the first token. None: not stated.
    """

    path: Path
    byte: int
    count: int
    dtype: str
    ends: np.ndarray | None = None

    def tokens(self) -> np.ndarray:
        """Return the tokens as a read-only map of the file."""
        kind = np.dtype(self.dtype).newbyteorder("<")
        return np.ndarray(self.count, kind, np.memmap(self.path, np.uint8, "r"), self.byte)


@dataclass
class tokenized:
    """A corpus of tokens: nanoGPT's, Megatron's, datatrove's or MDS.

    Args:
        path: a file (`train.bin`, `NAME.idx`, `NAME.ds`), a folder of them, or of MDS.
        format: nanogpt, megatron, datatrove or mds. None: what the names of the files say.
        split: where a folder holds several, `train.bin` and `val.bin` or folders of these names: the one that is read.
        dtype: type of a token in nanoGPT's, datatrove's and MDS' bytes. None: uint16, or what the files say.
        eos_id: the token that ends documents, or begins them. None: that of the tokenizer, if it has one. Documents are
            read as `eos text`, as those that are tokenized here.
        column: of MDS, the one that holds the tokens.
        max_documents: documents to read at most, from the first; None: all.

    Raises:
        UserError: no such file (code `no_such_file`), an invalid value, or a file that is not in the format
            (`unreadable_file`).
    """

    path: str
    format: str | None = None
    split: str = "train"
    dtype: str | None = None
    eos_id: int | None = None
    column: str = "tokens"
    max_documents: int | None = None
    report: ReadStats = field(default_factory=ReadStats, init=False, repr=False, compare=False)

    def __post_init__(self):
        choices = {"format": (self.format, FORMATS), "dtype": (self.dtype, DTYPES)}
        for key, (value, valid) in choices.items():
            if value is not None and value not in valid:
                raise _error(key, f"'{value}' is not a valid value", did_you_mean(str(value), valid, "Valid values"))
        if self.max_documents is not None and self.max_documents < 1:
            raise _error("max_documents", f"{self.max_documents} is less than 1", "Set 1 or more, or null for all.")
        self._files = self._find()
        self.format = self.format or _format_of(self._files[0])

    @property
    def name(self) -> str:
        """The path."""
        return self.path

    @property
    def num_bytes(self) -> int:
        """Size of the files of tokens."""
        return sum(file.stat().st_size for file in self._files)

    @property
    def fingerprint(self) -> str:
        """A hash of the arguments and of samples of the files' content."""
        options = [self.format, self.dtype, self.eos_id, self.column, self.max_documents]
        described = [content_checksum(file) for file in self._files]
        return hashlib.sha256(json.dumps([*options, described]).encode()).hexdigest()[:32]

    def splits(self) -> list[str]:
        """Return the names of the splits in the folder; none for a file."""
        return self._splits

    def __iter__(self) -> Iterator[Document]:
        return self.read()

    def read(self, position: dict[str, Any] | None = None) -> NoReturn:  # noqa: ARG002
        """Refuse: there is no text.

        Raises:
            UserError: always (code `no_text`).
        """
        raise UserError(
            f"{self.path} is tokenized already: it holds no text",
            key="path",
            hint="Load the tokenizer that it was made with, "
            "tokenizer._component_=torchrecipes.data.tokenizers.load_tokenizer, and set data.mode=prepare.",
            code="no_text",
        )

    def files(self) -> list[TokenFile]:
        """Return the files of tokens that are read in place.

        Raises:
            UserError: a file is not in the format (code `unreadable_file`).
        """
        readers = {"nanogpt": _nanogpt, "megatron": _megatron, "datatrove": _datatrove}
        found = []
        for path in self._files:
            try:
                file = readers[self.format](path, self.dtype)
                if not file.count:
                    raise ValueError("it holds no tokens")
                if file.ends is not None and (file.ends[-1] != file.count or (np.diff(file.ends, prepend=0) < 0).any()):
                    raise ValueError(
                        f"its documents end at token {file.ends[-1]:,}, and it holds {file.count:,} tokens"
                    )
            except (OSError, ValueError, KeyError, IndexError) as error:
                raise _unreadable(path, self.format, error) from error
            found.append(file)
        return found

    def copied(self) -> Iterator[list[np.ndarray]]:
        """Yield the documents of every MDS shard.

        Raises:
            UserError: a shard is not in the format (code `unreadable_file`).
        """
        for path in self._files:
            try:
                yield from _mds_documents(path, self.column, self.dtype)
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
                raise _unreadable(path, "mds", error) from error

    def _find(self) -> list[Path]:
        path = Path(self.path).expanduser()
        self._splits: list[str] = []
        if not path.is_dir():
            for candidate in (path, path.with_name(path.name + ".bin")):
                if candidate.is_file():
                    return [candidate.with_suffix(".bin") if candidate.suffix == ".idx" else candidate]
            raise _error("path", f"there is no file or folder {path}", None, "no_such_file")
        files = sorted(file for file in path.rglob("*") if _format_of(file) and file.is_file())
        if self.format:
            also = "megatron" if self.format == "nanogpt" else None  # the tokens without their index
            files = [file for file in files if _format_of(file) in (self.format, also)]
        if not files:
            hint = "It reads .bin, .bin with .idx, .ds, and folders with an index.json of MDS."
            raise _error("path", f"{path} holds no tokenized corpus", hint, "no_such_file")
        by_split: dict[str, list[Path]] = {}
        for file in files:
            by_split.setdefault(_split_of(file.relative_to(path)), []).append(file)
        if set(by_split) == {""}:
            return self._of_one_format(files)
        self._splits = [name for name in by_split if name]
        if self.split not in by_split:
            hint = did_you_mean(self.split, self._splits, "Its splits are")
            raise _error("split", f"{path} has no split '{self.split}'", hint, "no_such_split")
        return self._of_one_format(by_split[self.split])

    def _of_one_format(self, files: list[Path]) -> list[Path]:
        formats = sorted({str(_format_of(file)) for file in files})
        if len(formats) > 1 and self.format is None:
            raise _error("format", f"{self.path} holds {' and '.join(formats)}", "Set format to one of them.")
        return files


def _format_of(path: Path) -> str | None:
    if path.suffix == ".bin":
        return "megatron" if path.with_suffix(".idx").exists() else "nanogpt"
    if path.suffix == ".ds":
        return "datatrove"
    return "mds" if path.name == "index.json" else None


def _split_of(path: Path) -> str:
    words = [re.split(r"[-_.]", path.stem.lower())[0], *(part.lower() for part in reversed(path.parts[:-1]))]
    return next((word for word in words if word in TRAINING + HELD_OUT), "")


def _nanogpt(path: Path, dtype: str | None) -> TokenFile:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = np.frombuffer(file.read(12), "<i4")
    if len(head) == 3 and int(head[0]) in LLM_C:
        dtype = LLM_C[int(head[0])]
        count = int(head[2])
        if size != 1024 + count * np.dtype(dtype).itemsize:
            raise ValueError(f"its header states {count:,} tokens, which are not in {size:,} bytes")
        return TokenFile(path, 1024, count, dtype)
    dtype = dtype or "uint16"
    if size % np.dtype(dtype).itemsize:
        raise ValueError(f"{size:,} bytes are no whole number of {dtype}: set dtype")
    return TokenFile(path, 0, size // np.dtype(dtype).itemsize, dtype)


def _megatron(path: Path, dtype: str | None) -> TokenFile:
    index = path.with_suffix(".idx")
    content = np.memmap(index, np.uint8, "r")
    if bytes(content[:9]) != MEGATRON_HEADER:
        raise ValueError(f"{index.name} does not begin with {MEGATRON_HEADER!r}")
    version, code = int(content[9:17].view("<u8")[0]), int(content[17])
    if version != 1 or code not in MEGATRON_DTYPES:
        raise ValueError(f"{index.name} has version {version} and the type {code}, which are not known")
    sequences, documents = (int(content[at : at + 8].view("<u8")[0]) for at in (18, 26))
    sizes_end = 34 + 4 * sequences
    pointers_end = sizes_end + 8 * sequences
    if len(content) < pointers_end + 8 * documents or documents < 2:
        raise ValueError(f"{index.name} is too short for {sequences:,} sequences and {documents - 1:,} documents")
    sizes = np.frombuffer(content[34:sizes_end].tobytes(), "<i4")
    pointers = np.frombuffer(content[sizes_end:pointers_end].tobytes(), "<i8")
    first = np.frombuffer(content[pointers_end : pointers_end + 8 * documents].tobytes(), "<i8")
    stated = MEGATRON_DTYPES[code]
    if dtype not in (None, stated):
        raise ValueError(f"{index.name} states {stated}, and not dtype={dtype}")
    ends = np.cumsum(sizes, dtype=np.int64)
    width = np.dtype(stated).itemsize
    if not np.array_equal(pointers, (ends - sizes) * width):
        raise ValueError("its sequences are not one after the other: merge the data set with Megatron's tools first")
    if path.stat().st_size != int(ends[-1]) * width:
        raise ValueError(f"it has {path.stat().st_size:,} bytes, and {index.name} describes {int(ends[-1]) * width:,}")
    if first[0] != 0 or first[-1] != sequences:
        raise ValueError(f"{index.name}: its documents are not those of its sequences")
    return TokenFile(path, 0, int(ends[-1]), stated, np.concatenate([[0], ends])[first[1:]])


def _datatrove(path: Path, dtype: str | None) -> TokenFile:
    metadata, index = Path(f"{path}.metadata"), Path(f"{path}.index")
    if metadata.is_file() and dtype is None:  # the last part of its first line: TOKENIZER|BYTES
        width = metadata.read_text("utf-8").split("\n")[0].rsplit("|", 1)[-1]
        dtype = {"2": "uint16", "4": "uint32"}.get(width)
    ends = np.fromfile(index, "<u8").astype(np.int64) if index.is_file() else None
    size = path.stat().st_size
    if dtype is None and ends is not None and len(ends):
        dtype = "uint32" if size == 4 * int(ends[-1]) else "uint16"
    dtype = dtype or "uint16"
    if size % np.dtype(dtype).itemsize:
        raise ValueError(f"{size:,} bytes are no whole number of {dtype}: set dtype")
    return TokenFile(path, 0, size // np.dtype(dtype).itemsize, dtype, ends)


def _mds_documents(index: Path, column: str, dtype: str | None) -> Iterator[list[np.ndarray]]:
    for shard in json.loads(index.read_text("utf-8"))["shards"]:
        if shard["format"] != "mds" or shard["version"] != 2:
            raise ValueError(f"a shard of format {shard['format']}, version {shard['version']}, which is not MDS 2")
        names = shard["column_names"]
        if column not in names:
            raise ValueError(f"no column '{column}': its columns are {', '.join(names)}; set column")
        number = names.index(column)
        decode = _mds_decoder(shard["column_encodings"][number], dtype)
        content = _mds_shard(index.parent, shard)
        count = int(np.frombuffer(content, "<u4", 1)[0])
        offsets = np.frombuffer(content, "<u4", count + 1, 4).tolist()
        fixed, documents = shard["column_sizes"], []
        for start, stop in pairwise(offsets):
            at, sizes = start, []
            for size in fixed:
                if size:
                    sizes.append(size)
                else:
                    sizes.append(int.from_bytes(content[at : at + 4], "little"))
                    at += 4
            at += sum(sizes[:number])
            if at + sizes[number] > stop:
                raise ValueError(f"a sample of {shard['raw_data']['basename']} is too short")
            documents.append(decode(content[at : at + sizes[number]]))
        yield documents


def _mds_shard(folder: Path, shard: dict[str, Any]) -> bytes:
    raw = folder / os.path.basename(shard["raw_data"]["basename"])
    if raw.is_file():
        return raw.read_bytes()
    packed = shard.get("zip_data")
    if not packed:
        raise FileNotFoundError(f"{raw.name} is missing")
    if not str(shard["compression"]).startswith("zstd"):
        raise ValueError(f"{packed['basename']} is compressed with {shard['compression']}: unpack it first")
    import pyarrow

    path = folder / os.path.basename(packed["basename"])
    with path.open("rb") as file, pyarrow.CompressedInputStream(file, "zstd") as unpacked:
        return unpacked.read()


_MDS_DTYPES = {8: "uint8", 9: "int8", 16: "uint16", 17: "int16", 32: "uint32", 33: "int32", 64: "uint64", 65: "int64"}


def _mds_decoder(encoding: str, dtype: str | None) -> Any:
    """Return a function from the bytes of a value to its tokens: of `bytes`, `ndarray`, `ndarray:DTYPE[:SHAPE]`."""
    kind, *details = encoding.split(":")
    if kind == "bytes":
        if dtype is None:
            raise ValueError("its column holds bytes: set dtype to the type of a token in them, e.g. int64 or int32")
        return lambda data: np.frombuffer(data, np.dtype(dtype).newbyteorder("<"))
    if kind != "ndarray":
        raise ValueError(f"its column is {encoding}: tokens are bytes or ndarray")

    def decode(data: bytes) -> np.ndarray:
        at, stated = 0, details[0] if details else None
        if stated is None:
            stated, at = _MDS_DTYPES[data[0]], 1
        if len(details) < 2:  # dimensions, with the type of their sizes in the lowest two bits
            at += 1 + (data[at] >> 2) * (1 << (data[at] & 3))
        return np.frombuffer(data, np.dtype(stated).newbyteorder("<"), offset=at)

    return decode


def _unreadable(path: Path, form: str, error: Exception) -> UserError:
    missing = f"lacks {error}" if isinstance(error, KeyError) else str(error)
    return UserError(f"{path} cannot be read as {form}: {missing}", key="path", code="unreadable_file")


def _error(key: str, problem: str, hint: str | None, code: str = "invalid_value") -> UserError:
    return UserError(problem, key=key, hint=hint, code=code)
