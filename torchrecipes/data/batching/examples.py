"""`Examples`: which texts of a batch belong together, and what is known of them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchrecipes.devices import preset


@dataclass(frozen=True, eq=False)
class Examples:
    """n examples over the N texts of a batch.

    Attributes:
        texts: `[n, k]` int64: the place of each text of an example among the N embeddings of the batch; -1 where an
            example has fewer than k. Pairs: query, positive, negatives. Labeled texts: k is 1.
        hashes: `[N]` int64: equal texts have equal hashes.
        scores: `[n, C]` float32: of a scored pair, or a teacher's of the positive and the negatives. None: no scores.
        labels: `[n]` int64: classes; `[n, L]` float32: 0 or 1 for each of L labels; `[n]` float32: numbers. None: no
            labels.
        lengths: `[N]` int64, always on the CPU: vectors of each text, where a text has several (late interaction). The
            embeddings are those of the first text, of the second, and so on. None: one each.
    """

    texts: Tensor
    hashes: Tensor
    scores: Tensor | None = None
    labels: Tensor | None = None
    lengths: Tensor | None = None

    def __len__(self) -> int:
        return len(self.texts)

    @staticmethod
    def join(parts: "Iterable[Examples]") -> "Examples":
        """The examples of several batches, for their embeddings one batch after the other.

        Examples with fewer texts than those of another batch are filled up with -1, their scores with 0.
        """
        parts = list(parts)
        texts, first = [], 0
        for part in parts:
            texts.append(torch.where(part.texts < 0, -1, part.texts + first))
            first += len(part.hashes)
        return Examples(
            texts=torch.cat(_widen(texts, -1)),
            hashes=torch.cat([part.hashes for part in parts]),
            scores=_cat([part.scores for part in parts]),
            labels=_cat([part.labels for part in parts]),
            lengths=_cat([part.lengths for part in parts]),
        )

    def to(self, device: torch.device) -> "Examples":
        """The examples on `device`; a copy from pinned memory does not wait for it."""
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=preset(device).copies_async))

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> "Examples":
        """The examples with every tensor but `lengths` replaced by what `change` makes of it."""
        scores, labels = (x if x is None else change(x) for x in (self.scores, self.labels))
        return replace(self, texts=change(self.texts), hashes=change(self.hashes), scores=scores, labels=labels)


def _cat(tensors: list[Tensor | None]) -> Tensor | None:
    found = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(_widen(found, 0)) if len(found) == len(tensors) else None


def _widen(tensors: list[Tensor], value: int) -> list[Tensor]:
    """Tensors `[n, k]` with the largest k of them; others as they are."""
    if any(tensor.ndim != 2 for tensor in tensors):
        return tensors
    width = max(tensor.shape[1] for tensor in tensors)
    return [torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=value) for tensor in tensors]
