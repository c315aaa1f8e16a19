"""Losses for pairs of texts with a score: CoSENT and cosine regression."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from torchrecipes.distributed.gather import all_gather_numbers, all_gather_rows
from torchrecipes.errors import UserError
from torchrecipes.losses.late_interaction import require_one_vector

if TYPE_CHECKING:
    from torchrecipes.data import Examples


class CoSENT:
    """Penalizes every two pairs whose cosines are not in the order of their scores.

    Over the pairs i, j of the whole batch with score i < score j (Su, 2022, https://kexue.fm/archives/8847):

        log(1 + sum of exp((cosine i - cosine j) / temperature))

    It depends on the order of the scores only, as Spearman's correlation does. It is one number for a batch, and counts
    once for every example. Sorting makes it O(n log n) for n examples.

    Args:
        temperature: divides the cosines.
        gather: compare pairs of all ranks, with gradients. False: of this rank.

    Raises:
        UserError: a temperature that is not positive (code `invalid_loss`).
    """

    def __init__(self, temperature: float = 0.05, gather: bool = True):
        if not temperature > 0:
            raise UserError(f"{temperature} is not positive", key="temperature", code="invalid_loss")
        self.temperature, self.gather = temperature, gather

    def __call__(
        self,
        embeddings: Tensor,
        examples: "Examples",
        guide: Tensor | None = None,  # noqa: ARG002
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the batch's loss times this rank's examples, and the same to log.

        Args:
            embeddings: `[N, D]` of this rank's texts.
            examples: pairs with `scores` `[n, 1]`.
            guide: not used.

        Raises:
            UserError: examples without scores (code `no_scores`), or texts with several vectors (`several_vectors`).
        """
        scores = _pair_scores("CoSENT", examples)
        cosines = _pair_cosines(embeddings, examples) / self.temperature
        if self.gather:
            counts = [count for (count,) in all_gather_numbers([len(scores)])]
            cosines, scores = all_gather_rows(cosines, counts), all_gather_rows(scores, counts)
        scores, order = scores.sort()
        cosines = cosines[order]
        # For every pair j, log of the sum of exp(cosine i) over all i with a smaller score.
        below = torch.cat([cosines.new_full((1,), -torch.inf), cosines.logcumsumexp(0)])
        terms = below[torch.searchsorted(scores, scores)] - cosines
        loss = torch.cat([terms.new_zeros(1), terms]).logsumexp(0) * len(examples)
        return loss, {"loss": loss.detach()}


class CosineRegression:
    """Squared difference between a pair's cosine and its score (Reimers and Gurevych, 2019, arXiv:1908.10084, 3)."""

    score_range = (-1, 1)

    def __call__(
        self,
        embeddings: Tensor,
        examples: "Examples",
        guide: Tensor | None = None,  # noqa: ARG002
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the sum over this rank's examples, and the same to log.

        Args:
            embeddings: `[N, D]` of this rank's texts.
            examples: pairs with `scores` `[n, 1]`, between -1 and 1.
            guide: not used.

        Raises:
            UserError: examples without scores (code `no_scores`), or texts with several vectors (`several_vectors`).
        """
        scores = _pair_scores("CosineRegression", examples)
        loss = (_pair_cosines(embeddings, examples) - scores).square().sum()
        return loss, {"loss": loss.detach()}


def _pair_scores(name: str, examples: "Examples") -> Tensor:
    require_one_vector(name, examples)
    if examples.scores is None or examples.texts.shape[1] < 2:
        raise UserError(
            f"{name} needs pairs of texts with a score each, and these examples have none",
            key="loss",
            hint="Use torchrecipes.data.examples.scored_pairs as source, or InfoNCE as loss.",
            code="no_scores",
        )
    return examples.scores[:, 0]


def _pair_cosines(embeddings: Tensor, examples: "Examples") -> Tensor:
    vectors = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    return F.cosine_similarity(vectors[examples.texts[:, 0]], vectors[examples.texts[:, 1]])
