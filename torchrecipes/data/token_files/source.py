"""`TokenSource`: token files of another tool as a `data.source`, opened as a `Corpus` without a copy.

A reader of one format gives the parts of the corpus: tokens as an array over a memory map, and where documents start.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from torchrecipes.data.corpus.corpus import Corpus, account_of
from torchrecipes.data.corpus.shards import Shard, Statistics
from torchrecipes.data.sources.records import Document, ReadStats, content_checksum
from torchrecipes.data.tokenizers import Tokenizer
from torchrecipes.errors import UserError

SAMPLES, SAMPLE_TOKENS = 16, 1 << 16  # of a file, in which the largest id is looked for


class TokenFile(NamedTuple):
    """The content of one file: tokens `[N]`, an array or what has its `dtype`, length and slices; offsets `[D + 1]`."""

    path: Path
    tokens: Any
    document_offsets: np.ndarray


@dataclass(eq=False)
class TokenSource:
    """Documents that are tokens already: a `data.source`, an evaluation set, or a part of a mixture.

    Attributes:
        name: where the tokens come from.
        paths: the files.
        read: opens them.
    """

    name: str
    paths: list[Path]
    read: Callable[[], list[TokenFile]]
    report: ReadStats = field(default_factory=ReadStats)

    @property
    def num_bytes(self) -> int:
        """Size of the files."""
        return sum(path.stat().st_size for path in self.paths)

    @property
    def fingerprint(self) -> str:
        """Of the content of the files."""
        return xxhash.xxh3_128_hexdigest(" ".join(map(content_checksum, self.paths)).encode())

    def __iter__(self) -> Iterator[Document]:
        raise UserError(
            f"{self.name} holds tokens, not text, from which a tokenizer could be trained",
            key="tokenizer",
            hint="Load the tokenizer that made them: tokenizer._component_=torchrecipes.data.tokenizers.load_tokenizer "
            "tokenizer.path=FOLDER.",
            code="no_text",
        )

    def open(self, tokenizer: Tokenizer | None, first: int = 0, last: int | None = None) -> Corpus:
        """The corpus; its tokens stay where they are.

        Args:
            tokenizer: the one that made them: ids have no meaning without it. None: ids are not checked.
            first, last: the documents from number `first` up to `last`; None: to the end.

        Raises:
            UserError: no tokens (code `no_documents`), none after the `first` documents (`no_training_documents`), or
                ids that the tokenizer does not have (`other_tokenizer`).
        """
        fingerprint, vocab_size = (tokenizer.fingerprint, tokenizer.vocab_size) if tokenizer else ("", None)
        return _make(self, fingerprint, vocab_size, first, last)


def _make(source: TokenSource, fingerprint: str, vocab_size: int | None, first: int, last: int | None) -> Corpus:
    """The corpus of the documents from number `first` up to `last`."""
    shards: list[Shard] = []
    stated: list[dict[str, Any]] = []
    statistics, seen, tokens = Statistics(), 0, 0
    for file in source.read():
        if vocab_size is not None:
            _check_ids(file, vocab_size)
        documents = np.flatnonzero(np.diff(file.document_offsets))  # without empty ones
        count = len(documents)
        start, stop = max(first - seen, 0), count if last is None else min(last - seen, count)
        seen += count
        if start >= stop:
            continue
        first_document, end = int(documents[start]), int(documents[stop - 1]) + 1
        offsets = file.document_offsets[np.append(documents[start:stop], end)]
        if isinstance(file.tokens, np.ndarray):
            own = file.tokens[int(offsets[0]) : int(offsets[-1])]
        else:
            own = file.tokens.documents(first_document, end)
        lengths = np.diff(offsets)
        shards.append(Shard(file.path, tokens, statistics.documents, own, offsets - offsets[0]))
        stated.append({"file": str(file.path), "arrays_xxh3": f"{content_checksum(file.path)}-{start}-{stop}"})
        numbers = {"seen": stop - start, "documents": stop - start}
        statistics += Statistics(**numbers, tokens=len(own), shortest=int(lengths.min()), longest=int(lengths.max()))
        tokens += len(own)
    if not tokens:
        if first and seen:
            raise UserError(
                f"all {seen:,} documents of {source.name} are for validation, none is for training",
                key="data.eval_samples",
                hint="Lower it, or give data.eval_sets and no eval_samples.",
                code="no_training_documents",
            )
        raise UserError(f"no tokens in {source.name}", code="no_documents")
    account = account_of("train", {"tokenizer": fingerprint}, statistics, stated)
    reopen = (_make, (source, fingerprint, vocab_size, first, last))
    return Corpus(source.paths[0].parent, account, shards, reopen)


def _check_ids(file: TokenFile, vocab_size: int) -> None:
    """Checks the largest id in evenly spaced samples: a model would read beyond its embedding."""
    last = max(len(file.tokens) - SAMPLE_TOKENS, 0)
    for number in range(SAMPLES if last else 1):
        start = number * last // (SAMPLES - 1)
        sample = np.asarray(file.tokens[start : start + SAMPLE_TOKENS])
        if len(sample) and (int(sample.max()) >= vocab_size or int(sample.min()) < 0):
            wrong = int(sample.max()) if int(sample.max()) >= vocab_size else int(sample.min())
            raise UserError(
                f"{file.path} holds the id {wrong}, and the tokenizer has {vocab_size:,}",
                key="tokenizer",
                hint="Load the tokenizer that made the file, or name the right dtype.",
                code="other_tokenizer",
            )


def find_token_files(path: str | list[str], suffix: str) -> list[Path]:
    """The files that `path` stands for: a file, a folder, or a list of those; a folder gives its files by name.

    Raises:
        UserError: there is none (code `no_such_file`).
    """
    found: list[Path] = []
    for item in [path] if isinstance(path, str) else path:
        place = Path(item).expanduser()
        here = sorted(place.glob(f"*{suffix}")) if place.is_dir() else [place] if place.is_file() else []
        if not here:
            what = f"no file *{suffix} in" if place.is_dir() else "no file or folder"
            raise UserError(f"there is {what} {place.absolute()}", key="path", code="no_such_file")
        found += here
    return found


def token_array(path: Path, dtype: str | np.dtype) -> np.ndarray:
    """The ids of a file by memory map, `[N]`; a plain array over it, whose slices cost less than those of a map.

    Raises:
        UserError: the size of the file is no multiple of an id's (code `corrupt_corpus`).
    """
    size, item = path.stat().st_size, np.dtype(dtype).itemsize
    if size % item:
        problem = f"{path} has {size:,} bytes, not a multiple of the {item} of {np.dtype(dtype)}"
        raise UserError(problem, key="dtype", hint="Name the dtype it was written with.", code="corrupt_corpus")
    if not size:
        return np.empty(0, dtype)
    return np.ndarray(size // item, dtype, np.memmap(path, np.uint8, "r"))
