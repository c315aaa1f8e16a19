"""Triplet losses: the positive is closer than a negative, by a margin."""

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from torchrecipes.losses.examples_of_ranks import RankExamples, gather_examples
from torchrecipes.losses.own_candidates import own_candidates
from torchrecipes.losses.same_label import class_labels

if TYPE_CHECKING:
    from torchrecipes.data import Examples

Distance = Literal["cosine", "euclidean"]


class Triplet:
    """`max(0, d(query, positive) - d(query, negative) + margin)`, averaged over an example's negatives.

    (Schroff et al., 2015, arXiv:1503.03832, equation 3; for sentences: Reimers and Gurevych, 2019, arXiv:1908.10084.)
    An example without negatives has the loss 0.

    Args:
        margin: in units of the distance.
        distance: `cosine`, which is 1 - cosine, between 0 and 2; or `euclidean`.
    """

    def __init__(self, margin: float = 0.2, distance: Distance = "cosine"):
        self.margin, self.distance = margin, distance

    def __call__(
        self,
        embeddings: Tensor,
        examples: "Examples",
        guide: Tensor | None = None,  # noqa: ARG002
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the sum over this rank's examples, and sums to log: `loss` and `accuracy`.

        `accuracy` counts examples whose positive is closer than all negatives.

        Args:
            embeddings: `[N, D]` of this rank's texts.
            examples: query, positive, negatives.
            guide: not used.

        Raises:
            UserError: examples without negatives (code `no_negatives`).
        """
        queries, candidates, present = own_candidates("Triplet", embeddings, examples)
        if self.distance == "cosine":
            distances = 1 - F.cosine_similarity(queries, candidates, dim=-1)
        else:
            distances = torch.linalg.vector_norm(queries - candidates, dim=-1)
        terms = torch.where(present[:, 1:], (distances[:, :1] - distances[:, 1:] + self.margin).relu(), 0)
        loss = (terms.sum(1) / present[:, 1:].sum(1).clamp(min=1)).sum()
        correct = ((distances[:, :1] < distances[:, 1:]) | ~present[:, 1:]).all(1).sum()
        return loss, {"loss": loss.detach(), "accuracy": correct}


class BatchHardTriplet:
    """Triplets that are found in a batch of texts with labels, by all ranks together.

    With `hard` mining, every text's farthest text of the same label against its closest one of another (Hermans et al.,
    2017, arXiv:1703.07737, equation 5). With `semi_hard`, every text of the same label against the closest one of
    another that is farther away, or the farthest if there is none (Schroff et al., 2015, arXiv:1503.03832, section
    3.2), averaged over the texts of the same label.

    A text that is alone with its label, or has no other label beside it, has the loss 0: read the data in groups of
    equal labels (`GroupedRows`). Equal texts are no negatives.

    Args:
        margin: in units of the distance. None: `log(1 + exp(d(positive) - d(negative)))`, the soft margin of section 2.
        distance: `cosine`, which is 1 - cosine, between 0 and 2; or `euclidean`.
        mining: `hard` or `semi_hard`.
        gather: look for triplets among the texts of all ranks, with gradients. False: of this rank.
    """

    def __init__(
        self,
        margin: float | None = 0.2,
        distance: Distance = "cosine",
        mining: Literal["hard", "semi_hard"] = "hard",
        gather: bool = True,
    ):
        self.margin, self.distance, self.mining, self.gather = margin, distance, mining, gather

    def __call__(
        self,
        embeddings: Tensor,
        examples: "Examples",
        guide: Tensor | None = None,  # noqa: ARG002
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the sum over this rank's examples, and the same to log.

        Args:
            embeddings: `[N, D]` of this rank's texts.
            examples: one text each; `labels` `[n]` int64.
            guide: not used.

        Raises:
            UserError: examples without classes as labels (code `no_labels`).
        """
        labels = class_labels("BatchHardTriplet", examples)
        batch = gather_examples(embeddings, examples) if self.gather else RankExamples(embeddings, examples, None, 0)
        own = slice(batch.first, batch.first + len(examples))
        with torch.autocast(embeddings.device.type, enabled=False):
            vectors = batch.embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            vectors = vectors[batch.examples.texts[:, 0]]
            distances = self._distances(vectors[own], vectors)
            hashes = batch.examples.hashes[batch.examples.texts[:, 0]]
            same = labels[:, None] == batch.examples.labels
            negative = ~same & (hashes[own, None] != hashes)
            positive = same.scatter(1, torch.arange(own.start, own.stop, device=same.device)[:, None], False)
            mine = _hard if self.mining == "hard" else _semi_hard
            loss = mine(distances, positive, negative, self._penalty)
        return loss, {"loss": loss.detach()}

    def _distances(self, anchors: Tensor, others: Tensor) -> Tensor:
        if self.distance == "cosine":
            return 1 - F.normalize(anchors, dim=-1) @ F.normalize(others, dim=-1).T
        squares = anchors.square().sum(1)[:, None] - 2 * anchors @ others.T + others.square().sum(1)
        return squares.clamp(min=1e-12).sqrt()  # the root has no gradient at 0

    def _penalty(self, difference: Tensor) -> Tensor:
        return F.softplus(difference) if self.margin is None else (difference + self.margin).relu()


def _hard(distances: Tensor, positive: Tensor, negative: Tensor, penalty) -> Tensor:
    farthest = distances.masked_fill(~positive, -torch.inf).amax(1)
    closest = distances.masked_fill(~negative, torch.inf).amin(1)
    is_triplet = positive.any(1) & negative.any(1)
    return penalty(torch.where(is_triplet, farthest - closest, -torch.inf)).sum()


def _semi_hard(distances: Tensor, positive: Tensor, negative: Tensor, penalty) -> Tensor:
    ascending = distances.masked_fill(~negative, torch.inf).sort(1).values
    place = torch.searchsorted(ascending.detach(), distances.detach().contiguous(), right=True)
    last = (negative.sum(1, keepdim=True) - 1).clamp(min=0)
    chosen = ascending.gather(1, torch.minimum(place, last))
    is_triplet = positive & negative.any(1, keepdim=True)
    terms = penalty(torch.where(is_triplet, distances - chosen, -torch.inf)).sum(1)
    return (terms / positive.sum(1).clamp(min=1)).sum()
