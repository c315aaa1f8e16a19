"""`STS`: semantic textual similarity, the correlation with people's scores."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from torchrecipes.data.examples import ExampleSource
from torchrecipes.errors import UserError
from torchrecipes.evaluation.correlation import pearson, spearman
from torchrecipes.evaluation.embeddings import (
    Encoder,
    Similarity,
    by_dimension,
    encode_pairs,
    finite_or_nan,
    pair_scores,
)


class STS:
    """Correlation of the similarities of pairs of sentences with the scores that people gave them.

    Args:
        data: examples of two texts with a score, as `torchrecipes.data.examples.scored_pairs` reads them. The scale of
            the scores does not matter.
        similarity: `cosine`, or `dot` for a model that was trained on dot products without normalization.
    """

    def __init__(self, data: ExampleSource, *, similarity: Similarity = "cosine"):
        self.data, self.similarity = data, similarity

    def __call__(self, encoder: Encoder, dims: Sequence[int] = ()) -> dict[str, float]:
        """Evaluates an encoder.

        Args:
            encoder: has a method `encode`, as `TextEncoder`.
            dims: Matryoshka dimensions to evaluate beside the full one.

        Returns:
            `spearman` and `pearson`, between -1 and 1; with `_dim<d>` after the name for every Matryoshka dimension.

        Raises:
            UserError: there are no pairs, or examples that are not scored pairs; a dimension is out of range.
        """
        first, second, scores = self._pairs
        first, second = encode_pairs(encoder, first, second)

        def measure(dim: int | None) -> dict[str, float]:
            found = pair_scores(first, second, dim, self.similarity)
            return {"spearman": spearman(found, scores), "pearson": pearson(found, scores)}

        return finite_or_nan(by_dimension(measure, dims, first.shape[1]), first, second)

    @cached_property
    def _pairs(self) -> tuple[list[str], list[str], np.ndarray]:
        pairs = []
        for example in self.data:
            if len(example.texts) != 2 or len(example.values) != 1:
                raise UserError(
                    f"{example.source}: {len(example.texts)} texts and {len(example.values)} scores, not 2 and 1",
                    key="data",
                    hint="Read it with torchrecipes.data.examples.scored_pairs.",
                    code="not_scored_pairs",
                )
            pairs.append((*example.texts, example.values[0]))
        if not pairs:
            raise UserError("there are no pairs to evaluate", key="data", code="no_examples")
        first, second, scores = zip(*pairs, strict=True)
        if len(set(scores)) == 1:
            problem = f"all {len(pairs):,} pairs have the score {scores[0]:g}, so there is no correlation"
            raise UserError(problem, key="data", hint="Give pairs with other scores.", code="one_score")
        return list(first), list(second), np.array(scores, np.float64)
