"""Embeddings and examples of all ranks, with gradients, for losses that compare the whole batch."""

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from torchrecipes.distributed.collectives import rank, world_size
from torchrecipes.distributed.gather import all_gather_numbers, all_gather_rows

if TYPE_CHECKING:
    from torchrecipes.data import Examples


class RankExamples(NamedTuple):
    """Embeddings and examples of the whole batch, and where this rank's are among them.

    Attributes:
        embeddings: `[N, D]` of all ranks' texts, or of all their vectors.
        examples: of all ranks.
        guide: `[N, Dg]` or None.
        first: the place of this rank's first example.
    """

    embeddings: Tensor
    examples: "Examples"
    guide: Tensor | None
    first: int


def gather_examples(embeddings: Tensor, examples: "Examples", guide: Tensor | None = None) -> RankExamples:
    """Gathers embeddings, with gradients, and examples. Ranks may have different numbers of them.

    Every rank must run the backward pass of what it computes from the embeddings, even without examples of its own.

    Args:
        embeddings: `[N, D]` of this rank's texts, or of all their vectors.
        examples: of this rank. Examples with fewer texts than another rank's are filled up with -1.
        guide: `[N, Dg]`, gathered without gradients; None on every rank, or on none.
    """
    if world_size() == 1:
        return RankExamples(embeddings, examples, guide, 0)
    scores = examples.scores
    mine = [len(embeddings), len(examples.hashes), *examples.texts.shape, 0 if scores is None else scores.shape[1]]
    num_vectors, num_texts, num_examples, widths, score_widths = zip(*all_gather_numbers(mine), strict=True)
    texts = torch.where(examples.texts < 0, -1, examples.texts + sum(num_texts[: rank()]))
    everything = replace(
        examples,
        texts=all_gather_rows(_widen(texts, max(widths), -1), num_examples),
        hashes=all_gather_rows(examples.hashes, num_texts),
        scores=None if scores is None else all_gather_rows(_widen(scores, max(score_widths), 0), num_examples),
        labels=None if examples.labels is None else all_gather_rows(examples.labels, num_examples),
        lengths=None if examples.lengths is None else all_gather_rows(examples.lengths, num_texts),
    )
    return RankExamples(
        embeddings=all_gather_rows(embeddings, num_vectors),
        examples=everything,
        guide=None if guide is None else all_gather_rows(guide.detach(), num_texts),
        first=sum(num_examples[: rank()]),
    )


def _widen(rows: Tensor, width: int, value: float) -> Tensor:
    return torch.nn.functional.pad(rows, (0, width - rows.shape[1]), value=value)
