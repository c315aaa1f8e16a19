"""`StreamedExamples`: examples of a source, tokenized window by window while they are trained on."""

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from torchrecipes.atomic_write import write_atomically
from torchrecipes.data.corpus.shard_writer import to_json
from torchrecipes.data.examples.block import ExampleBlock
from torchrecipes.data.examples.build import join_arrays
from torchrecipes.data.examples.encode import ExampleEncoder
from torchrecipes.data.examples.example import Example, ExampleSource
from torchrecipes.data.examples.labels import Labels, check_task, label_name
from torchrecipes.data.examples.plan import Plan, check_label
from torchrecipes.data.examples.shards import ExampleShard, read_examples
from torchrecipes.data.sources.records import BadRecord
from torchrecipes.data.tokenizers.tokenizer import Tokenizer
from torchrecipes.errors import UserError

WINDOW = 1 << 14
OPEN_WINDOWS = 3  # the one before, the one that is read, and the next, which is made ready meanwhile
BATCH = 1024  # examples that are tokenized at once


class StreamedExamples:
    """Windows of consecutive examples of a source. Memory holds three of them.

    Window w holds the examples from `w * window` of the source. Windows are read one after the other, the next one in a
    thread while the caller works; a window that was read before is read again from its own place in the source, without
    what comes before it. Where the windows begin is kept in `folder`, so that a run that is resumed starts in its own.

    Every process reads the source for itself.

    Args:
        source: the examples.
        tokenizer: makes the tokens.
        max_length, prompts: see `prepare_examples`.
        window: examples of a window.
        task, label_names: see `prepare_examples`; a stream cannot look for the names, so they must be given.
        folder: keeps the places of windows, in a file of a few bytes for each; made if missing. None: a run that is
            resumed reads and tokenizes from the start again.

    Attributes:
        kind, columns, label_names, task, max_length, prompts, prompt_lengths: as for `ExampleCorpus`.
        fingerprint: of the source, the tokenizer and the arguments.
        texts_per_example, scores_per_example: the most that an example has in the windows that were read.
        tokens_per_example: mean of the first window, once it has been read.
        finished: the source has been read to its end.

    Raises:
        UserError: labels without names (code `no_label_names`), or what `prepare_examples` raises.
    """

    def __init__(
        self,
        source: ExampleSource,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        window: int = WINDOW,
        prompts: dict[str, str] | None = None,
        task: str = "single_label",
        label_names: Sequence[str] | None = None,
        folder: str | Path | None = None,
    ):
        if window < 1:
            raise UserError(f"{window} is less than 1", key="window", hint="Set 1 or more.", code="invalid_value")
        self.source, self.window = source, window
        self.kind, self.columns, self.max_length = source.kind, source.columns, max_length
        self._encoder = ExampleEncoder(tokenizer, source.kind, source.columns, max_length, prompts)
        self.prompts, self.prompt_lengths = self._encoder.prompts, self._encoder.prompt_lengths
        self._plan = Plan(_labels(source, task, label_names))
        self.task = self._plan.labels and self._plan.labels.task
        self.label_names = self._plan.labels and self._plan.labels.names
        described = [source.fingerprint, tokenizer.fingerprint, max_length, self.prompts, window]
        described += [self.task, self.label_names]
        self.fingerprint = xxhash.xxh3_128_hexdigest(json.dumps(described).encode())
        self._table = None if folder is None else Path(folder) / f"windows-{self.fingerprint}.json"
        self.texts_per_example, self.scores_per_example, self.tokens_per_example = 0, 0, 0.0
        self._sizes: list[int] = []  # of the windows that were read
        # Where they begin, and where the next one does: a position of the source, and the examples before it.
        self._starts: list[tuple[dict[str, Any] | None, int]] = [(None, 0)]
        self.finished = False
        if self._table is not None:
            with suppress(OSError, ValueError, KeyError):
                known = json.loads(self._table.read_text("utf-8"))
                self.texts_per_example, self.scores_per_example, self.tokens_per_example = known["per_example"]
                self._sizes, self._starts, self.finished = known["sizes"], known["starts"], known["finished"]
        self._begin()

    def __getstate__(self) -> dict:
        mine = ("_lock", "_pool", "_open", "_reader", "_process")
        return {name: value for name, value in self.__dict__.items() if name not in mine}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._begin()

    @property
    def sizes(self) -> list[int]:
        """Examples in each of the windows that were read, here or in an earlier run."""
        return self._sizes

    def size(self, window: int) -> int:
        """Examples in a window, 0 after the end of the source; reads up to there where it has not been read."""
        while len(self._sizes) <= window and not self.finished:
            self._get(len(self._sizes))
        return self._sizes[window] if window < len(self._sizes) else 0

    def read(self, window: int) -> ExampleBlock:
        """Reads all examples of a window, in the order of the source.

        Raises:
            IndexError: the source has no such window.
            UserError: a bad record and the source's `on_bad_record` is "stop"; there is no example (`no_examples`).
        """
        return self.examples(window * self.window + np.arange(self.size(window)))

    def examples(self, numbers: Sequence[int] | np.ndarray) -> ExampleBlock:
        """Reads examples in the order given, of one window or of a few.

        Args:
            numbers: int `[n]`, n at least 1, from the beginning of the source.

        Raises:
            IndexError, UserError: as `read`.
        """
        numbers = np.asarray(numbers, np.int64)
        shards = self._shards(numbers)
        return read_examples(shards, numbers, self.texts_per_example, self.scores_per_example, self.prompt_lengths)

    def example_lengths(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """Tokens of all texts of examples, int64 `[n]`; `numbers` as for `examples`."""
        numbers = np.asarray(numbers, np.int64)
        lengths = np.empty_like(numbers)
        for shard in self._shards(numbers):
            chosen = numbers // self.window == shard.first_example // self.window
            lengths[chosen] = shard.example_lengths()[numbers[chosen] - shard.first_example]
        return lengths

    def _shards(self, numbers: np.ndarray) -> list[ExampleShard]:
        windows = np.unique(numbers // self.window).tolist()
        if windows and windows[0] >= 0:
            shards = [self._get(window) for window in windows]
            if None not in shards and numbers.max() < sum(self._sizes):
                return shards
        raise IndexError(f"{self} has no such examples")

    def _begin(self) -> None:
        self._lock, self._pool = threading.Lock(), ThreadPoolExecutor(1)
        self._open: OrderedDict[int, ExampleShard] = OrderedDict()
        self._reader: tuple[int, Iterator[tuple[Example, Any]]] | None = None  # and the window that it reads next
        self._process = os.getpid()

    def _get(self, window: int) -> ExampleShard | None:
        if self._process != os.getpid():
            self._begin()  # a fork has neither the threads nor a file position of its own
        with self._lock:
            shard = self._load(window)
        self._pool.submit(self._load_next, window + 1)
        return shard

    def _load_next(self, window: int) -> None:
        with self._lock, suppress(Exception):  # it is raised where the window is asked for
            self._load(window, keep=window - 1)

    def _load(self, window: int, keep: int | None = None) -> ExampleShard | None:
        while window not in self._open:
            at = min(window, len(self._sizes))
            if at == len(self._sizes) and self.finished:
                return None
            self._read_window(at)
            while len(self._open) > OPEN_WINDOWS:
                self._open.pop(next(number for number in self._open if number not in (keep, at)))
        self._open.move_to_end(window)
        return self._open[window]

    def _read_window(self, window: int) -> None:
        if self._reader is None or self._reader[0] != window:
            self._reader = window, self._examples(window)
        reader, parts, size, count = self._reader[1], [], 0, self._starts[window][1]
        self._reader = None  # until the window is complete
        while size < self.window and (batch := list(islice(reader, min(BATCH, self.window - size)))):
            encoded = self._encoder.encode([example for example, _ in batch])
            kept = [item for item, is_kept in zip(batch, encoded.kept, strict=True) if is_kept]
            parts.append((encoded, [example.values for example, _ in kept], [label for _, label in kept]))
            size, count = size + len(kept), count + len(batch)
        if size:
            shard = ExampleShard(Path(), window * self.window, **join_arrays(parts, self._plan.labels))
            self.texts_per_example = max(self.texts_per_example, int(np.diff(shard.example_offsets).max()))
            if shard.values is not None:
                self.scores_per_example = max(self.scores_per_example, shard.values.shape[1])
            self._open[window] = shard
            self.tokens_per_example = self.tokens_per_example or len(shard.tokens) / size
        if window == len(self._sizes):
            self._note(size, (self.source.position(), count))
        self._reader = window + 1, reader

    def _note(self, size: int, end: tuple[dict[str, Any] | None, int]) -> None:
        """Keeps the size of a new window and where it ends."""
        if not size and not self._sizes:
            skipped = self.source.report.lines()[1:] or ["it is empty, or holds blank lines only"]
            raise UserError("\n  ".join([f"no examples in {self.source.name}", *skipped]), code="no_examples")
        if size:
            self._sizes.append(size)
            self._starts.append(end)
        self.finished = size < self.window
        if self._table is not None:
            with suppress(OSError):  # it saves the time to read again, no more
                self._table.parent.mkdir(parents=True, exist_ok=True)
                per_example = [self.texts_per_example, self.scores_per_example, self.tokens_per_example]
                known = {"sizes": self._sizes, "starts": self._starts, "finished": self.finished}
                known["per_example"] = per_example
                write_atomically(self._table, [to_json(known)])

    def _examples(self, window: int) -> Iterator[tuple[Example, Any]]:
        """The examples from the beginning of a window on, with the numbers of their labels."""
        position, count = self._starts[window]
        examples = self._accepted(position)
        return examples if position is not None else islice(examples, count, None)

    def _accepted(self, position: dict[str, Any] | None) -> Iterator[tuple[Example, Any]]:
        for example in self.source.read(position):
            label = None if self._plan.labels is None else check_label(self._plan, self.source, example)
            if isinstance(label, BadRecord):
                self.source.report.add(label)
            else:
                yield example, label

    def __str__(self) -> str:
        state = "" if self.finished else " so far"
        return f"{self.source.name}: {sum(self._sizes):,} {self.kind}{state}, in windows of {self.window:,}"


def _labels(source: ExampleSource, task: str, label_names: Sequence[str] | None) -> Labels | None:
    if not source.has_labels:
        return None
    names = source.label_names if label_names is None else label_names
    names = None if names is None else [label_name(name) for name in names]
    check_task(task, names)
    if names is None and task != "regression":
        problem = f"the labels of {source.name} have no names, and a stream is not searched for them"
        raise UserError(problem, key="label_names", hint="Name all classes.", code="no_label_names")
    return Labels(task, names or [])
