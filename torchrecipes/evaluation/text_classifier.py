"""`TextClassifier`: labels and probabilities of any number of texts, computed as `map_texts` does."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch

from torchrecipes.data.examples.encode import ExampleEncoder
from torchrecipes.data.progress import Progress
from torchrecipes.data.tokenizers.tokenizer import Tokenizer
from torchrecipes.errors import UserError
from torchrecipes.evaluation.over_texts import TextWindow, default_batch_tokens, map_texts
from torchrecipes.evaluation.text_tokens import tokenize_pairs, tokenize_texts, utf8_lengths
from torchrecipes.models import SequenceClassifier, max_positions

Text = str | tuple[str, str]


class Prediction(NamedTuple):
    """What a classifier says about a text.

    Attributes:
        labels: the most probable one; of a multi-label classifier those whose probability is its threshold or more; ()
            for a regression, and for an empty text.
        scores: `[L]` float32: a probability for each label, or the numbers of a regression; NaN for an empty text.
        reason: why a text is no valid domain name (`torchrecipes.data.domains.REASONS`), for a tokenizer of domain
            names: it has no label. None: it has one, or it is empty.
    """

    labels: tuple[str, ...]
    scores: np.ndarray
    reason: str | None = None


class Predictions(NamedTuple):
    """What a classifier says about n texts.

    Attributes:
        labels: of each text, as in `Prediction`.
        scores: `[n, L]` float32, as in `Prediction`.
        reasons: why texts are no valid domain names, by their places, as in `Prediction`.
    """

    labels: list[tuple[str, ...]]
    scores: np.ndarray
    reasons: dict[int, str]


class TextClassifier:
    """Classifies texts or pairs of texts, on all ranks of a run together.

        classify = TextClassifier(load_classifier(folder), load_tokenizer(folder))
        for prediction in classify.predict(["a text", "another one"]):
            print(prediction.labels, prediction.scores)

    Args:
        model: on its device; its modules' training modes are restored after every window.
        tokenizer: the model's own.
        max_length: tokens of a text or a pair, special tokens included; a longer one is cut as in training. None: as in
            training where config.json says it, else all positions of the model.
        tokens_per_batch: of a forward pass, at most, and one text at least. None: `default_batch_tokens`.
        autocast: makes the context to compute in.

    Attributes:
        num_truncated: texts that were longer than `max_length`, so far.
        num_empty: texts, or pairs with a text, without a token, so far.
        invalid_names: texts that are no domain names, so far, by reason.

    Raises:
        UserError: `max_length` is more than the model takes (code `out_of_range`).
    """

    def __init__(
        self,
        model: SequenceClassifier,
        tokenizer: Tokenizer,
        *,
        max_length: int | None = None,
        tokens_per_batch: int | None = None,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.model, self.tokenizer, self.autocast = model, tokenizer, autocast
        positions = max_positions(model)
        self.max_length = max_length or min(model.labels.max_length or positions, positions)
        if self.max_length > positions:
            wanted = f"at most the {positions} tokens that the model takes"
            raise UserError(f"{max_length} must be {wanted}", key="max_length", code="out_of_range")
        self.tokens_per_batch = tokens_per_batch or default_batch_tokens(next(model.parameters()).device)
        self.num_truncated = self.num_empty = 0
        self.invalid_names: Counter[str] = Counter()
        self._encoders: dict[bool, ExampleEncoder] = {}

    def predict(self, texts: Sequence[Text], progress: Progress | None = None) -> list[Prediction]:
        """Predictions for texts, or for pairs of texts, in their order; the same on all ranks."""
        return [prediction for part in self.predict_iter(texts, progress) for prediction in part]

    def predict_iter(self, texts: Iterable[Text], progress: Progress | None = None) -> Iterator[list[Prediction]]:
        """`predict` for any number of texts, which may come from a generator: yields them window by window."""
        for found in self.predict_windows(texts, progress):
            yield [
                Prediction(labels, scores, found.reasons.get(place))
                for place, (labels, scores) in enumerate(zip(found.labels, found.scores, strict=True))
            ]

    def predict_windows(self, texts: Iterable[Text], progress: Progress | None = None) -> Iterator[Predictions]:
        """`predict_iter` with arrays, for millions of short texts."""
        for logits, reasons in self._windows(texts, progress):
            scores = self.model.labels.probabilities(torch.from_numpy(logits)).numpy()
            yield Predictions(self._labels(scores), scores, reasons)

    def logits(self, texts: Sequence[Text]) -> np.ndarray:
        """`[n, L]` float32, in the order of the texts; NaN for an empty text."""
        return np.concatenate([np.empty((0, self.model.num_labels), np.float32), *self.logits_iter(texts)])

    def logits_iter(self, texts: Iterable[Text], progress: Progress | None = None) -> Iterator[np.ndarray]:
        """`logits`, window by window."""
        return (logits for logits, _ in self._windows(texts, progress))

    def _windows(self, texts: Iterable[Text], progress: Progress | None) -> Iterator[tuple[np.ndarray, dict[int, str]]]:
        """The logits of the texts of each window; and by their places, why some are no domain names."""
        kept: deque[tuple[np.ndarray, dict[int, str]]] = deque()

        def tokenize(window: list[Text]) -> TextWindow:
            found, without_label, reasons = self._tokenize(window)
            kept.append((without_label, reasons))
            return found

        options = {"model": self.model, "pad_id": self.tokenizer.pad_id or 0, "autocast": self.autocast}
        options |= {"tokens_per_batch": self.tokens_per_batch, "progress": progress, "size_of": _size}
        for logits in map_texts(texts, tokenize, self.model.classify, self.model.num_labels, **options):
            without_label, reasons = kept.popleft()
            logits[without_label] = np.nan
            yield logits, reasons

    def _tokenize(self, texts: list[Text]) -> tuple[TextWindow, np.ndarray, dict[int, str]]:
        is_pair, pad_id = not isinstance(texts[0], str), self.tokenizer.pad_id or 0
        if is_pair not in self._encoders:
            columns = ("text", "text_pair")[: 1 + is_pair]
            self._encoders[is_pair] = ExampleEncoder(self.tokenizer, "labeled", columns, self.max_length)
        found = (tokenize_pairs if is_pair else tokenize_texts)(self._encoders[is_pair], texts, pad_id)
        self.num_truncated += int(found.is_truncated.sum())
        self.num_empty += int(found.is_empty.sum())
        reasons, without_label = found.reasons or {}, found.is_empty
        self.invalid_names.update(reasons.values())
        without_label[list(reasons)] = True
        num_bytes = sum(map(utf8_lengths, zip(*texts, strict=True))) if is_pair else utf8_lengths(texts)
        types = found.token_type_ids if self.model.hf_adapter.token_types else None
        return TextWindow(found.tokens, found.lengths, num_bytes, token_type_ids=types), without_label, reasons

    def _labels(self, scores: np.ndarray) -> list[tuple[str, ...]]:
        labels = self.model.labels
        if labels.task == "regression":
            return [()] * len(scores)
        if labels.task == "single_label":
            tuples = [*((name,) for name in labels.names), ()]
            return [tuples[number] for number in np.where(np.isnan(scores[:, 0]), -1, scores.argmax(1)).tolist()]
        holds = scores >= (0.5 if labels.thresholds is None else np.array(labels.thresholds))
        return [tuple(name for name, yes in zip(labels.names, row, strict=True) if yes) for row in holds.tolist()]


def _size(text: Text) -> int:
    return len(text) if isinstance(text, str) else len(text[0]) + len(text[1])
