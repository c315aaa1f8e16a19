"""Perplexity of text under a causal language model.

Every token of a document's text is scored once, given the tokens before it in the document; the first one given the
token that begins documents. Begin and end tokens are never scored.

A document longer than the model's window is scored in overlapping windows. Each starts `stride` tokens after the
previous one and scores the tokens that it did not, so a token has at least `window - stride` tokens of context (unless
its document begins later). A smaller stride takes more time and is closer to a full window of context for every token.

Windows are packed into rows, the longest first, and attention stays inside each. Rows are only as long as the text
needs, or short documents under a model with many positions would be mostly padding.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchrecipes.errors import UserError
from torchrecipes.losses import linear_cross_entropy

TOKENS_AT_ONCE = 16_384  # per forward pass, unless a number of rows is given
ROW = 1_024  # tokens that a row has room for, unless a window is longer or no window can be so long
BATCHES_COLLECTED = 16  # of windows that are sorted by length together, so that rows are full


class Tokens(NamedTuple):
    """A tokenized document: `ids`, the first of which is not scored, and the size of its text in UTF-8 bytes."""

    ids: list[int]
    num_bytes: int


@dataclass(frozen=True)
class Perplexity:
    """The scores of a text. Without scored tokens the means are NaN.

    Attributes:
        documents: number of documents.
        tokens: number of scored tokens.
        bytes: size of the text in UTF-8.
        total_nll: sum of the negative log-likelihoods of the scored tokens, in nats. `nll_per_token` is their mean,
            `perplexity` its exponential; `bits_per_byte` is comparable across tokenizers.
    """

    documents: int
    tokens: int
    bytes: int
    total_nll: float

    @property
    def nll_per_token(self) -> float:
        """Mean negative log-likelihood of a token, in nats: the loss."""
        return self.total_nll / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """The exponential of `nll_per_token`."""
        return math.exp(min(self.nll_per_token, 700))

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte of text, comparable across tokenizers."""
        return self.total_nll / math.log(2) / self.bytes if self.bytes else math.nan

    @property
    def bytes_per_token(self) -> float:
        """Mean length of a token in UTF-8 bytes."""
        return self.bytes / self.tokens if self.tokens else math.nan

    def as_dict(self) -> dict[str, float]:
        """All figures by name."""
        names = ("nll_per_token", "perplexity", "bits_per_byte", "bytes_per_token")
        return asdict(self) | {name: getattr(self, name) for name in names}


