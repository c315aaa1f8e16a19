"""Every query against the candidates of its own example."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from torchrecipes.errors import UserError
from torchrecipes.losses.late_interaction import max_sim_of_texts, require_one_vector

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
        UserError: examples without negatives (code `no_negatives`), or texts with several vectors (`several_vectors`).
    """
    require_one_vector(name, examples)
    _require_negatives(name, examples)
    vectors = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    candidates = examples.texts[:, 1:]
    return vectors[examples.texts[:, :1]], vectors[candidates.clamp(min=0)], candidates >= 0


def own_similarities(
    name: str, similarity: str, embeddings: Tensor, examples: "Examples"
) -> tuple[Tensor, Tensor, Tensor]:
    """Similarities of queries with their own candidates, beside a teacher's.

    Args:
        name: of the loss, for errors.
        similarity: `cosine` or `dot`; of the vectors in `max_sim`, where texts have several.
        embeddings: `[N, D]`, or all vectors of the N texts.
        examples: query, positive, negatives; `scores` of the candidates.

    Returns:
        `[n, k - 1]` each: similarities, the teacher's scores, and which of the candidates exist.

    Raises:
        UserError: examples without negatives (code `no_negatives`) or without a score for each candidate (`no_scores`).
    """
    _require_negatives(name, examples)
    candidates = examples.texts[:, 1:]
    present = candidates >= 0
    if examples.scores is None or examples.scores.shape != present.shape:
        found = "none" if examples.scores is None else f"{examples.scores.shape[1]}"
        raise UserError(
            f"{name} needs a teacher's score for the positive and each negative, {present.shape[1]} in an example, "
            f"and there are {found}",
            key="loss",
            hint="Name the columns in scores of the source.",
            code="no_scores",
        )
    vectors = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    if similarity == "cosine":
        vectors = F.normalize(vectors, dim=-1)
    queries, candidates = examples.texts[:, 0], candidates.clamp(min=0)
    if examples.lengths is None:
        student = (vectors[queries][:, None] * vectors[candidates]).sum(-1)
    else:
        # Of every query with every candidate: the encoder needs far more time than this does.
        with torch.autocast(vectors.device.type, enabled=False):
            student = max_sim_of_texts(vectors, examples.lengths, queries, candidates.flatten())
        columns = torch.arange(candidates.numel(), device=student.device).view_as(candidates)
        student = student.gather(1, columns)
    return student, torch.where(present, examples.scores.to(student.dtype), 0), present


def _require_negatives(name: str, examples: "Examples") -> None:
    if examples.texts.shape[1] < 3:
        raise UserError(
            f"{name} needs a query, a positive and a negative, and these examples have fewer texts",
            key="loss",
            hint="Name the columns in negatives of the source, or use InfoNCE.",
            code="no_negatives",
        )
