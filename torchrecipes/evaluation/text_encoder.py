"""`TextEncoder`: embeddings of any number of texts, computed as `map_texts` does."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import numpy as np

from torchrecipes.data.examples.encode import ExampleEncoder
from torchrecipes.data.progress import Progress
from torchrecipes.data.tokenizers.tokenizer import Tokenizer
from torchrecipes.errors import UserError
from torchrecipes.evaluation.over_texts import TextWindow, default_batch_tokens, map_texts
from torchrecipes.evaluation.text_tokens import tokenize_texts, utf8_lengths
from torchrecipes.evaluation.text_vectors import TextVectors, encode_vectors
from torchrecipes.models.embedding_model import EmbeddingModel


class TextEncoder:
    """Turns texts into embeddings, on all ranks of a run together.

        encode = TextEncoder(load_embedding_model(folder), load_tokenizer(folder))
        embeddings = encode.encode(["a text", "another one"], prompt="query")

    Args:
        model: on its device; its modules' training modes are restored after every window.
        tokenizer: the model's own.
        max_length: tokens of a text, with prompt and special tokens; the end of what is longer is cut off. None:
            `model.max_length`.
        tokens_per_batch: of a forward pass, at most, and one text at least. None: `default_batch_tokens`.
        autocast: makes the context to compute in.

    Attributes:
        num_truncated: texts that were longer than `max_length`, so far.
        num_empty: texts without a token of their own, so far: their embeddings are those of no text.
        invalid_names: for a tokenizer of domain names: texts that are none so far, by reason
            (`torchrecipes.data.domains.REASONS`). They are embedded as they are written.
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
        self.tokens_per_batch = tokens_per_batch or default_batch_tokens(self.device)
        self.num_truncated = self.num_empty = 0
        self.invalid_names: Counter[str] = Counter()
        self._encoders: dict[str, ExampleEncoder] = {}

    def encode(
        self, texts: Sequence[str], prompt: str | None = "", progress: Progress | None = None
    ) -> "np.ndarray | TextVectors":
        """Embeddings of texts, `[n, E]` float32, in their order; the same on all ranks.

        With late interaction, `TextVectors`.

        Args:
            texts: the same on all ranks, in any order.
            prompt: the name of the prompt that is put before each, such as `query`; "": none; None: the model's
                default prompt.
            progress: counts what is done.

        Raises:
            UserError: the model has no such prompt (code `unknown_prompt`).
        """
        if self.model.late_interaction is not None:
            return encode_vectors(self, texts, prompt, progress)
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

        Raises:
            UserError: as `encode`; a model with late interaction (code `several_vectors`).
        """
        if self.model.late_interaction is not None:
            raise UserError(
                "the model gives a vector for every token, and this needs one for every text",
                hint="Search with torchrecipes.evaluation.Retrieval, or load the folder with pylate.",
                code="several_vectors",
            )
        encoder = self._encoder(self.model.prompt(prompt))
        return map_texts(
            texts,
            partial(self._tokenize, encoder),
            self.model.embed,
            self.model.embedding_size,
            model=self.model,
            pad_id=self.tokenizer.pad_id or 0,
            tokens_per_batch=self.tokens_per_batch,
            autocast=self.autocast,
            progress=progress,
        )

    def tokenize(self, texts: Sequence[str], prompt: str | None = "") -> TextWindow:
        """The tokens of texts with their prompt, cut to `max_length`.

        Raises:
            UserError: the model has no such prompt (code `unknown_prompt`).
        """
        return self._tokenize(self._encoder(self.model.prompt(prompt)), list(texts))

    def _encoder(self, prompt: str) -> ExampleEncoder:
        if prompt not in self._encoders:
            self._encoders[prompt] = ExampleEncoder(self.tokenizer, "texts", ["text"], self.max_length, {"": prompt})
        return self._encoders[prompt]

    def _tokenize(self, encoder: ExampleEncoder, texts: list[str]) -> TextWindow:
        prompt = encoder.prompts[0]
        prompted = [prompt + text for text in texts] if prompt else texts
        found = tokenize_texts(encoder, prompted, self.tokenizer.pad_id or 0)
        is_blank = np.fromiter((not text.strip() for text in texts), bool, len(texts))
        self.num_truncated += int(found.is_truncated.sum())
        self.num_empty += int((found.is_empty | is_blank).sum())
        self.invalid_names.update((found.reasons or {}).values())
        skipped = 0 if self.model.include_prompt else encoder.prompt_lengths[0]
        types = found.token_type_ids if self.model.hf_adapter.token_types else None
        return TextWindow(found.tokens, found.lengths, utf8_lengths(texts), skipped, types)
