"""Matryoshka: embeddings whose first numbers are embeddings, too."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchrecipes.errors import UserError

if TYPE_CHECKING:
    from torchrecipes.data import Examples


class Matryoshka:
    """Adds up another loss over embeddings cut to several sizes (Kusupati et al., 2022, arXiv:2205.13147, equation 1).

        loss:
          _component_: torchrecipes.losses.Matryoshka
          loss: {_component_: torchrecipes.losses.InfoNCE}
          dims: [384, 128, 64]

    The first d numbers of an embedding are scaled to the length of all of it: a normalized embedding stays normalized,
    and a temperature in the length, of a model that learns it, holds for every size.

    Args:
        loss: of embeddings, such as `InfoNCE`.
        dims: the sizes. Without the full size, the rest of the embedding is not trained.
        weights: a factor for the loss of every size; None: 1.

    Raises:
        UserError: no sizes, sizes that are not positive, or another number of weights (code `invalid_loss`).
    """

    def __init__(self, loss: Callable, dims: list[int], weights: list[float] | None = None):
        if not dims or min(dims) < 1 or len(set(dims)) < len(dims):
            raise UserError(f"{dims} are not different positive sizes", key="dims", code="invalid_loss")
        if weights is not None and len(weights) != len(dims):
            raise UserError(
                f"there are {len(weights)} weights for {len(dims)} dims", key="weights", code="invalid_loss"
            )
        self.loss, self.dims, self.weights = loss, dims, weights or [1.0] * len(dims)

    def __call__(
        self, embeddings: Tensor, examples: "Examples", guide: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the weighted sum over sizes and this rank's examples, and sums to log.

        These are `loss`, the loss of every size as `loss_dim<d>`, and what else the inner loss gives, at the largest.

        Args:
            embeddings: `[N, D]` of this rank's texts.
            examples: as the inner loss needs them.
            guide: `[N, Dg]`, not cut.

        Raises:
            UserError: a size larger than D (code `invalid_loss`), or an error of the inner loss.
        """
        size = embeddings.shape[-1]
        if max(self.dims) > size:
            raise UserError(
                f"the embeddings have {size} numbers, and dims asks for the first {max(self.dims)}",
                key="loss.dims",
                code="invalid_loss",
            )
        vectors = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
        total, logged = vectors.new_zeros(()), {}
        for dim, weight in sorted(zip(self.dims, self.weights, strict=True)):
            part = vectors[..., :dim]
            part = part * (length / torch.linalg.vector_norm(part, dim=-1, keepdim=True).clamp(min=1e-12))
            loss, sums = self.loss(part, examples, guide)
            total = total + weight * loss
            logged |= {f"loss_dim{dim}": sums["loss"]} | sums
        return total, logged | {"loss": total.detach()}