@torch.no_grad()
def perplexity(
    model: nn.Module,
    documents: Iterable[Tokens],
    *,
    window: int | None = None,
    stride: int | None = None,
    rows: int | None = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    tell: Callable[[int, int, int], None] | None = None,
) -> Perplexity:
    """Scores documents. No random generator is used, and training mode is restored.

    Args:
        model: a causal model that returns hidden states and has a `head`.
        documents: may be a generator; a few batches are in memory at a time.
        window: tokens per window. None: the model's `max_position_embeddings`.
        stride: tokens between the starts of two windows. None: half a window.
        rows: windows per forward pass; shorter texts are packed into as many tokens. None: about 16,384 tokens, at
            least one window.
        autocast: returns the context to compute in.
        tell: called now and then with the documents, bytes and scored tokens since the last call.

    Raises:
        UserError: window, stride or rows are out of range, or an id is one that the model does not have.
    """
    window, stride, at_once = _check_windows(model, window, stride, rows)
    device = next(model.parameters()).device
    total_nll = torch.zeros((), dtype=torch.float64, device=device)
    total_documents = total_tokens = total_bytes = 0
    was_training = model.training
    model.eval()
    try:
        for group, num_documents, num_bytes in _collect(documents, window, stride, BATCHES_COLLECTED * at_once):
            capacity = max([min(window, ROW), *(len(piece.ids) - 1 for piece in group)])
            packed, rows = _pack(group, capacity), max(1, at_once // capacity)
            for first in range(0, len(packed), rows):
                pieces = packed[first : first + rows]
                inputs, scored, labels = _batch(pieces, model.config.vocab_size, device)
                with autocast():
                    hidden = model(**inputs).flatten(0, 1).index_select(0, scored)
                    hidden = model.head.transform(hidden)
                    total_nll += linear_cross_entropy(hidden, model.head.weight, labels, model.head.bias)
                tokens = sum(len(ids) - scored_from for row in pieces for ids, scored_from in row)
                total_tokens += tokens
                if tell:
                    before, now = (num_bytes * done // len(packed) for done in (first, first + len(pieces)))
                    tell(num_documents if first + rows >= len(packed) else 0, now - before, tokens)
            total_documents += num_documents
            total_bytes += num_bytes
    finally:
        model.train(was_training)
    return Perplexity(total_documents, total_tokens, total_bytes, float(total_nll))


class Window(NamedTuple):
    """`ids[i + 1]` is predicted from `ids[: i + 1]`, and scored for `i + 1 >= scored_from`."""

    ids: list[int]
    scored_from: int


def windows(ids: list[int], window: int, stride: int) -> Iterator[Window]:
    """The windows of a document: at most `window + 1` tokens each; the model reads all but the last."""
    scored = 1
    for start in range(0, len(ids), stride):
        stop = min(start + window + 1, len(ids))
        if stop > scored:
            yield Window(ids[start:stop], scored - start)
            scored = stop
        if stop == len(ids):
            return


def encode_documents(tokenizer, texts: Iterable[str], at_once: int = 64) -> Iterator[Tokens]:
    """Tokenizes texts for `perplexity`: `<begin> text`, without an end token.

    Args:
        tokenizer: if it prepends nothing to a text, its `bos` or `eos` token is prepended.
        texts: the documents.
        at_once: documents tokenized together.

    Raises:
        UserError: the tokenizer has neither a bos nor an eos token.
    """
    begin = {tokenizer.bos_id, tokenizer.cls_id, tokenizer.eos_id} - {None}
    end = {tokenizer.eos_id, tokenizer.sep_id} - {None}
    first = next((i for i in (tokenizer.bos_id, tokenizer.cls_id, tokenizer.eos_id) if i is not None), None)
    if first is None:
        raise UserError(
            "this tokenizer has neither a bos nor an eos token, so nothing can stand before a text's first token. Name "
            'one in tokenizer_config.json, as in "bos_token": "<|endoftext|>".'
        )
    for some in _in_groups(texts, at_once):
        for text, ids in zip(some, tokenizer.encode_batch(some), strict=True):
            if not ids or ids[0] not in begin:
                ids = [first, *ids]
            if len(ids) > 1 and ids[-1] in end:
                ids = ids[:-1]
            yield Tokens(ids, len(text.encode("utf-8")))


def _check_windows(model: nn.Module, window: int | None, stride: int | None, rows: int | None) -> tuple[int, int, int]:
    positions = model.config.max_position_embeddings
    window = positions if window is None else window
    if not 1 <= window <= positions:
        raise UserError(
            f"the window is {window} tokens; it is at least 1 and at most the model's {positions} positions."
        )
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride <= window:
        raise UserError(f"the stride is {stride} tokens; it is 1 or more, and at most the window, {window}.")
    if rows is not None and rows < 1:
        raise UserError(f"{rows} rows per batch; it is 1 or more.")
    return window, stride, TOKENS_AT_ONCE if rows is None else rows * window


def _in_groups(items: Iterable, size: int) -> Iterator[list]:
    group = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _collect(
    documents: Iterable[Tokens], window: int, stride: int, num_tokens: int
) -> Iterator[tuple[list[Window], int, int]]:
    """Batches of windows with about `num_tokens` tokens, the number of documents that end in each, and their bytes."""
    group, held, count, num_bytes = [], 0, 0, 0
    for document in documents:
        left, unscored = document.num_bytes, len(document.ids) - 1
        for piece in windows(document.ids, window, stride):
            scored = len(piece.ids) - piece.scored_from
            share = left * scored // unscored
            left, unscored = left - share, unscored - scored
            group.append(piece)
            held += len(piece.ids) - 1
            num_bytes += share
            if held >= num_tokens:
                yield group, count, num_bytes
                group, held, count, num_bytes = [], 0, 0, 0
        count, num_bytes = count + 1, num_bytes + left
    if count:
        yield group, count, num_bytes


def _pack(group: list[Window], capacity: int) -> list[list[Window]]:
    """Packs windows into rows with best-fit decreasing: the longest first, each where it fits most tightly."""
    rows: list[list[Window]] = []
    room: list[tuple[int, int]] = []  # (tokens that still fit, number of the row), sorted
    for piece in sorted(group, key=lambda piece: -len(piece.ids)):
        length = len(piece.ids) - 1
        fits = bisect_left(room, (length, 0))
        if fits == len(room):
            rows.append([])
            room.append((capacity, len(rows) - 1))
        left, row = room.pop(fits)
        rows[row].append(piece)
        insort(room, (left - length, row))
    return rows


def _batch(
    rows: list[list[Window]], vocab_size: int, device: torch.device
) -> tuple[dict[str, Tensor | int | None], Tensor, Tensor]:
    """The model's inputs `[B, longest row]`, the flat positions to score, and their labels."""
    width = max(sum(len(ids) - 1 for ids, _ in row) for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    position_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full((len(rows), width), -1)
    longest = max(len(ids) - 1 for row in rows for ids, _ in row)
    ends = [0]
    for number, row in enumerate(rows):
        start = 0
        for ids, scored_from in row:
            stop = start + len(ids) - 1
            tokens = torch.tensor(ids)
            input_ids[number, start:stop] = tokens[:-1]
            position_ids[number, start:stop] = torch.arange(stop - start)
            labels[number, start + scored_from - 1 : stop] = tokens[scored_from:]
            ends.append(number * width + stop)
            start = stop
        while start < width:  # padding is documents, none longer than the others
            stop = min(start + longest, width)
            position_ids[number, start:stop] = torch.arange(stop - start)
            ends.append(number * width + stop)
            start = stop
    highest = max(int(input_ids.max()), int(labels.max()))
    if highest >= vocab_size:  # on a GPU this would end the process
        raise UserError(
            f"the text has the id {highest:,}, and the model {vocab_size:,} tokens. Take the model's own tokenizer."
        )
    # A row that one window begins needs no boundaries: what follows is padding, which no earlier token sees.
    alone = all(len(row) == 1 for row in rows)
    inputs = {
        "input_ids": input_ids.to(device),
        "position_ids": position_ids.to(device),
        "cu_seqlens": None if alone else torch.tensor(ends, dtype=torch.int32).to(device),
        "max_seqlen": width if alone else longest,
    }
    scored = (labels.flatten() >= 0).nonzero().squeeze(1)
    return inputs, scored.to(device), labels.flatten()[scored].to(device)
