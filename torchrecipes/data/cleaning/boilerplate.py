"""Lines that recur in many documents: menus, notices, licence headers.

1. The first pass over the documents writes, for every piece, the sorted hashes of its lines and the number of its
   documents that hold each.
2. The counts of all pieces are added, one range of hashes after the other, so that memory does not grow with the
   corpus. What is at or above the threshold is boilerplate.
3. The second pass removes those lines.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from torchrecipes.config.metadata import Count, Fraction
from torchrecipes.data.cleaning.removal import Removal

PARTITION_ROWS = 1 << 21  # hashes in memory at a time; with what sorting needs, 100 MB


@dataclass(frozen=True)
class BoilerplateLines:
    """Removes lines that occur in at least `min_documents` documents and in `min_share` of all of them.

    Lines are compared without white space at their ends. Blank lines are kept.

    Args:
        min_documents: documents in which a line must occur to be boilerplate.
        min_share: share of all documents in which it must occur, too.
        min_characters: shorter lines are never removed: `}`, `return None` and headings recur, too.
    """

    min_documents: Count = 20
    min_share: Fraction = 0.001
    min_characters: Count = 30

    def threshold(self, documents: int) -> int:
        """Return the number of documents from which a line is boilerplate, in a corpus of `documents`."""
        return max(self.min_documents, math.ceil(self.min_share * documents), 2)

    def hashes(self, text: str) -> list[int]:
        """Return the hashes of the different lines that are long enough."""
        return [_hash(line) for line in {line.strip() for line in text.split("\n")} if self._long(line)]

    def remove(self, text: str, boilerplate: frozenset[int]) -> tuple[str | Removal, list[str]]:
        """Return the text without its boilerplate lines, or why it is removed; and those lines."""
        kept, removed = [], []
        for line in text.split("\n"):
            stripped = line.strip()
            is_boilerplate = self._long(stripped) and _hash(stripped) in boilerplate
            (removed if is_boilerplate else kept).append(line)
        if not removed:
            return text, removed
        left = "\n".join(kept).strip("\n")
        return left if left and not left.isspace() else Removal("boilerplate_lines.empty", "no other line"), removed

    def _long(self, line: str) -> bool:
        return len(line) >= max(1, self.min_characters)


def _hash(line: str) -> int:
    return xxhash.xxh3_64_intdigest(line.encode())


def count_lines(texts: Sequence[str], step: BoilerplateLines) -> tuple[np.ndarray, np.ndarray]:
    """Return the sorted hashes of all lines (uint64) and the number of texts that hold each (uint32)."""
    hashes = np.array([value for text in texts for value in step.hashes(text)], np.uint64)
    lines, counts = np.unique(hashes, return_counts=True)
    return lines, counts.astype(np.uint32)


def frequent_lines(
    pieces: Sequence[tuple[Path, Path]], threshold: int, on_progress: Callable[[], None] = lambda: None
) -> np.ndarray:
    """Return the sorted hashes of the lines that occur in `threshold` documents or more.

    Args:
        pieces: files of hashes and of counts (`.npy`), as `count_lines` gives them.
        threshold: number of documents.
        on_progress: called after each range of hashes.
    """
    total = sum(np.load(lines, mmap_mode="r").size for lines, _ in pieces)
    ranges = max(1, math.ceil(total / PARTITION_ROWS))
    edges = [round(number * (1 << 64) / ranges) for number in range(1, ranges)]
    found, first = [], [0] * len(pieces)
    for edge in [*edges, None]:
        parts = []
        for number, (lines_file, counts_file) in enumerate(pieces):
            lines, counts = np.load(lines_file, mmap_mode="r"), np.load(counts_file, mmap_mode="r")
            stop = lines.size if edge is None else int(np.searchsorted(lines, np.uint64(edge)))
            parts.append((lines[first[number] : stop], counts[first[number] : stop]))
            first[number] = stop
        lines, index = np.unique(np.concatenate([part for part, _ in parts]), return_inverse=True)
        counts = np.bincount(index, np.concatenate([part for _, part in parts]), len(lines))
        found.append(lines[counts >= threshold])
        on_progress()
    return np.concatenate(found)
