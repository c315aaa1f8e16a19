"""`TextEncoder`: embeddings of any number of texts.

1. Texts are taken in windows of some thousands. A thread tokenizes the next window while the model computes.
2. A window is sorted by length and cut into batches of about as many tokens; the ranks of a run share them.
3. Batches are padded rows where padding costs little (a CPU, and fp32 on a GPU, where a mask over one long row would
   not fit), else one row of texts without padding, always of the same length, for which kernels are compiled once.
4. A window's embeddings leave the device together, in the order of its texts.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from torchrecipes.data.batching.batch import Batch, dense_fields, document_fields
from torchrecipes.data.examples.encode import ExampleEncoder
from torchrecipes.data.progress import Progress
from torchrecipes.data.tokenizers.tokenizer import Tokenizer
from torchrecipes.distributed.collectives import all_reduce_sum_, rank, world_size
from torchrecipes.errors import UserError
from torchrecipes.evaluation.running import evaluation_mode
from torchrecipes.models.embedding_model import EmbeddingModel

TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 32_768}
BATCHES_PER_WINDOW = 32
TEXTS_PER_WINDOW = 32_768  # at most


@dataclass
class _Window:
    ids: list[list[int]]
    num_bytes: list[int]
    prompt_length: int


class TextEncoder:
    """Turns texts into embeddings, on all ranks of a run together.

        encode = TextEncoder(load_embedding_model(folder), load_tokenizer(folder))
        embeddings = encode.encode(["a text", "another one"], prompt="query")

    Args:
        model: on its device; its modules' training modes are restored after every window.
        tokenizer: the model's own.
        max_length: tokens of a text, with prompt and special tokens; the end of what is longer is cut off. None:
            `model.max_length`.
        tokens_per_batch: of a forward pass, at most, and one text at least. None: 4,096 on a CPU, 32,768 on a GPU.
        autocast: makes the context to compute in.

    Attributes:
        num_truncated: texts that were longer than `max_length`, so far.
        num_empty: texts without a token of their own, so far: their embeddings are those of no text.
    """

    def __init__(
        self,
        model: EmbeddingModel,
        tokenizer: Tokenizer,
        *,
        max_length: int | None = None,
        tokens_per_batch: int | None = None,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.model, self.tokenizer, self.autocast = model, tokenizer, autocast
        self.max_length = model.max_length if max_length is None else max_length
        if not 1 <= self.max_length <= model.max_length:
            wanted = f"1 to {model.max_length} tokens, which the model takes"
            raise UserError(f"{max_length} must be {wanted}", key="max_length", code="out_of_range")
        self.device = next(model.parameters()).device
        self.tokens_per_batch = tokens_per_batch or TOKENS_PER_BATCH.get(self.device.type, 4096)
        self.num_truncated = self.num_empty = 0
        self._encoders: dict[str, ExampleEncoder] = {}

    def encode(self, texts: Sequence[str], prompt: str | None = "", progress: Progress | None = None) -> np.ndarray:
        """Embeddings of texts, `[n, E]` float32, in their order; the same on all ranks.

        Args:
            texts: the same on all ranks, in any order.
            prompt: the name of the prompt that is put before each, such as `query`; "": none; None: the model's
                default prompt.
            progress: counts what is done.

        Raises:
            UserError: the model has no such prompt (code `unknown_prompt`).
        """
        embeddings, first = np.empty((len(texts), self.model.embedding_size), np.float32), 0
        for part in self.encode_iter(texts, prompt, progress):
            embeddings[first : first + len(part)] = part
            first += len(part)
        return embeddings

    def encode_iter(
        self, texts: Iterable[str], prompt: str | None = "", progress: Progress | None = None
    ) -> Iterator[np.ndarray]:
        """`encode` for any number of texts, which may come from a generator: yields `[w, E]`, window by window.

        Two windows of texts are in memory at a time.
        """
        encoder = self._encoder(self.model.prompt(prompt))
        characters = 4 * BATCHES_PER_WINDOW * self.tokens_per_batch * world_size()
        windows = _windows(texts, characters)
        with ThreadPoolExecutor(1) as thread:
            waiting = [thread.submit(self._tokenize, encoder, window) for window in islice(windows, 1)]
            while waiting:
                window = waiting.pop().result()
                waiting = [thread.submit(self._tokenize, encoder, texts) for texts in islice(windows, 1)]
                yield self._encode_window(window, progress)

    def _encoder(self, prompt: str) -> ExampleEncoder:
        if prompt not in self._encoders:
            self._encoders[prompt] = ExampleEncoder(self.tokenizer, "texts", ["text"], self.max_length, {"": prompt})
        return self._encoders[prompt]

    def _tokenize(self, encoder: ExampleEncoder, texts: list[str]) -> _Window:
        prompt, before, after = encoder.prompts[0], encoder.before, encoder.after
        prompted = [prompt + text for text in texts] if prompt else texts
        room = self.max_length - len(before) - len(after)
        ids = []
        for text, encoding in zip(
            texts, encoder.backend.encode_batch_fast(prompted, add_special_tokens=False), strict=True
        ):
            found = encoding.ids
            self.num_truncated += len(found) > room
            self.num_empty += not found or not text.strip()
            # A tokenizer without special tokens makes nothing of an empty text.
            ids.append(before + found[:room] + after or [self.tokenizer.pad_id or 0])
        skipped = 0 if self.model.include_prompt else encoder.prompt_lengths[0]
        return _Window(ids, [len(text.encode()) for text in texts], skipped)

    @torch.no_grad()
    def _encode_window(self, window: _Window, progress: Progress | None) -> np.ndarray:
        lengths = np.array([len(ids) for ids in window.ids])
        embeddings = torch.zeros(len(lengths), self.model.embedding_size, device=self.device)
        with evaluation_mode(self.model), self.autocast():
            half = torch.is_autocast_enabled(self.device.type)
            is_packed = self.device.type == "cuda" and half
            batches = self._batches(lengths, is_packed)
            rounds = -(-len(batches) // world_size())  # shards are gathered by all ranks, as often on each
            for number in range(rank(), rounds * world_size(), world_size()):
                places = batches[number % len(batches)]
                batch, documents = (self._packed if is_packed else self._padded)(window, places)
                found = self.model.embed(batch.to(self.device))
                if number >= len(batches):
                    continue
                found = found if documents is None else found[torch.from_numpy(documents).to(self.device)]
                embeddings[torch.from_numpy(places).to(self.device)] = found
                if progress is not None:
                    done = batches[number - rank() : number - rank() + world_size()]
                    texts = [place for places in done for place in places.tolist()]
                    num_bytes = sum(window.num_bytes[place] for place in texts)
                    progress.add(len(texts), num_bytes, int(lengths[texts].sum()))
        return all_reduce_sum_(embeddings).cpu().numpy()

    def _batches(self, lengths: np.ndarray, is_packed: bool) -> list[np.ndarray]:
        """The places of each batch's texts: the longest first, so that too large a batch is noticed at once."""
        order = np.argsort(-lengths, kind="stable")
        batches, first, used = [], 0, 0
        for number, length in enumerate(lengths[order].tolist()):
            used = used + length if is_packed else (number - first + 1) * int(lengths[order[first]])
            if used > self.tokens_per_batch and number > first:
                batches.append(order[first:number])
                first, used = number, length
        return [*batches, order[first:]]

    def _padded(self, window: _Window, places: np.ndarray) -> tuple[Batch, np.ndarray | None]:
        """A row for each text; and which documents are texts, where some are padding."""
        ids = [window.ids[place] for place in places]
        rows, width = len(ids), max(map(len, ids))
        tokens = np.full((rows, width), self.tokenizer.pad_id or 0)
        boundaries, texts = [], []
        for row, text in enumerate(ids):
            tokens[row, : len(text)] = text
            texts.append(len(boundaries))
            boundaries.append(row * width)
            if len(text) < width:
                boundaries.append(row * width + len(text))
        documents = len(boundaries)
        is_dense = documents == rows
        fields = dense_fields(tokens.shape) if is_dense else document_fields(np.array(boundaries), tokens.shape)
        batch = self._batch(tokens, documents, window.prompt_length, fields)
        return batch, None if is_dense else np.array(texts)

    def _packed(self, window: _Window, places: np.ndarray) -> tuple[Batch, None]:
        """One row of all texts, then padding."""
        ids = [window.ids[place] for place in places]
        lengths = np.array([len(text) for text in ids])
        total = int(lengths.sum())
        # A few texts get a shorter row, of few lengths.
        width = max(64, 1 << (total - 1).bit_length())
        width = width if width <= self.tokens_per_batch // 2 else max(self.tokens_per_batch, total)
        tokens = np.full((1, width), self.tokenizer.pad_id or 0)
        tokens[0, :total] = np.concatenate(ids)
        ends = np.cumsum(lengths)
        boundaries = np.concatenate(([0], ends if total < width else ends[:-1]))
        fields = document_fields(boundaries, tokens.shape)
        return self._batch(tokens, len(ids), window.prompt_length, fields), None

    def _batch(self, tokens: np.ndarray, num_texts: int, prompt_length: int, fields: dict) -> Batch:
        pool_from = torch.full((num_texts,), prompt_length, dtype=torch.int32) if prompt_length else None
        input_ids = torch.from_numpy(tokens)
        return Batch(input_ids=input_ids, num_targets=num_texts, num_texts=num_texts, pool_from=pool_from, **fields)


def _windows(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    window, size = [], 0
    for text in texts:
        window.append(text)
        size += len(text)
        if size >= characters or len(window) == TEXTS_PER_WINDOW:
            yield window
            window, size = [], 0
    if window:
        yield window
