"""Distillation from the scores of a teacher, such as a cross-encoder, for a query's positive and negatives."""

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from torchrecipes.errors import UserError
from torchrecipes.losses.own_candidates import own_similarities

if TYPE_CHECKING:
    from torchrecipes.data import Examples


class MarginMSE:
    """Squared difference between student and teacher in how much better the positive is than a negative.

    Averaged over an example's negatives (Hofstätter et al., 2020, arXiv:2010.02666, equation 7):

        ((s(query, positive) - s(query, negative)) - (teacher(positive) - teacher(negative))) ** 2

    Args:
        similarity: `dot`, which can match the teacher's range, or `cosine`.
    """

    def __init__(self, similarity: Literal["dot", "cosine"] = "dot"):
        self.similarity = similarity

    def __call__(
        self,
        embeddings: Tensor,
        examples: "Examples",
        guide: Tensor | None = None,  # noqa: ARG002
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the sum over this rank's examples, and the same to log.

        Args:
            embeddings: `[N, D]` of this rank's texts.
            examples: query, positive, negatives, with the teacher's `scores` `[n, k - 1]` of positive and negatives.
            guide: not used.

        Raises:
            UserError: no negatives (code `no_negatives`), or scores that are not one for each candidate (`no_scores`).
        """
        student, teacher, present = own_similarities("MarginMSE", self.similarity, embeddings, examples)
        margins = (student[:, :1] - student[:, 1:]) - (teacher[:, :1] - teacher[:, 1:])
        squares = torch.where(present[:, 1:], margins.square(), 0).sum(1)
        loss = (squares / present[:, 1:].sum(1).clamp(min=1)).sum()
        return loss, {"loss": loss.detach()}


class KLDistillation:
    """Kullback-Leibler divergence of the student's distribution over an example's candidates from the teacher's.

    With p and q the softmax of the teacher's scores and of the student's similarities, each divided by its temperature:
    `temperature ** 2 * sum of p * log(p / q)` (Hinton et al., 2015, arXiv:1503.02531, section 2; for retrieval: Ren et
    al., 2021, arXiv:2110.07367, section 3.2).

    Args:
        temperature: of the student.
        teacher_temperature: of the teacher; None: the same.
        similarity: `dot` or `cosine`.

    Raises:
        UserError: a temperature that is not positive (code `invalid_loss`).
    """

    def __init__(
        self,
        temperature: float = 1.0,
        teacher_temperature: float | None = None,
        similarity: Literal["dot", "cosine"] = "dot",
    ):
        self.temperature = temperature
        self.teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
        for key in ("temperature", "teacher_temperature"):
            if not getattr(self, key) > 0:
                raise UserError(f"{getattr(self, key)} is not positive", key=key, code="invalid_loss")
        self.similarity = similarity

    def __call__(
        self,
        embeddings: Tensor,
        examples: "Examples",
        guide: Tensor | None = None,  # noqa: ARG002
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the sum over this rank's examples, and the same to log.

        Args:
            embeddings: `[N, D]` of this rank's texts.
            examples: query, positive, negatives, with the teacher's `scores` `[n, k - 1]` of positive and negatives.
            guide: not used.

        Raises:
            UserError: no negatives (code `no_negatives`), or scores that are not one for each candidate (`no_scores`).
        """
        student, teacher, present = own_similarities("KLDistillation", self.similarity, embeddings, examples)
        log_q = (student / self.temperature).masked_fill(~present, -torch.inf).log_softmax(1)
        log_p = (teacher / self.teacher_temperature).masked_fill(~present, -torch.inf).log_softmax(1)
        terms = log_p.exp() * torch.where(present, log_p - log_q, 0)
        loss = terms.sum() * self.temperature**2
        return loss, {"loss": loss.detach()}
