"""Packs documents into rows in the order of the corpus: each row takes documents until the next one does not fit.

The plan is one number for every row, its first document, instead of one for every document: of short documents there
are billions. A plan is of one shard: it does not depend on the others, so that a corpus that grows keeps its rows.

Half a microsecond of a row's plan is nothing for millions of documents. That of a large corpus is stored beside it:
processes that open it again map the file into memory, which they share.
"""

from bisect import bisect_right
from contextlib import nullcontext, suppress

import numpy as np

from torchrecipes.atomic_write import write_atomically
from torchrecipes.data.corpus.corpus import Corpus
from torchrecipes.data.corpus.shard_writer import CORPUS_FILE
from torchrecipes.data.progress import waiting_for

STORED = 2**24  # documents from which a plan is stored
DTYPE = np.dtype("<i4")


def plan_corpus(corpus: Corpus, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Plans the rows of a corpus, or maps a stored plan into memory.

    Args:
        corpus: the documents.
        seq_len: tokens per row.

    Returns:
        The plans of its K shards, one after the other: int32 `[R + K]`. And the first row of every shard, and R: int64
        `[K + 1]`. Row n, of shard k, is at `n + k`.
    """
    sizes = [len(shard.document_offsets) - 1 for shard in corpus.shards]
    path = corpus.folder / f"rows-next_fit-{seq_len}-{corpus.fingerprint}.bin"
    is_large = corpus.num_documents >= STORED and (corpus.folder / CORPUS_FILE).exists()
    if is_large:
        with suppress(OSError, ValueError):
            plan = np.asarray(np.memmap(path, DTYPE, "r"))
            # Within a shard numbers do not fall, and each ends with its number of documents.
            ends = np.append(np.flatnonzero(plan[1:] < plan[:-1]), len(plan) - 1)
            if plan[ends].tolist() == sizes:
                return plan, np.append(0, ends + 1) - np.arange(len(sizes) + 1)
    with waiting_for(f"planning rows of {corpus.folder}") if is_large else nullcontext():
        shortest = corpus.shortest_document
        plans = [plan_rows(np.asarray(shard.document_offsets), seq_len, shortest) for shard in corpus.shards]
    plan = np.concatenate(plans)
    if is_large:
        with suppress(OSError):  # it saves the time to plan them again, no more
            write_atomically(path, [memoryview(plan.astype(DTYPE, copy=False)).cast("B")])
    return plan, np.cumsum([0, *(len(part) - 1 for part in plans)])


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
