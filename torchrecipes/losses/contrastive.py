"""InfoNCE: the positive among in-batch and hard negatives.

Names carry their shape: n anchors of this rank, A anchors of all ranks, M candidates of all ranks, R rows of one chunk.
"""

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torchrecipes.errors import UserError
from torchrecipes.losses.examples_of_ranks import RankExamples, gather_examples
from torchrecipes.losses.late_interaction import max_sim_of_texts, require_one_vector

if TYPE_CHECKING:
    from torchrecipes.data import Examples

CHUNK_LOGITS = 1 << 25  # held at once: 4,096 anchors and 8,192 candidates, 128 MiB in fp32


class InfoNCE:
    """Cross-entropy of every query's positive among the positives and negatives of the whole batch.

    For query i with positive i, over the candidates c of all examples and all ranks (van den Oord et al., 2018,
    arXiv:1807.03748, equation 4; in-batch negatives: Henderson et al., 2017, arXiv:1705.00652, section 4.4):

        -log(exp(s(i, i) / temperature) / sum over c of exp(s(i, c) / temperature))

    A text is never a negative of a query that is equal to it, and the positives of equal queries are not negatives of
    each other: texts are compared by hash. On raw texts that occur twice in a batch (`PairCollator(repeat_texts=True)`)
    this is unsupervised SimCSE (Gao et al., 2021, arXiv:2104.08821).

    Texts with several vectors (`Examples.lengths`) are compared by `max_sim`, their vectors by `similarity`.

    The matrix of similarities is in fp32, under autocast too. Beyond 2^25 entries it is computed in chunks of queries,
    and again in the backward pass: memory grows with the texts, not with their square.

    Args:
        temperature: of the softmax. None: the embeddings' dot products are the logits, for a model with a learnable
            temperature, which scales its embeddings.
        similarity: `cosine`, or `dot` for models that do not normalize.
        bidirectional: also find the query of every positive among all queries; the loss is the mean of both.
        gather: use candidates of all ranks, with gradients. False: of this rank.
        margin: leave out candidates whose cosine with the query exceeds the positive's by more than this: most likely
            they are positives without a label (Qwen3 Embedding, 2025, arXiv:2506.05176, equation 2, with 0.1).
        guide_margin: leave out candidates that are more similar to the query than the positive is, less this margin,
            in the eyes of a guide model (GISTEmbed: Solatorio, 2024, arXiv:2402.16829, with 0). None: no guide.
        guide_margin_type: `absolute`, or `relative`: a share of the positive's similarity.
        chunk_size: queries whose similarities are held at once; None chooses.

    Raises:
        UserError: an argument that is out of range (code `invalid_loss`).
    """

    ignores_scores = True

    def __init__(
        self,
        temperature: float | None = 0.05,
        similarity: Literal["cosine", "dot"] = "cosine",
        bidirectional: bool = False,
        gather: bool = True,
        margin: float | None = None,
        guide_margin: float | None = None,
        guide_margin_type: Literal["absolute", "relative"] = "absolute",
        chunk_size: int | None = None,
    ):
        if temperature is not None and not temperature > 0:
            raise UserError(f"{temperature} is not positive", key="temperature", code="invalid_loss")
        self.temperature, self.similarity, self.bidirectional = temperature, similarity, bidirectional
        self.gather, self.margin = gather, margin
        self.guide_margin, self.guide_margin_type = guide_margin, guide_margin_type
        self.chunk_size = chunk_size

    def __call__(
        self, embeddings: Tensor, examples: "Examples", guide: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the sum over this rank's examples, and sums to log: `loss` and `accuracy`.

        Args:
            embeddings: `[N, D]` of this rank's texts; where they have several vectors, of all of these.
            examples: their queries, positives and negatives.
            guide: `[N, Dg]`, embeddings of the same texts by the guide.

        Raises:
            UserError: examples without a positive (code `no_positives`); `guide_margin` without guide (`no_guide`);
                `margin` and texts with several vectors (`several_vectors`).
        """
        if self.margin is not None:
            require_one_vector("margin of InfoNCE", examples)
        if examples.texts.shape[1] < 2:
            raise UserError(
                "InfoNCE needs a query and a positive in every example, and these have one text",
                key="loss",
                hint="Use pairs, or BatchHardTriplet for texts with labels.",
                code="no_positives",
            )
        if self.guide_margin is not None and guide is None:
            raise UserError(
                "guide_margin is set, but there is no guide model", key="loss.guide_margin", code="no_guide"
            )
        batch = RankExamples(embeddings, examples, guide, 0)
        if self.gather:
            batch = gather_examples(*batch[:3])
        with torch.autocast(embeddings.device.type, enabled=False):
            loss, correct = self._sum(batch, len(examples))
        return loss, {"loss": loss.detach(), "accuracy": correct}

    def _sum(self, batch: RankExamples, num_own: int) -> tuple[Tensor, Tensor]:
        texts = batch.examples.texts
        numbers = _number_equal_texts(batch.examples.hashes)
        queries, positives = texts[:, 0], texts[:, 1]
        candidates = texts[:, 1:].T.flatten()  # the positives first
        guide = None if self.guide_margin is None else batch.guide
        args = (batch, guide, numbers, num_own)
        loss, correct = self._one_direction(queries, positives, candidates, *args)
        if self.bidirectional:
            loss = (loss + self._one_direction(positives, queries, queries, *args)[0]) / 2
        return loss, correct

    def _one_direction(self, anchors_A, targets_A, candidates_M, batch, guide, numbers, num_own):
        """Sum of the losses of this rank's anchors, whose targets are the candidates from `first` on; and how many have
        theirs as the most similar candidate."""
        embeddings, lengths, first = batch.embeddings, batch.examples.lengths, batch.first
        own = slice(first, first + num_own)
        absent_M = candidates_M < 0
        candidates_M = candidates_M.clamp(min=0)
        vectors = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        scale = 1 if self.temperature is None else 1 / self.temperature
        if self.temperature is not None and self.similarity == "cosine":
            vectors = F.normalize(vectors, dim=-1)
        if lengths is None:
            anchors, candidates = vectors[anchors_A[own]] * scale, vectors[candidates_M]
        else:
            anchors, candidates = max_sim_of_texts(vectors, lengths, anchors_A[own], candidates_M) * scale, None
        guides = (None, None)
        if guide is not None:
            guide = F.normalize(guide.to(vectors.dtype), dim=-1)
            guides = (guide[anchors_A[own]], guide[candidates_M])
        numbers_A, numbers_M = numbers[anchors_A], numbers[candidates_M]
        known = (numbers_A, numbers[targets_A], numbers_M, len(numbers))
        labels = torch.arange(first, first + num_own, device=vectors.device)

        def chunk(anchors_R, guide_R, numbers_R, labels_R):
            logits = anchors_R if candidates is None else anchors_R @ candidates.T
            excluded = _known_pairs(numbers_R, *known) | absent_M
            if self.margin is not None:
                cosines = F.normalize(anchors_R.detach(), dim=-1) @ F.normalize(candidates.detach(), dim=-1).T
                excluded |= cosines > cosines.gather(1, labels_R[:, None]) + self.margin
            if guide_R is not None:
                excluded |= self._guide_excludes(guide_R @ guides[1].T, labels_R)
            excluded.scatter_(1, labels_R[:, None], False)
            logits = logits.masked_fill(excluded, -torch.inf)
            correct = (logits.detach().argmax(1) == labels_R).sum()
            return F.cross_entropy(logits, labels_R, reduction="sum"), correct

        rows = self.chunk_size or max(1, CHUNK_LOGITS // max(1, len(candidates_M)))
        parts = (anchors, guides[0], numbers_A[own], labels)
        if num_own <= rows:
            return chunk(*parts)
        chunks = zip(
            *([part] * -(-num_own // rows) if part is None else part.split(rows) for part in parts), strict=True
        )
        results = [checkpoint(chunk, *part, use_reentrant=False, preserve_rng_state=False) for part in chunks]
        losses, correct = zip(*results, strict=True)
        return torch.stack(losses).sum(), torch.stack(correct).sum()

    def _guide_excludes(self, similarities: Tensor, labels: Tensor) -> Tensor:
        target = similarities.gather(1, labels[:, None])
        # A share of the size, so that the limit is below a negative similarity, too.
        margin = self.guide_margin * (target.abs() if self.guide_margin_type == "relative" else 1)
        return similarities > target - margin


def _number_equal_texts(hashes: Tensor) -> Tensor:
    """Numbers from 0 for texts `[N]`, equal where hashes are. Unlike `torch.unique` it does not wait for a GPU."""
    ordered, order = hashes.sort()
    is_new = torch.ones_like(ordered)
    is_new[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(order).scatter_(0, order, is_new.cumsum(0) - 1)


def _known_pairs(anchors_R, anchors_A, targets_A, candidates_M, num_texts) -> Tensor:
    """`[R, M]`: whether the candidate is the anchor's own text, or the target of an anchor with the same text.

    Texts are given by their numbers. R of the A anchors are asked for.
    """
    # A table has a row for every text among the R anchors, and one at its end for all other texts.
    row_of_text = torch.full((num_texts,), len(anchors_R), device=anchors_R.device)
    row_of_text[anchors_R] = torch.arange(len(anchors_R), device=anchors_R.device)
    table = torch.zeros(len(anchors_R) + 1, num_texts, dtype=torch.bool, device=anchors_R.device)
    rows_A = row_of_text[anchors_A]
    table[rows_A, targets_A] = True
    table[rows_A, anchors_A] = True
    return table[row_of_text[anchors_R]].index_select(1, candidates_M)
