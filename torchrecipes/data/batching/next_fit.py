"""Packs documents into rows in the order of the corpus: each row takes documents until the next one does not fit.

The plan is one number for every row, its first document, instead of one for every document: of short documents there
are billions. A plan is of one shard: it does not depend on the others, so that a corpus that grows keeps its rows.
"""

from bisect import bisect_right

import numpy as np


def plan_rows(document_offsets: np.ndarray, seq_len: int, shortest: int = 1) -> np.ndarray:
    """Plans the rows of a shard.

    A document longer than a row fills rows of its own, and its end begins a row that takes further documents.

    Args:
        document_offsets: int64 `[D + 1]`: where its documents begin, and the end.
        seq_len: tokens per row.
        shortest: no document has fewer tokens, which shortens the search.

    Returns:
        int32 `[R + 1]`: the first document of every row, and D. A number that occurs k times in succession is a
        document that begins in the first of these k rows and ends in the last.
    """
    offsets, num_documents = memoryview(document_offsets), len(document_offsets) - 1
    most = seq_len // max(1, shortest) + 2
    firsts, document, start = [], 0, 0
    while document < num_documents:
        firsts.append(document)
        reach = start + seq_len
        following = bisect_right(offsets, reach, document, min(document + most, num_documents + 1)) - 1
        start = reach if following == document else offsets[following]
        document = following
    firsts.append(num_documents)
    return np.array(firsts, dtype=np.int32)
