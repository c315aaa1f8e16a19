"""`open_stream`: a corpus that is read while another process writes it.

1. A folder of the cache belongs to one source, tokenizer and choice of documents for validation: `cache_key`. Runs
   share it.
2. A process (tokenizer_process.py) writes the same shards there as `prepare_corpus` does, smaller ones, ahead of those
   who read. It continues where an earlier one stopped.
3. `Stream` sees the shards that are complete. All that readers and writers tell each other is in the folder, so it is
   the same for other ranks, loader processes and other runs.
"""

import json
import math
import os
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from torchrecipes.atomic_write import check_writable, write_atomically
from torchrecipes.data.corpus.build import SETTINGS_FILE, corpus_settings
from torchrecipes.data.corpus.cache import default_cache_dir, use_folder
from torchrecipes.data.corpus.corpus import Corpus, account_of
from torchrecipes.data.corpus.shard_writer import CORPUS_FILE, to_json, writing
from torchrecipes.data.corpus.shards import Shard, Statistics, open_shard, shard_name
from torchrecipes.data.corpus.tokenizer_process import FAILED_FILE, WANTED_FILE, TokenizerProcess
from torchrecipes.data.sources.records import Source
from torchrecipes.data.tokenizers.tokenizer import Tokenizer
from torchrecipes.errors import UserError

SHARD_TOKENS = 4 * 2**20
SHARDS_AHEAD = 64  # that the tokenizer writes beyond those that are read, at least
POLL = 0.05  # seconds between two looks at the folder
ABOUT_FILE = "about.json"


class Stream:
    """The shards of a folder that are complete so far. Threads do not share it; pickled, it is its path.

    Attributes:
        folder: the folder of the cache.
        shards: counts of the complete shards of training text, in order.
        finished: the source has been read to its end.
        process: what writes, if this object started it.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.settings: dict[str, Any] = json.loads((self.folder / SETTINGS_FILE).read_text("utf-8"))
        self.shards: list[Statistics] = []
        self.finished = False
        self.process: TokenizerProcess | None = None
        self._shown: float | None = None
        weakref.finalize(self, os.close, use_folder(self.folder))
        self.refresh()

    def __reduce__(self) -> tuple:
        return Stream, (self.folder,)

    def refresh(self) -> None:
        """Looks for shards that have been completed since the last time."""
        finished = (self.folder / "train" / CORPUS_FILE).exists()  # before the shards: it is written after them
        while (path := self.folder / "train" / shard_name(len(self.shards))).exists():
            _, metadata = open_shard(path, 0, 0)
            self.shards.append(Statistics(**json.loads(metadata["statistics"])))
        self.finished = finished

    def wait(self, show_every: float = math.inf) -> None:
        """Waits a moment and refreshes; says so the first time, and again after `show_every` seconds.

        Raises:
            UserError: what ended the process that writes: a bad record, a full disk.
        """
        with suppress(FileNotFoundError):
            failure = json.loads((self.folder / FAILED_FILE).read_text("utf-8"))
            if "bug" in failure:
                raise RuntimeError(f"the tokenizer's process failed:\n{failure['bug']}")
            raise UserError.from_dict(failure)
        if self._shown is None or time.monotonic() - self._shown > show_every:
            self._shown = time.monotonic()
            tokens = sum(shard.tokens for shard in self.shards)
            print(
                f"waiting for the tokenizer, which has written {tokens:,} tokens to {self.folder} "
                "(data_wait_fraction counts it)",
                flush=True,
            )
        self.want(len(self.shards) + SHARDS_AHEAD)
        time.sleep(POLL)
        self.refresh()

    def want(self, shards: int) -> None:
        """Lets the tokenizer write so many shards of training text; it pauses when there are more."""
        path = self.folder / WANTED_FILE
        with suppress(OSError):  # another run's number was larger, or is written at this moment
            if not path.exists() or int(path.read_text()) < shards:
                write_atomically(path, [str(shards).encode()])

    def corpus(self, first: int, last: int, split: str = "train") -> Corpus:
        """The documents of the shards from `first` up to `last`, which must be complete."""
        return open_shards(self.folder, first, last, split)

    def num_validation_shards(self, last: int) -> int:
        """The shards of documents for validation that come, in the source, before shard `last` of the others."""
        _, metadata = open_shard(self.folder / "train" / shard_name(last - 1), 0, 0)
        return json.loads(metadata["commit"])["shards"].get("validation", 0)


def open_stream(
    source: Source,
    tokenizer: Tokenizer,
    *,
    cache_dir: str | Path | None = None,
    validation_fraction: float = 0.005,
    eval_samples: int | None = None,
    tokenizer_threads: int | None = None,
    shard_tokens: int | None = None,
) -> Stream:
    """Opens a source as a stream, and starts the process that tokenizes it unless it has been read to its end.

    Args:
        source: the documents; it must be picklable, since another process reads it.
        tokenizer: makes the tokens.
        cache_dir: the folder that holds the folders of all streams. None: `default_cache_dir()`.
        validation_fraction, eval_samples, tokenizer_threads: see `prepare_corpus`. No document is looked for ahead of
            the others, so there may be none for validation.
        shard_tokens: maximum tokens of a shard. None: 4Mi.

    Of several ranks one calls this, the others open `Stream(folder)`.

    Raises:
        UserError: the folder cannot be written, or the source cannot be pickled (code `not_picklable`).
    """
    size = shard_tokens or SHARD_TOKENS
    settings = corpus_settings(source, tokenizer, validation_fraction, None, eval_samples, size, is_stream=True)
    folder = Path(cache_dir or default_cache_dir()) / cache_key(settings)
    if not (folder / "train" / CORPUS_FILE).exists():
        check_writable(folder, key="data.cache_dir")
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in ((SETTINGS_FILE, settings), (ABOUT_FILE, {"source": source.name})):
                if not (folder / name).exists():
                    write_atomically(folder / name, [to_json(content)])
    stream = Stream(folder)
    if not stream.finished:
        (folder / FAILED_FILE).unlink(missing_ok=True)
        stream.process = TokenizerProcess(folder, source, tokenizer, settings, tokenizer_threads)
        stream.process.start()
    return stream


def cache_key(settings: dict[str, Any]) -> str:
    """The name of a folder of the cache: what `corpus_settings` gave, as a hash."""
    return xxhash.xxh3_64_hexdigest(to_json(settings))


def open_shards(folder: Path, first: int, last: int, split: str = "train") -> Corpus:
    """Opens some shards of a folder that `open_stream` made, as a corpus of their own.

    Raises:
        OSError, ValueError: a shard is missing or corrupt.
    """
    settings = json.loads((folder / SETTINGS_FILE).read_text("utf-8"))
    shards: list[Shard] = []
    stated: list[dict[str, Any]] = []
    total, tokens, documents = Statistics(), 0, 0
    for number in range(first, last):
        path = folder / split / shard_name(number)
        shard, metadata = open_shard(path, tokens, documents)
        shards.append(shard)
        stated.append({"file": path.name, "size": os.stat(path).st_size, "arrays_xxh3": metadata["arrays_xxh3"]})
        total += Statistics(**json.loads(metadata["statistics"]))
        tokens += len(shard.tokens)
        documents += len(shard.document_offsets) - 1
    account = account_of(split, settings, total, stated)
    return Corpus(folder / split, account, shards, reopen=(open_shards, (folder, first, last, split)))
