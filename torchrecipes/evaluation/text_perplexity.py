"""The perplexity of text under a causal language model.

Every token of a document's text is scored once, given the tokens before it in that document; the first one given the
token that begins a document. Special tokens at the beginning and end of a document are not scored.

A document longer than the model's window is read in overlapping windows: each begins `stride` tokens after the previous
one and scores what that has not scored, so a token has at least `window - stride` tokens before it (or the whole
beginning of the document). A smaller stride takes more time and comes closer to a full window before every token.

Windows are packed into rows, the longest first, and attention stays inside each. Rows are as long as the text needs:
rows of all of a model's positions would be mostly padding where documents are short.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from torchrecipes.data.batching.batch import dense_fields, document_fields
from torchrecipes.devices import float64_device, to_float64
from torchrecipes.errors import UserError
from torchrecipes.evaluation.position_loss import add_sums, loss_by_position, means_by_position
from torchrecipes.evaluation.running import evaluation_mode
from torchrecipes.losses import linear_cross_entropy

BATCH_TOKENS = 16_384  # per forward pass, unless a number of rows is given
ROW_LENGTH = 1_024  # tokens of a row, unless a window is longer, or all windows are shorter
BATCHES_SORTED = 16  # batches of windows that are sorted by length together, so that rows are full


class Tokens(NamedTuple):
    """A document: `ids`, the first of which is not scored, and the size of its text in bytes (UTF-8)."""

    ids: list[int]
    num_bytes: int


@dataclass(frozen=True)
class Perplexity:
    """The result of `perplexity`. Where nothing was scored, the means are NaN.

    Attributes:
        documents: number of documents.
        tokens: number of scored tokens.
        bytes: size of the documents' text in UTF-8.
        total_nll: sum of the scored tokens' negative log-probabilities, in nats.
        by_position: the mean loss for ranges of positions in the window, as `loss/0-511`; empty unless asked for.
    """

    documents: int
    tokens: int
    bytes: int
    total_nll: float
    by_position: dict[str, float] = field(default_factory=dict)

    @property
    def nll_per_token(self) -> float:
        """The loss: the mean over the tokens, in nats."""
        return self.total_nll / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """`exp(nll_per_token)`: so many equally probable tokens would be as hard to predict."""
        return math.exp(min(self.nll_per_token, 700))

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text, which compares models with different tokenizers."""
        return self.total_nll / math.log(2) / self.bytes if self.bytes else math.nan

    @property
    def bytes_per_token(self) -> float:
        """The mean length of a token."""
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
    on_progress: Callable[[int, int, int], None] | None = None,
    position_edges: Sequence[int] = (),
) -> Perplexity:
    """Scores documents. No random generator is touched, and training modes are restored.

    Args:
        model: a causal one that gives hidden states, with a `head`.
        documents: may be a generator; a few batches are in memory at a time.
        window: tokens that the model attends to. None: its `max_position_embeddings`.
        stride: tokens between the beginnings of two windows. None: half a window.
        rows: a forward pass takes about as many tokens as this many windows have. None: about 16,384 tokens, and at
            least one window.
        autocast: makes the context to compute in.
        on_progress: called now and then with the documents, bytes and scored tokens since the last call.
        position_edges: of ranges of positions whose losses are computed, too: see `loss_by_position`. The position of a
            predicted token is that of the token before it, of which the model makes the prediction.

    Raises:
        UserError: `window`, `stride` or `rows` is out of range, or an id is not in the model's vocabulary.
    """
    window, stride, at_once = _check_windows(model, window, stride, rows)
    device = next(model.parameters()).device
    total_nll = torch.zeros((), dtype=torch.float64, device=float64_device(device))
    total_documents = total_tokens = total_bytes = 0
    by_position: dict[str, Tensor] = {}
    with evaluation_mode(model):
        for group, num_documents, num_bytes in _collect(documents, window, stride, BATCHES_SORTED * at_once):
            capacity = max([min(window, ROW_LENGTH), *(len(piece.ids) - 1 for piece in group)])
            packed, rows = _pack(group, capacity), max(1, at_once // capacity)
            for first in range(0, len(packed), rows):
                pieces = packed[first : first + rows]
                inputs, scored, labels = _batch(pieces, model.config.vocab_size, device)
                with autocast():
                    hidden = model(**inputs).flatten(0, 1).index_select(0, scored)
                    hidden = getattr(model.head, "transform", nn.Identity())(hidden)
                    nll, token_loss = linear_cross_entropy(
                        hidden, model.head.weight, labels, model.head.bias, return_token_loss=True
                    )
                    total_nll += to_float64(nll)
                if position_edges:
                    positions = inputs["position_ids"].expand_as(inputs["input_ids"]).flatten()[scored]
                    add_sums(by_position, loss_by_position(token_loss, positions, position_edges))
                tokens = sum(len(ids) - scored_from for row in pieces for ids, scored_from in row)
                total_tokens += tokens
                if on_progress:
                    before, now = (num_bytes * done // len(packed) for done in (first, first + len(pieces)))
                    on_progress(num_documents if first + rows >= len(packed) else 0, now - before, tokens)
            total_documents += num_documents
            total_bytes += num_bytes
    means = means_by_position(by_position)
    return Perplexity(total_documents, total_tokens, total_bytes, float(total_nll), means)


class Window(NamedTuple):
    """`ids[i + 1]` is predicted from `ids[: i + 1]`, and scored for `i + 1 >= scored_from`."""

    ids: list[int]
    scored_from: int


def windows(ids: list[int], window: int, stride: int) -> Iterator[Window]:
    """The windows of a document. The model reads all but the last token of each, at most `window`."""
    scored = 1
    for start in range(0, len(ids), stride):
        stop = min(start + window + 1, len(ids))
        if stop > scored:
            yield Window(ids[start:stop], scored - start)
            scored = stop
        if stop == len(ids):
            return


def encode_documents(tokenizer, texts: Iterable[str], at_once: int = 64) -> Iterator[Tokens]:
    """Documents as `perplexity` takes them: `<begin> text`, without the token that ends a document.

    Args:
        tokenizer: a `torchrecipes.data` Tokenizer. If it puts no token before a text, its `bos` or `eos` token is.
        texts: the documents.
        at_once: documents that are tokenized together.

    Raises:
        UserError: the tokenizer has no token to put before a text (code `no_bos_token`).
    """
    begin = {tokenizer.bos_id, tokenizer.cls_id, tokenizer.eos_id} - {None}
    end = {tokenizer.eos_id, tokenizer.sep_id} - {None}
    first = next((i for i in (tokenizer.bos_id, tokenizer.cls_id, tokenizer.eos_id) if i is not None), None)
    if first is None:
        raise UserError(
            "the tokenizer has neither a bos nor an eos token to put before a text's first token",
            hint='Name one in tokenizer_config.json, as in "bos_token": "<|endoftext|>".',
            code="no_bos_token",
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
        wanted = f"1 to {positions} tokens, the model's positions"
        raise UserError(f"{window} must be {wanted}", key="window", code="out_of_range")
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride <= window:
        raise UserError(f"{stride} must be 1 to {window} tokens, the window", key="stride", code="out_of_range")
    if rows is not None and rows < 1:
        raise UserError(f"{rows} must be 1 or more", key="rows", code="out_of_range")
    return window, stride, BATCH_TOKENS if rows is None else rows * window


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
    """Groups of windows of about `num_tokens` tokens, with the documents that end in them and the bytes they score."""
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
    """Packs windows into rows, the longest first, each where it fits most tightly (best fit decreasing)."""
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
    """The model's inputs, `[B, longest row]`, and the scored flat positions with their labels."""
    width = max(sum(len(ids) - 1 for ids, _ in row) for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full((len(rows), width), -1)
    longest = max(len(ids) - 1 for row in rows for ids, _ in row)
    boundaries = []
    for number, row in enumerate(rows):
        start = 0
        for ids, scored_from in row:
            stop = start + len(ids) - 1
            tokens = torch.tensor(ids)
            input_ids[number, start:stop] = tokens[:-1]
            boundaries.append(number * width + start)
            labels[number, start + scored_from - 1 : stop] = tokens[scored_from:]
            start = stop
        while start < width:  # padding is more documents, none longer than the others
            stop = min(start + longest, width)
            boundaries.append(number * width + start)
            start = stop
    highest = max(int(input_ids.max()), int(labels.max()))
    if highest >= vocab_size:  # on a GPU it would end the process
        raise UserError(
            f"the text has the id {highest:,}, and the model {vocab_size:,} tokens",
            hint="Use the model's own tokenizer.",
            code="id_out_of_range",
        )
    shape = (len(rows), width)
    # A row of one window needs no boundaries: padding follows, to which no earlier token attends.
    alone = all(len(row) == 1 for row in rows)
    documents = dense_fields(shape) if alone else document_fields(np.array(boundaries), shape)
    inputs = {"input_ids": input_ids, **documents}
    inputs = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    scored = (labels.flatten() >= 0).nonzero().squeeze(1)
    return inputs, scored.to(device), labels.flatten()[scored].to(device)
