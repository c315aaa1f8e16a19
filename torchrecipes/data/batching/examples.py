"""`Examples`: which texts of a batch belong together, and what is known of them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


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
    """

    texts: Tensor
    hashes: Tensor
    scores: Tensor | None = None
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.texts)

    @staticmethod
    def join(parts: "Iterable[Examples]") -> "Examples":
        """The examples of several batches, for their embeddings one batch after the other.

        Examples with fewer texts than those of another batch are filled up with -1.
        """
        parts = list(parts)
        width = max(part.texts.shape[1] for part in parts)
        texts, first = [], 0
        for part in parts:
            moved = torch.where(part.texts < 0, -1, part.texts + first)
            texts.append(torch.nn.functional.pad(moved, (0, width - moved.shape[1]), value=-1))
            first += len(part.hashes)
        return Examples(
            texts=torch.cat(texts),
            hashes=torch.cat([part.hashes for part in parts]),
            scores=_cat([part.scores for part in parts]),
            labels=_cat([part.labels for part in parts]),
        )

    def to(self, device: torch.device) -> "Examples":
        """The examples on `device`; a copy from pinned memory does not wait for it."""
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> "Examples":
        """The examples with every tensor replaced by what `change` makes of it."""
        optional = (self.scores, self.labels)
        return Examples(change(self.texts), change(self.hashes), *(x if x is None else change(x) for x in optional))


def _cat(tensors: list[Tensor | None]) -> Tensor | None:
    return None if any(tensor is None for tensor in tensors) else torch.cat(tensors)
