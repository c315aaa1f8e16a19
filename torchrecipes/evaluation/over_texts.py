"""`map_texts`: what a model computes for any number of texts, window by window.

1. Texts are taken in windows of some thousands. A thread tokenizes the next window while the model computes.
2. A window is sorted by length and cut into batches of about as many tokens; the ranks of a run share them.
3. Batches are padded rows where padding costs little (a CPU, and fp32 on a GPU, where a mask over one long row would
   not fit), else one row of texts without padding, always of the same length, for which kernels are compiled once.
4. A window's results leave the device together, in the order of its texts.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from torchrecipes.data.batching.batch import Batch, dense_fields, document_fields
from torchrecipes.data.progress import Progress
from torchrecipes.distributed.collectives import all_reduce_sum_, rank, world_size
from torchrecipes.evaluation.running import evaluation_mode

# Larger batches do not stay in the caches of a CPU: 4,096 tokens per thread were 10 % to 25 % slower.
TOKENS_PER_THREAD, TOKENS_ON_GPU = 1024, 32_768
BATCHES_PER_WINDOW = 128
TEXTS_PER_WINDOW = 32_768  # at most

Text = TypeVar("Text")
Tokenized = TypeVar("Tokenized")


@dataclass
class TextWindow:
    """Some texts, tokenized.

    Attributes:
        tokens: integers, 1-D: the tokens of n texts, one text after the other.
        lengths: `[n]` int64, of the texts, at least 1.
        num_bytes: `[n]` int64, of the texts, for the progress.
        prompt_length: tokens at the start of each text that pooling leaves out.
        token_type_ids: int64, of the tokens, for a model with token types. None: it has none.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    num_bytes: np.ndarray
    prompt_length: int = 0
    token_type_ids: np.ndarray | None = None

    def __post_init__(self):
        self.starts = np.cumsum(self.lengths) - self.lengths


def default_batch_tokens(device: torch.device) -> int:
    """Tokens of a forward pass: 1,024 for every thread of a CPU, 32,768 on a GPU."""
    return TOKENS_PER_THREAD * torch.get_num_threads() if device.type == "cpu" else TOKENS_ON_GPU


def map_texts(
    texts: Iterable[Text],
    tokenize: Callable[[list[Text]], TextWindow],
    function: Callable[[Batch], Tensor],
    width: int,
    *,
    model: nn.Module,
    pad_id: int,
    tokens_per_batch: int,
    autocast: Callable[[], AbstractContextManager],
    progress: Progress | None = None,
    size_of: Callable[[Text], int] = len,
) -> Iterator[np.ndarray]:
    """Yields `[w, width]` float32 for the w texts of each window, the same on all ranks.

    Two windows of texts are in memory at a time.

    Args:
        texts: the same on all ranks; may be a generator.
        tokenize: called in a thread.
        function: gives `[N, width]` for the N texts of a batch.
        width: see above.
        model: in evaluation mode while a window is computed.
        pad_id: the padding token.
        tokens_per_batch: of a forward pass, at most, and one text at least.
        autocast: makes the context to compute in.
        progress: counts what is done.
        size_of: characters of a text.
    """
    batches = TextBatches(pad_id, tokens_per_batch, next(model.parameters()).device)
    for window in tokenized_windows(texts, tokenize, tokens_per_batch * world_size(), size_of):
        with torch.no_grad(), evaluation_mode(model), autocast():
            results = _compute(window, function, width, batches, progress)
        yield results


def tokenized_windows(
    texts: Iterable[Text],
    tokenize: Callable[[list[Text]], Tokenized],
    tokens_per_batch: int,
    size_of: Callable[[Text], int] = len,
) -> Iterator[Tokenized]:
    """Yields what `tokenize` makes of each window of texts; a thread prepares the next one meanwhile.

    Args:
        texts: may be a generator; it is read in the calling thread.
        tokenize: called in a thread.
        tokens_per_batch: a window has texts for some hundred batches.
        size_of: characters of a text.
    """
    windows = _windows(texts, 4 * BATCHES_PER_WINDOW * tokens_per_batch, size_of)
    with ThreadPoolExecutor(1) as thread:
        waiting = [thread.submit(tokenize, window) for window in islice(windows, 1)]
        while waiting:
            window = waiting.pop().result()
            waiting = [thread.submit(tokenize, found) for found in islice(windows, 1)]
            yield window


