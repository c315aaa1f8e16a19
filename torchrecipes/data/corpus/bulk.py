"""Domain names in bulk: blocks of lines are parsed and encoded in numpy, and never become documents of Python.

As for documents, the work of a block is done in threads and taken in the order of the blocks, and where a shard ends
depends on the names alone. A position is the start of a block, and a number of names after it.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np

from torchrecipes.data.corpus.build import in_order
from torchrecipes.data.corpus.shard_writer import SourcePosition, Tokenized
from torchrecipes.data.domains.encoding import UNK
from torchrecipes.data.domains.name_files import add_skipped, count_names
from torchrecipes.data.domains.name_split import NameSplit
from torchrecipes.data.sources.records import ReadStats
from torchrecipes.data.tokenizers.tokenizer import Tokenizer


class NameReader:
    """Reads names from a position on.

    Args:
        source: gives names in bulk, as `domain_names` does.
        tokenizer: of domain names.
        start: where to read on.
        split: which names are for validation; None: none.
        samples: the first names, so many, are for validation.

    Attributes:
        report: what was skipped in the source, from its start to where it was read.
    """

    def __init__(
        self, source: Any, tokenizer: Tokenizer, start: SourcePosition, split: NameSplit | None = None, samples: int = 0
    ):
        self.source, self.tokenizer, self.start, self.split, self.samples = source, tokenizer, start, split, samples
        self._before = ReadStats(skipped=start.skipped, examples=start.examples)
        self.report = self._before

    def batches(self, threads: int) -> Iterator[tuple[SourcePosition, Tokenized]]:
        """Yields the names of every block with the place of the first of them."""
        start, names = self.start, ReadStats()
        to_skip = start.skip
        place = replace(start, skip=0, documents=start.documents - start.skip)  # of the beginning of the block
        with closing(in_order(self._encode, self._blocks(start.position), threads)) as results:
            for (block, files), (tokenized, rejected) in results:
                count = len(tokenized.lengths)
                if place.documents < self.samples:
                    tokenized.splits[: self.samples - place.documents] = 1
                skip = min(to_skip, count)
                yield place.after(skip), _without_first(tokenized, skip)
                to_skip -= skip
                names = _sum(names, rejected)
                # Without what was skipped in the files after this block: who reads on from here skips it again.
                total = _sum(self._before, files, names)
                place = replace(
                    place, position=block.position, documents=place.documents + count,
                    skipped=total.skipped, examples=total.examples,
                )  # fmt: skip
        self.report = _sum(self._before, self.source.report, names)

    def _blocks(self, position: dict[str, Any] | None) -> Iterator[tuple[Any, ReadStats]]:
        for block in self.source.blocks(position):
            yield block, _sum(self.source.report)

    def _encode(self, item: tuple[Any, ReadStats]) -> tuple[Tokenized, ReadStats]:
        block, rejected = item[0], ReadStats()
        parsed = self.source.parse(block)
        count_names(rejected, block, parsed)
        tokens, lengths, columns = self.tokenizer.domain.encode(parsed)
        counts = np.zeros((len(lengths), 4), np.uint8, order="F")
        counts[:, 0] = counts[:, 1] = parsed.lengths
        unknown = np.flatnonzero(tokens == UNK)  # underscores
        if len(unknown):
            counts[:, 2] = np.bincount(np.cumsum(lengths).searchsorted(unknown, "right"), minlength=len(lengths))
        splits = np.zeros(len(lengths), np.uint8) if self.split is None else self.split.holds_out(parsed.hashes)
        return Tokenized(tokens, lengths, counts, splits.view(np.uint8), columns), rejected


def _without_first(batch: Tokenized, count: int) -> Tokenized:
    if not count:
        return batch
    columns = {name: values[count:] for name, values in batch.columns.items()}
    tokens = batch.tokens[int(batch.lengths[:count].sum()) :]
    return Tokenized(tokens, batch.lengths[count:], batch.counts[count:], batch.splits[count:], columns)


def _sum(*reports: ReadStats) -> ReadStats:
    """What all reports say was skipped, in an order that does not depend on where reading began."""
    total = ReadStats()
    for report in reports:
        add_skipped(total, report)
    return ReadStats(skipped=dict(sorted(total.skipped.items())), examples=dict(sorted(total.examples.items())))
