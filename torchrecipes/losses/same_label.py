"""Supervised contrastive loss: texts of one label are positives of each other."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from torchrecipes.errors import UserError
from torchrecipes.losses.examples_of_ranks import RankExamples, gather_examples
from torchrecipes.losses.late_interaction import require_one_vector

if TYPE_CHECKING:
    from torchrecipes.data import Examples


class SupervisedContrastive:
    """Cross-entropy of each text of the same label among all other texts, averaged over those of the same label.

    For text i, with P the other texts of its label and a over all texts but i (Khosla et al., 2020, arXiv:2004.11362,
    equation 2):

        -1 / |P| * sum over p in P of log(exp(s(i, p)) / sum over a of exp(s(i, a))),  s = cosine / temperature

    A text that is alone with its label has the loss 0.

    Args:
        temperature: of the softmax.
        gather: compare the texts of all ranks, with gradients. False: of this rank.

    Raises:
        UserError: a temperature that is not positive (code `invalid_loss`).
    """

    def __init__(self, temperature: float = 0.1, gather: bool = True):
        if not temperature > 0:
            raise UserError(f"{temperature} is not positive", key="temperature", code="invalid_loss")
        self.temperature, self.gather = temperature, gather

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
        labels = class_labels("SupervisedContrastive", examples)
        batch = gather_examples(embeddings, examples) if self.gather else RankExamples(embeddings, examples, None, 0)
        own = slice(batch.first, batch.first + len(examples))
        with torch.autocast(embeddings.device.type, enabled=False):
            vectors = batch.embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            vectors = F.normalize(vectors[batch.examples.texts[:, 0]], dim=-1)
            logits = vectors[own] @ vectors.T / self.temperature
            self_column = torch.arange(own.start, own.stop, device=logits.device)[:, None]
            losses = logits.scatter(1, self_column, -torch.inf).logsumexp(1, keepdim=True) - logits
            positive = (labels[:, None] == batch.examples.labels).scatter(1, self_column, False)
            loss = (torch.where(positive, losses, 0).sum(1) / positive.sum(1).clamp(min=1)).sum()
        return loss, {"loss": loss.detach()}


def class_labels(name: str, examples: "Examples") -> Tensor:
    """The labels `[n]` int64 of examples.

    Raises:
        UserError: there are none, or they are not classes (code `no_labels`); texts with several vectors
            (`several_vectors`).
    """
    require_one_vector(name, examples)
    if examples.labels is None or examples.labels.is_floating_point():
        raise UserError(
            f"{name} needs one class as label for every text",
            key="loss",
            hint="Use torchrecipes.data.examples.labeled_texts as source, or InfoNCE as loss.",
            code="no_labels",
        )
    return examples.labels
