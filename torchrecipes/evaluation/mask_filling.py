"""The predictions of a masked language model for `[MASK]`."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from torchrecipes.data.batching.batch import Batch
from torchrecipes.data.progress import Progress
from torchrecipes.errors import UserError
from torchrecipes.evaluation.over_texts import TextBatches, TextWindow, default_batch_tokens, tokenized_windows
from torchrecipes.evaluation.running import evaluation_mode
from torchrecipes.evaluation.text_tokens import flatten_ids, utf8_lengths
from torchrecipes.models.compatibility import max_positions
from torchrecipes.models.hf_adapter import adapter_of

if TYPE_CHECKING:
    from torchrecipes.data.tokenizers.tokenizer import Tokenizer

LOGITS_AT_ONCE = 1024  # masks whose logits are held at a time
NO_MASK, TOO_LONG = "no_mask", "too_long"


@dataclass(frozen=True)
class Prediction:
    """A prediction for a mask: the token's text, and its probability among all tokens that can be predicted."""

    token: str
    probability: float


class FilledTexts(NamedTuple):
    """The predictions for some texts.

    Attributes:
        num_masks: `[n]` int64, of each text; 0 where nothing is predicted.
        tokens: `[M, k]` int64, the most probable tokens for each mask, text by text in the order of the masks.
        probabilities: `[M, k]` float32, of these, among all tokens that can be predicted.
        reasons: why nothing is predicted, by the text's place: `no_mask`, or `too_long` for the model's positions.
    """

    num_masks: np.ndarray
    tokens: np.ndarray
    probabilities: np.ndarray
    reasons: dict[int, str]


