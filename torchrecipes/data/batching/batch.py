"""`Batch`: rows of tokens, the documents inside them, and the targets."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from torchrecipes.data.batching.examples import Examples
from torchrecipes.devices import preset


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch. B rows of S tokens; padding is one more document at the end of its row.

    A batch of texts, for embeddings and classes, is one row: the texts one after the other, each a document. In one of
    made-up tokens (`example_batch` of a collator) every text is a row.

    Attributes:
        input_ids: `[B, S]` int64.
        position_ids: `[B, S]` int64; starts at 0 with every document.
        document_ids: `[B, S]` int32: the number of the document in its row, from 0. None: every row is one document.
        cu_seqlens: `[N + 1]` int32, the boundaries of the N documents over the B * S flattened tokens: 0, then the end
            of each. N differs from batch to batch. None: every row is one document.
        max_seqlen: the length of the longest document, rounded up to a multiple of 128, at most S.
        num_targets: tokens to predict, or examples. The loss of an optimizer step is the sum over its micro-batches and
            ranks, divided by the sum of these.
        masked_positions: masked LM: `[M]` int64 into the flattened tokens, all different. M never changes.
        masked_labels: masked LM: `[M]` int64, the token that was there; -100 in unused slots.
        labels: causal LM: `[B, S]` int64, the token that comes next; -100 where there is none to predict.
        source_ids: mixtures: `[B]` int64, the place of each row's (or example's) source in `source_names`.
        source_names: mixtures: the sources.
        num_texts: N, the documents that are texts to be pooled, the first ones; 0 in pretraining.
        pool_from: `[N]` int32: tokens at the start of each text that pooling leaves out. None: none.
        token_type_ids: `[B, S]` int64: 1 in the second sentence of a text; for domain names those of their tokenizer
            (`Tokenizer.token_type_ids`). None: the model has no token types.
        examples: which texts belong together, and their labels and scores.
        vector_positions: `[V]` int64: late interaction: the tokens, counted over the flattened batch, whose states
            become vectors, text by text; `examples.lengths` says how many are of each. None: texts are pooled.
        features: `[n, ...]`: outputs of a frozen encoder for the n examples, in place of tokens; `input_ids` is then
            `[1, 0]`.
        class_positions: documents to classify beside the other targets: `[N]` int64, the first token of each, counted
            over the flattened tokens. N is the same for all batches of a shape. None: none are classified.
        class_labels: `[N]` int64, their classes; -100 in unused slots.
        class_weights: `[N]` float32, what the loss of each counts in the batch's sum; 0 in unused slots.
    """

    input_ids: Tensor
    position_ids: Tensor
    document_ids: Tensor | None
    cu_seqlens: Tensor | None
    max_seqlen: int
    num_targets: int
    masked_positions: Tensor | None = None
    masked_labels: Tensor | None = None
    labels: Tensor | None = None
    source_ids: Tensor | None = None
    source_names: tuple[str, ...] = ()
    num_texts: int = 0
    pool_from: Tensor | None = None
    token_type_ids: Tensor | None = None
    examples: Examples | None = None
    vector_positions: Tensor | None = None
    features: Tensor | None = None
    class_positions: Tensor | None = None
    class_labels: Tensor | None = None
    class_weights: Tensor | None = None

    @property
    def documents(self) -> dict[str, Tensor | int | None]:
        """What a model needs to know of the documents, as keyword arguments of its `forward`."""
        described = {name: getattr(self, name) for name in ("position_ids", "document_ids", "cu_seqlens", "max_seqlen")}
        if self.document_ids is None:
            described["cu_seqlens"] = None
        if self.token_type_ids is not None:
            described["token_type_ids"] = self.token_type_ids
        return described

    @property
    def texts(self) -> dict[str, Tensor | int | None]:
        """What pooling needs to know of the texts, as its keyword arguments."""
        return {name: getattr(self, name) for name in ("num_texts", "cu_seqlens", "pool_from")}

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`; a copy from pinned memory does not wait for it."""
        if self.input_ids.device == device:
            return self
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=preset(device).copies_async))

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory, from which a GPU copies while the CPU continues (called by DataLoader)."""
        return self._with_tensors(Tensor.pin_memory)

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        if self.examples is not None:
            changed["examples"] = self.examples.map_tensors(change)
        return replace(self, **changed)


def document_fields(boundaries: np.ndarray, shape: tuple[int, int]) -> dict[str, Tensor | int]:
    """Returns the fields of a `Batch` that describe its documents: those of `Batch.documents`.

    Args:
        boundaries: int64, sorted and distinct: the flat positions at which documents start, 0 the first and the start
            of every row among them.
        shape: (B, S).
    """
    size = shape[0] * shape[1]
    cu_seqlens = np.append(boundaries, size)
    lengths = cu_seqlens[1:] - boundaries
    position_ids = np.arange(size)
    position_ids -= np.repeat(boundaries, lengths)
    document_ids = np.repeat(np.arange(len(boundaries), dtype=np.int32), lengths).reshape(shape)
    document_ids -= document_ids[:, :1].copy()
    return {
        "position_ids": torch.from_numpy(position_ids.reshape(shape)),
        "document_ids": torch.from_numpy(document_ids),
        "cu_seqlens": torch.from_numpy(cu_seqlens.astype(np.int32)),
        # Few values, because kernels are compiled for it; the length of the batch itself would be one more each time.
        "max_seqlen": min(shape[1], -(-int(lengths.max()) // 128) * 128),
    }


def dense_fields(shape: tuple[int, int]) -> dict[str, Tensor | int | None]:
    """Returns the same fields for rows that are one document each."""
    position_ids = torch.arange(shape[1]).expand(shape)
    return {"position_ids": position_ids, "document_ids": None, "cu_seqlens": None, "max_seqlen": shape[1]}
