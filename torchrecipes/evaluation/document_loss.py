"""The loss of every document of a text under a model, causal or masked: outliers are often bad data.

1. A document longer than the model's positions is read in pieces, one after the other, each by itself.
2. The pieces of many documents are sorted by length, so that the rows of a batch are full.
3. The losses of the tokens are added up by document on the device (`index_add_`), and read once for many batches.

A causal model predicts every token of the text from those before it. A masked model predicts the tokens that are hidden
once, as in an evaluation; what is hidden depends on a seed and on the document alone.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from torchrecipes.data.batching import MLMCollator
from torchrecipes.data.batching.batch import dense_fields, document_fields
from torchrecipes.data.batching.shuffle import fold_in
from torchrecipes.devices import float64_device, to_float64
from torchrecipes.errors import UserError
from torchrecipes.evaluation.running import evaluation_mode
from torchrecipes.evaluation.text_perplexity import windows
from torchrecipes.losses import causal_lm_loss, masked_lm_loss
from torchrecipes.models.compatibility import max_positions
from torchrecipes.models.hf_adapter import adapter_of

if TYPE_CHECKING:
    from torchrecipes.data.tokenizers.tokenizer import Tokenizer

BATCH_TOKENS = 16_384  # per forward pass
BATCHES_SORTED = 16  # batches of pieces that are sorted by length together
IGNORED = -100


class DocumentLoss(NamedTuple):
    """The sum of the losses of a document's predicted tokens, in nats, and their number."""

    total: float
    tokens: int


class _Piece(NamedTuple):
    document: int  # its place in the group
    ids: list[int]
    key: int  # from which a masked model's targets are drawn


