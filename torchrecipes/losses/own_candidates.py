"""Every query against the candidates of its own example."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from torchrecipes.errors import UserError

if TYPE_CHECKING:
    from torchrecipes.data import Examples


def own_candidates(name: str, embeddings: Tensor, examples: "Examples") -> tuple[Tensor, Tensor, Tensor]:
    """The vectors of queries and of their positives and negatives.

    Args:
        name: of the loss, for errors.
        embeddings: `[N, D]`.
        examples: query, positive, negatives.

    Returns:
        Queries `[n, 1, D]` and candidates `[n, k - 1, D]`, in fp32 at least, and `[n, k - 1]` bool: which of the
        candidates exist.

    Raises:
        UserError: examples without negatives (code `no_negatives`).
    """
    if examples.texts.shape[1] < 3:
        raise UserError(
            f"{name} needs a query, a positive and a negative, and these examples have fewer texts",
            key="loss",
            hint="Name the columns in negatives of the source, or use InfoNCE.",
            code="no_negatives",
        )
    vectors = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    candidates = examples.texts[:, 1:]
    return vectors[examples.texts[:, :1]], vectors[candidates.clamp(min=0)], candidates >= 0


def own_similarities(
    name: str, similarity: str, embeddings: Tensor, examples: "Examples"
) -> tuple[Tensor, Tensor, Tensor]:
    """Similarities of queries with their own candidates, beside a teacher's.

    Args:
        name: of the loss, for errors.
        similarity: `cosine` or `dot`.
        embeddings: `[N, D]`.
        examples: query, positive, negatives; `scores` of the candidates.

    Returns:
        `[n, k - 1]` each: similarities, the teacher's scores, and which of the candidates exist.

    Raises:
        UserError: examples without negatives (code `no_negatives`) or without a score for each candidate (`no_scores`).
    """
    queries, candidates, present = own_candidates(name, embeddings, examples)
    if examples.scores is None or examples.scores.shape != present.shape:
        found = "none" if examples.scores is None else f"{examples.scores.shape[1]}"
        raise UserError(
            f"{name} needs a teacher's score for the positive and each negative, {present.shape[1]} in an example, "
            f"and there are {found}",
            key="loss",
            hint="Name the columns in scores of the source.",
            code="no_scores",
        )
    if similarity == "cosine":
        queries, candidates = F.normalize(queries, dim=-1), F.normalize(candidates, dim=-1)
    teacher = examples.scores.to(queries.dtype)
    return (queries * candidates).sum(-1), torch.where(present, teacher, 0), present
