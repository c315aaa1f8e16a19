"""Pearson's and Spearman's correlation."""

import math

import numpy as np
from numpy.typing import ArrayLike


def average_ranks(values: ArrayLike) -> np.ndarray:
    """The ranks of values from 1; equal values share the mean of their ranks.

    Args:
        values: `[n]`.

    Returns:
        `[n]` float64.
    """
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """Pearson's correlation, in float64; NaN where either side is constant or holds a NaN.

    Args:
        x: `[n]`.
        y: `[n]`.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(x) < 2 or x.min() == x.max() or y.min() == y.max():
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip((x / np.linalg.norm(x)) @ (y / np.linalg.norm(y)), -1, 1))


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's correlation: Pearson's of the ranks, equal values sharing the mean of theirs; NaN as for `pearson`.

    Args:
        x: `[n]`.
        y: `[n]`.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if np.isnan(x).any() or np.isnan(y).any():
        return math.nan
    return pearson(average_ranks(x), average_ranks(y))