def _compute(
    window: TextWindow,
    function: Callable[[Batch], Tensor],
    width: int,
    batches: "TextBatches",
    progress: Progress | None,
) -> np.ndarray:
    results = torch.zeros(len(window.lengths), width, device=batches.device)
    is_packed = batches.are_packed()
    parts = batches.split(window.lengths, is_packed)
    rounds = -(-len(parts) // world_size())  # shards are gathered by all ranks, as often on each
    for number in range(rank(), rounds * world_size(), world_size()):
        places = parts[number % len(parts)]
        batch, documents = (batches.packed if is_packed else batches.padded)(window, places)
        found = function(batch.to(batches.device))
        if number >= len(parts):
            continue
        found = found if documents is None else found[torch.from_numpy(documents).to(batches.device)]
        results[torch.from_numpy(places).to(batches.device)] = found
        if progress is not None:
            done = places
            if world_size() > 1:
                done = np.concatenate(parts[number - rank() : number - rank() + world_size()])
            progress.add(len(done), int(window.num_bytes[done].sum()), int(window.lengths[done].sum()))
    return all_reduce_sum_(results).cpu().numpy()


@dataclass
class TextBatches:
    """Makes the batches of a window; see `map_texts`."""

    pad_id: int
    tokens_per_batch: int
    device: torch.device

    def are_packed(self) -> bool:
        """Whether batches are one row: where attention over packed texts has a kernel."""
        return self.device.type == "cuda" and torch.is_autocast_enabled(self.device.type)

    def split(self, lengths: np.ndarray, is_packed: bool) -> list[np.ndarray]:
        """The places of each batch's texts: the longest first, so that too large a batch is noticed at once."""
        order = np.argsort(-lengths, kind="stable")
        falling = lengths[order]
        ends = np.cumsum(falling)
        parts, first = [], 0
        while first < len(order):
            if is_packed:
                stop = int(ends.searchsorted(ends[first] - falling[first] + self.tokens_per_batch, "right"))
            else:
                stop = first + self.tokens_per_batch // int(falling[first])
                # Rows of one length need no padding, and attention over them no mask.
                end_of_length = int((-falling).searchsorted(-falling[first], "right"))
                if first + stop < 2 * end_of_length < 2 * stop:
                    stop = end_of_length
            parts.append(order[first : max(stop, first + 1)])
            first += len(parts[-1])
        return parts

    def padded(self, window: TextWindow, places: np.ndarray) -> tuple[Batch, np.ndarray | None]:
        """A row for each text; and which documents are texts, where some are padding."""
        lengths = window.lengths[places]
        shape = rows, width = len(places), int(lengths.max())
        columns = np.arange(width)
        source = window.starts[places, None] + columns
        if (lengths == width).all():
            return self._batch(window, source, None, dense_fields(shape), rows), None
        is_text = columns < lengths[:, None]
        is_document = np.column_stack((np.ones(rows, bool), lengths < width))  # the text, and padding after it
        starts = np.arange(rows) * width
        boundaries = np.column_stack((starts, starts + lengths))[is_document]
        fields = document_fields(boundaries, shape)
        batch = self._batch(window, np.where(is_text, source, 0), is_text, fields, len(boundaries))
        return batch, (np.cumsum(is_document) - 1)[::2]

    def packed(self, window: TextWindow, places: np.ndarray) -> tuple[Batch, None]:
        """One row of all texts, then padding."""
        lengths = window.lengths[places]
        ends = np.cumsum(lengths)
        total = int(ends[-1])
        # A few texts get a shorter row, of few lengths.
        width = max(64, 1 << (total - 1).bit_length())
        width = width if width <= self.tokens_per_batch // 2 else max(self.tokens_per_batch, total)
        is_text = np.arange(width)[None] < total
        source = np.zeros((1, width), np.int64)
        source[0, :total] = np.arange(total) + np.repeat(window.starts[places] - (ends - lengths), lengths)
        boundaries = np.concatenate(([0], ends if total < width else ends[:-1]))
        fields = document_fields(boundaries, (1, width))
        fields["position_ids"][0, total:] = 0  # padding may be longer than the table of positions
        return self._batch(window, source, is_text, fields, len(places)), None

    def _batch(
        self, window: TextWindow, source: np.ndarray, is_text: np.ndarray | None, fields: dict, num_texts: int
    ) -> Batch:
        """The batch whose token at each place is that of the window at `source`, or padding where it is no text."""
        tokens = window.tokens[source].astype(np.int64, copy=False)
        types = None if window.token_type_ids is None else window.token_type_ids[source]
        if is_text is not None:
            tokens[~is_text] = self.pad_id
            if types is not None:
                types[~is_text] = 0
        if types is not None:
            fields["token_type_ids"] = torch.from_numpy(types)
        if window.prompt_length:
            fields["pool_from"] = torch.full((num_texts,), window.prompt_length, dtype=torch.int32)
        return Batch(input_ids=torch.from_numpy(tokens), num_targets=num_texts, num_texts=num_texts, **fields)


def _windows(texts: Iterable[Text], characters: int, size_of: Callable[[Text], int]) -> Iterator[list[Text]]:
    """Texts of so many characters together, or some more, at most `TEXTS_PER_WINDOW`."""
    texts = iter(texts)
    while window := list(islice(texts, 1)):
        size, counted = size_of(window[0]), 1
        while size < characters and counted < TEXTS_PER_WINDOW:
            # Several at a time, as many as there are already: one by one would cost more than tokenizing short texts.
            likely = -(-(characters - size) * counted // max(size, 1))
            window += islice(texts, min(counted, likely, TEXTS_PER_WINDOW - counted))
            if len(window) == counted:
                break
            size += sum(map(size_of, window[counted:]))
            counted = len(window)
        yield window