def fill_mask(
    model: nn.Module,
    tokenizer: "Tokenizer",
    text: str,
    top_k: int = 5,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> list[list[Prediction]]:
    """The `top_k` most probable tokens for every mask in `text`, in the order of the masks.

    Args:
        model: gives hidden states and has a `head` (`torchrecipes.models.load_hf`).
        tokenizer: a `torchrecipes.data.tokenizers.Tokenizer`. Padding of its vocabulary is never predicted.
        text: contains the tokenizer's mask token at least once, as in `"The [MASK] is blue."`
        top_k: predictions per mask, at most the vocabulary.
        autocast: makes the context to compute in.

    Raises:
        UserError: `text` has no mask (code `no_mask`), or more tokens than the model has positions (`too_long`).
    """
    (found,) = MaskFiller(model, tokenizer, top_k=top_k, autocast=autocast).fill_iter([text])
    reason = found.reasons.get(0)
    if reason == NO_MASK:
        mask_token = tokenizer.decode_token(tokenizer.mask_id)
        hint = f"Put {mask_token} where the model is to predict a token."
        raise UserError(f"{text!r} has no {mask_token}", hint=hint, code=NO_MASK)
    if reason == TOO_LONG:
        count = len(tokenizer.encode_prompt(text))
        problem = f"the text has {count} tokens, and the model {max_positions(model)} positions"
        raise UserError(problem, hint="Shorten it.", code=TOO_LONG)
    return [
        [Prediction(tokenizer.decode_token(token), p) for token, p in zip(tokens, probabilities, strict=True)]
        for tokens, probabilities in zip(found.tokens.tolist(), found.probabilities.tolist(), strict=True)
    ]


class MaskFiller:
    """`fill_mask` for any number of texts, in batches of similar length.

        fill = MaskFiller(load_hf(folder, require_head=True), load_tokenizer(folder))
        for found in fill.fill_iter(["The [MASK] is blue.", "A [MASK] flies."]):
            print(found.tokens, found.probabilities)

    Args:
        model: on its device; gives hidden states and has a `head`. Its training modes are restored after every window.
        tokenizer: the model's own. Padding of its vocabulary is never predicted.
        top_k: predictions per mask, at most the vocabulary.
        tokens_per_batch: of a forward pass, at most, and one text at least. None: `default_batch_tokens`.
        autocast: makes the context to compute in.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: "Tokenizer",
        *,
        top_k: int = 5,
        tokens_per_batch: int | None = None,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.model, self.tokenizer, self.autocast = model, tokenizer, autocast
        self.top_k = min(top_k, tokenizer.unpadded_vocab_size)
        self.max_length = max_positions(model)
        self.device = next(model.parameters()).device
        self.tokens_per_batch = tokens_per_batch or default_batch_tokens(self.device)

    def fill_iter(self, texts: Iterable[str], progress: Progress | None = None) -> Iterator[FilledTexts]:
        """The predictions for texts, which may come from a generator, window by window.

        Names of special tokens in a text are the tokens. Two windows of texts are in memory at a time.

        Args:
            texts: some with masks.
            progress: counts what is done.
        """
        for window, num_masks, reasons in tokenized_windows(texts, self._tokenize, self.tokens_per_batch):
            with torch.no_grad(), evaluation_mode(self.model), self.autocast():
                tokens, probabilities = self._fill(window, num_masks, progress)
            if progress is not None:
                skipped = num_masks == 0
                progress.add(int(skipped.sum()), int(window.num_bytes[skipped].sum()))
            yield FilledTexts(num_masks, tokens, probabilities, reasons)

    def _fill(
        self, window: TextWindow, num_masks: np.ndarray, progress: Progress | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The most probable tokens at the masks of a window, and their probabilities."""
        batches = TextBatches(self.tokenizer.pad_id or 0, self.tokens_per_batch, self.device)
        make_batch = batches.packed if batches.are_packed() else batches.padded
        tokens = np.empty((num_masks.sum(), self.top_k), np.int64)
        probabilities = np.empty(tokens.shape, np.float32)
        first_masks = np.cumsum(num_masks) - num_masks
        filled = np.flatnonzero(num_masks)
        for part in batches.split(window.lengths[filled], batches.are_packed()):
            places = filled[part]
            batch, _ = make_batch(window, places)
            counts = num_masks[places]
            rows = np.arange(counts.sum()) + np.repeat(first_masks[places] - np.cumsum(counts) + counts, counts)
            probability, token = self._predict(batch.to(self.device))
            probabilities[rows], tokens[rows] = probability.cpu().numpy(), token.cpu().numpy()
            if progress is not None:
                progress.add(len(places), int(window.num_bytes[places].sum()), int(window.lengths[places].sum()))
        return tokens, probabilities

    def _predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """`[m, k]` probabilities and tokens at the m masks of a batch, row by row."""
        hidden = self.model(batch.input_ids, **batch.documents).flatten(0, 1)
        at_masks = hidden[(batch.input_ids == self.tokenizer.mask_id).flatten()]
        found = []
        for rows in at_masks.split(LOGITS_AT_ONCE):
            logits = self.model.head(rows)[:, : self.tokenizer.unpadded_vocab_size]
            found.append(logits.float().softmax(-1).topk(self.top_k))
        return torch.cat([top.values for top in found]), torch.cat([top.indices for top in found])

    def _tokenize(self, texts: list[str]) -> tuple[TextWindow, np.ndarray, dict[int, str]]:
        tokens, lengths = flatten_ids([found.ids for found in self.tokenizer.backend.encode_batch_fast(texts)])
        has_types = self.tokenizer.domain is not None and adapter_of(self.model).token_types
        types = self.tokenizer.token_type_ids(tokens, lengths) if has_types else None
        window = TextWindow(tokens, lengths, utf8_lengths(texts), token_type_ids=types)
        text_of = np.repeat(np.arange(len(texts)), lengths)
        num_masks = np.bincount(text_of[tokens == self.tokenizer.mask_id], minlength=len(texts))
        reasons = dict.fromkeys(np.flatnonzero(num_masks == 0).tolist(), NO_MASK)
        reasons |= dict.fromkeys(np.flatnonzero((num_masks > 0) & (lengths > self.max_length)).tolist(), TOO_LONG)
        num_masks[lengths > self.max_length] = 0
        return window, num_masks, reasons
