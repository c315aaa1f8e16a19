"""MRR, nDCG and recall of ranked passages, as trec_eval computes them."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

CUTOFFS = {"mrr": (10,), "ndcg": (10,), "recall": (1, 10, 100)}
DEEPEST = 100  # passages per query that the metrics look at


def ranking_metrics(ranked: np.ndarray, relevant: Sequence[Mapping[int, float]]) -> dict[str, float]:
    """Means over queries of MRR@10, nDCG@10 and recall@1, @10 and @100.

    nDCG divides the grade at rank r by log2(r + 1) (Järvelin and Kekäläinen 2002), and the sum by that of the ideal
    order. Recall@k is the share of a query's relevant passages among the first k. MRR is the mean of 1 / rank of the
    first relevant passage, or 0.

    Args:
        ranked: `[Q, k]` int64: the numbers of the passages, the best first; -1: none.
        relevant: for every query the grades of its relevant passages, all above 0, by passage number; at least one.

    Returns:
        `mrr@10`, `ndcg@10`, `recall@1`, `recall@10`, `recall@100`; NaN without queries.
    """
    discounts = 1 / np.log2(np.arange(2, DEEPEST + 2))
    totals: dict[str, float] = {f"{name}@{cutoff}": 0.0 for name, cutoffs in CUTOFFS.items() for cutoff in cutoffs}
    for passages, grades in zip(ranked.tolist(), relevant, strict=True):
        gains = np.array([grades.get(passage, 0.0) for passage in passages[:DEEPEST]])
        hits = np.flatnonzero(gains)
        for cutoff in CUTOFFS["mrr"]:
            totals[f"mrr@{cutoff}"] += 1 / (hits[0] + 1) if len(hits) and hits[0] < cutoff else 0.0
        for cutoff in CUTOFFS["ndcg"]:
            ideal = np.array(sorted(grades.values(), reverse=True)[:cutoff])
            dcg = gains[:cutoff] @ discounts[: len(gains[:cutoff])]
            totals[f"ndcg@{cutoff}"] += dcg / (ideal @ discounts[: len(ideal)])
        for cutoff in CUTOFFS["recall"]:
            totals[f"recall@{cutoff}"] += np.count_nonzero(hits < cutoff) / len(grades)
    return {name: float(total / len(relevant)) if relevant else math.nan for name, total in totals.items()}