@torch.no_grad()
def document_losses(
    model: nn.Module,
    documents: Iterable[list[int]],
    *,
    collator: MLMCollator | None = None,
    tokenizer: "Tokenizer | None" = None,
    seed: int = 0,
    window: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Iterator[DocumentLoss]:
    """Yields the loss of every document, in order. No random generator is touched, and training modes are restored.

    Args:
        model: gives hidden states and has a `head`; a causal one, or with `collator` a masked one.
        documents: the ids of each. For a causal model the first one is not predicted (`encode_documents`). May be a
            generator: some hundred thousand tokens are in memory at a time.
        collator: hides the targets of a masked model.
        tokenizer: gives a masked model of domain names their token types.
        seed: chooses them.
        window: tokens that the model attends to. None: all of its positions.
        batch_tokens: tokens of a forward pass, at most; one piece at least.
        autocast: makes the context to compute in.

    Raises:
        UserError: `window` is out of range, or an id is not in the model's vocabulary.
    """
    positions = max_positions(model)
    window = positions if window is None else window
    if not 1 <= window <= positions:
        wanted = f"1 to {positions} tokens, the model's positions"
        raise UserError(f"{window} must be {wanted}", key="window", code="out_of_range")
    has_types = tokenizer is not None and tokenizer.domain is not None and adapter_of(model).token_types
    types = tokenizer.token_type_ids if has_types else None
    group: list[_Piece] = []
    count = held = 0
    for ids in documents:
        found = _pieces(count, ids, window, collator is not None, seed)
        group += found
        held += sum(len(piece.ids) for piece in found)
        count += 1
        if held >= BATCHES_SORTED * batch_tokens:
            yield from _score(model, group, count, collator, types, batch_tokens, autocast)
            group, count, held = [], 0, 0
    if count:
        yield from _score(model, group, count, collator, types, batch_tokens, autocast)


def _pieces(document: int, ids: list[int], window: int, is_masked: bool, seed: int) -> list[_Piece]:
    if not is_masked:
        return [_Piece(document, piece.ids, 0) for piece in windows(ids, window, window)]
    content = xxhash.xxh3_64_intdigest(np.array(ids, np.int64).tobytes()) >> 1
    starts = range(0, len(ids), window)
    keys = fold_in(seed, content, np.arange(len(starts))).tolist()
    return [_Piece(document, ids[i : i + window], key) for i, key in zip(starts, keys, strict=True)]


def _score(
    model: nn.Module,
    group: list[_Piece],
    count: int,
    collator: MLMCollator | None,
    types: Callable[[np.ndarray, np.ndarray], np.ndarray] | None,
    batch_tokens: int,
    autocast: Callable[[], AbstractContextManager],
) -> list[DocumentLoss]:
    device = next(model.parameters()).device
    totals = torch.zeros(count, dtype=torch.float64, device=float64_device(device))
    targets = torch.zeros(count, dtype=torch.int64, device=device)
    group.sort(key=lambda piece: -len(piece.ids))
    with evaluation_mode(model):
        first = 0
        while first < len(group):
            rows = group[first : first + max(1, batch_tokens // len(group[first].ids))]
            first += len(rows)
            documents = torch.tensor([piece.document for piece in rows], device=device)
            if collator is None:
                losses, is_target, row = _causal(model, rows, autocast, device)
            else:
                losses, is_target, row = _masked(model, rows, collator, types, autocast, device)
            totals.index_add_(0, documents[row].to(totals.device), to_float64(losses))
            targets.index_add_(0, documents[row], is_target.long())
    return [DocumentLoss(total, n) for total, n in zip(totals.tolist(), targets.tolist(), strict=True)]


def _causal(model, rows, autocast, device) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, whether there is one, and the row of each, `[B * S]`."""
    width = max(1, len(rows[0].ids) - 1)
    inputs, labels = np.zeros((len(rows), width), np.int64), np.full((len(rows), width), IGNORED)
    for number, (_, ids, _) in enumerate(rows):
        inputs[number, : len(ids) - 1] = ids[:-1]
        labels[number, : len(ids) - 1] = ids[1:]
    _check_ids(model, max(inputs.max(), labels.max()))
    # Padding follows the text, and no token attends to a later one.
    documents = _to(device, dense_fields(inputs.shape))
    labels = torch.from_numpy(labels).to(device)
    with autocast():
        hidden = model(torch.from_numpy(inputs).to(device), **documents)
        _, losses = causal_lm_loss(hidden, model.head, labels, return_token_loss=True)
    row = torch.arange(len(rows), device=device).repeat_interleave(width)
    return losses.flatten(), labels.flatten() != IGNORED, row


def _masked(model, rows, collator, types, autocast, device) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, whether there is one, and the row of each, `[M]`."""
    width = len(rows[0].ids)
    tokens = np.full((len(rows), width), collator.mask_id, np.int64)  # special: padding is never a target
    boundaries = []
    for number, (_, ids, _) in enumerate(rows):
        tokens[number, : len(ids)] = ids
        boundaries.append(number * width)
        if len(ids) < width:
            boundaries.append(number * width + len(ids))
    _check_ids(model, tokens.max())
    keys = np.array([piece.key for piece in rows], np.uint64)
    positions, labels, _ = collator(tokens, keys)
    fields = document_fields(np.array(boundaries), tokens.shape)
    if types is not None:
        found = types(tokens.ravel(), np.diff(boundaries, append=tokens.size))
        fields["token_type_ids"] = torch.from_numpy(found).view(tokens.shape)
    documents = _to(device, fields)
    positions, labels = torch.from_numpy(positions).to(device), torch.from_numpy(labels).to(device)
    with autocast():
        hidden = model(torch.from_numpy(tokens).to(device), **documents)
        _, losses = masked_lm_loss(hidden, model.head, positions, labels, return_token_loss=True)
    return losses, labels != IGNORED, positions // width


def _to(device: torch.device, fields: dict) -> dict:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in fields.items()}


def _check_ids(model: nn.Module, highest: int) -> None:
    vocab_size = model.config.vocab_size
    if highest >= vocab_size:  # on a GPU it would end the process
        problem = f"the text has the id {highest:,}, and the model {vocab_size:,} tokens"
        raise UserError(problem, hint="Use the model's own tokenizer.", code="id_out_of_range")
