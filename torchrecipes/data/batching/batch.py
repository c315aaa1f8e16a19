"""`Batch`: rows of tokens, the documents inside them, and the targets."""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch. B rows of S tokens; padding is one more document at the end of its row.

    Attributes:
        input_ids: `[B, S]` int64.
        position_ids: `[B, S]` int64; starts at 0 with every document.
        cu_seqlens: `[N + 1]` int32, the boundaries of the documents over the B * S flattened tokens: 0, then the end
            of each; filled up by repeating the last, so that N is the same in every batch of a run. None: every row
            is one document.
        max_seqlen: no document is longer; the same in every batch of a run.
        num_targets: tokens to predict. The loss of an optimizer step is the sum over its micro-batches and ranks,
            divided by the sum of these.
        masked_positions: masked LM: `[M]` int64 into the flattened tokens; 0 in unused slots. M never changes.
        masked_labels: masked LM: `[M]` int64, the token that was there; -100 in unused slots.
        labels: causal LM: `[B, S]` int64, the token that comes next; -100 where there is none to predict.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor | None
    max_seqlen: int
    num_targets: int
    masked_positions: Tensor | None = None
    masked_labels: Tensor | None = None
    labels: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`; a copy from pinned memory does not wait for it."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory, from which a GPU copies while the CPU continues (called by DataLoader)."""
        return self._with_tensors(Tensor.pin_memory)

    def _with_tensors(self, change) -> "Batch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(value) for name, value in values.items() if isinstance(value, Tensor)})


def document_fields(boundaries: np.ndarray, shape: tuple[int, int], max_segments: int) -> dict[str, Tensor | int]:
    """Returns the fields of a `Batch` that describe its documents: `position_ids`, `cu_seqlens` and `max_seqlen`.

    Args:
        boundaries: int64, sorted: the flat positions at which documents start, 0 the first.
        shape: (B, S).
        max_segments: no row has more documents.
    """
    size, capacity = shape[0] * shape[1], shape[0] * max_segments + 1
    if len(boundaries) >= capacity:
        raise ValueError(f"{len(boundaries)} documents in a batch that is made for {capacity - 1}")
    cu_seqlens = np.full(capacity, size, dtype=np.int32)
    cu_seqlens[: len(boundaries)] = boundaries
    lengths = np.diff(boundaries, append=size)
    position_ids = (np.arange(size) - np.repeat(boundaries, lengths)).reshape(shape)
    return {
        "position_ids": torch.from_numpy(position_ids),
        "cu_seqlens": torch.from_numpy(cu_seqlens),
        "max_seqlen": shape[1],
    }
