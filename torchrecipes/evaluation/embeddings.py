"""What the evaluators of embeddings share: the encoder that they take, and similarities."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import numpy as np

from torchrecipes.errors import UserError

Similarity = Literal["cosine", "dot"]  # dot: the dot product of embeddings as they are


class Encoder(Protocol):
    """An object that turns texts into embeddings, such as `TextEncoder`."""

    def encode(self, texts: Sequence[str], prompt: str = "") -> np.ndarray:
        """Return `[n, D]` float32, one row per text, the same on all ranks.

        Args:
            texts: in any order; an encoder sorts them by length itself.
            prompt: the name of the prompt that goes before them: `query`, `passage`, or none.
        """
        ...


def unit_rows(embeddings: np.ndarray, dim: int | None = None) -> np.ndarray:
    """The first `dim` columns (all by default) with rows of length 1; a row of zeros stays one.

    Args:
        embeddings: `[n, D]`.
        dim: as a Matryoshka embedding is shortened.

    Returns:
        `[n, dim]` float32.
    """
    embeddings = np.asarray(embeddings, np.float32)[:, :dim]
    return embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)


def encode_pairs(encoder: Encoder, first: Sequence[str], second: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of two columns of sentences, equal sentences encoded once.

    Returns:
        Two `[n, D]` float32 arrays.
    """
    number: dict[str, int] = {}
    for text in (*first, *second):
        number.setdefault(text, len(number))
    embeddings = encoder.encode(list(number))
    return embeddings[[number[text] for text in first]], embeddings[[number[text] for text in second]]


def pair_scores(
    first: np.ndarray, second: np.ndarray, dim: int | None = None, similarity: Similarity = "cosine"
) -> np.ndarray:
    """The similarity of every pair of rows, in float64; a cosine with a row of zeros is 0.

    Args:
        first: `[n, D]`.
        second: `[n, D]`.
        dim: use the first `dim` columns; None: all.
        similarity: of two rows.

    Returns:
        `[n]` float64.
    """
    first, second = (side[:, :dim].astype(np.float64) for side in (first, second))
    products = np.einsum("nd,nd->n", first, second)
    if similarity == "dot":
        return products
    return products / np.maximum(np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1), 1e-24)


def by_dimension(
    measure: Callable[[int | None], dict[str, float]], dims: Sequence[int], width: int
) -> dict[str, float]:
    """Metrics with full embeddings, and with the first columns of them under keys that end in `_dim<d>`.

    Args:
        measure: gives the metrics for a number of columns; None: all.
        dims: Matryoshka dimensions.
        width: of the embeddings.

    Raises:
        UserError: a dimension is not between 1 and `width` (code `out_of_range`).
    """
    check_dims(dims, width)
    results = measure(None)
    for dim in dims:
        results |= {f"{name}_dim{dim}": value for name, value in measure(dim).items()}
    return results


def check_dims(dims: Sequence[int], width: int) -> None:
    """Raises a UserError (code `out_of_range`) unless all Matryoshka dimensions are between 1 and `width`."""
    for dim in dims:
        if not 1 <= dim <= width:
            hint = f"Give dimensions from 1 to {width}."
            raise UserError(
                f"the embeddings have {width} dimensions, not {dim}", key="dims", hint=hint, code="out_of_range"
            )


def finite_or_nan(results: dict[str, float], *embeddings: np.ndarray) -> dict[str, float]:
    """The results, or NaN for all of them where an embedding is not finite, as after a run has diverged."""
    if all(np.isfinite(part).all() for part in embeddings):
        return results
    return dict.fromkeys(results, math.nan)
