"""`report_split`: how the names of a corpus are divided, and whether that is what the rule gives.

Every name is read once, from the shards. The memory is the hashes of the validation names and a few numbers for every
public suffix.
"""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from torchrecipes.data.corpus import Corpus, open_corpus
from torchrecipes.data.corpus.build import FEW, HASHES, SETTINGS_FILE, in_order, num_threads
from torchrecipes.data.corpus.shards import Shard
from torchrecipes.data.domains.encoding import CHARACTER_OF, CLS, SEP, VOCABULARY
from torchrecipes.data.domains.hashing import name_hashes
from torchrecipes.data.domains.name_split import NameSplit, first_split
from torchrecipes.data.domains.suffix_counts import NO_HASHES, SuffixCounter
from torchrecipes.data.progress import Progress
from torchrecipes.errors import UserError

NAMES_AT_A_TIME = 1 << 17
FILTER_BITS = 24


@dataclass(frozen=True)
class SplitReport:
    """How the names of a corpus are divided.

    Attributes:
        suffixes: S public suffixes, those with most names first.
        train, validation: int64 `[S]`, names of each on either side; a name that occurs twice counts twice.
        num_in_both: training names that are validation names, too.
        fraction: the share that is held out by the hash of the name; None: names were held out in another way.
        problems: what is not as the rule says; empty: all is, or there is no rule.
    """

    suffixes: list[str]
    train: np.ndarray
    validation: np.ndarray
    num_in_both: int
    fraction: float | None
    problems: list[str]

    def rows(self) -> list[dict[str, Any]]:
        """A row for every suffix, as JSON values."""
        columns = zip(self.suffixes, self.train.tolist(), self.validation.tolist(), strict=True)
        return [
            {"suffix": suffix, "train": train, "validation": held_out, "share": held_out / (train + held_out)}
            for suffix, train, held_out in columns
        ]


def report_split(folder: str | Path, threads: int | None = None) -> SplitReport:
    """Reads the names of a corpus and reports how they are divided.

    Where the corpus was made of names in bulk, the rule of `NameSplit` is applied to what is there, each addition after
    the other, and compared.

    Args:
        folder: what `prepare_corpus` made of domain names: the folder of `train` and `validation`.
        threads: that read names; None: one per core.

    Raises:
        UserError: no corpus (code `no_corpus`), not one of domain names (`no_names`), or a corrupt one
            (`corrupt_corpus`).
    """
    folder = Path(folder)
    train = open_corpus(folder / "train")
    held_out = open_corpus(folder / "validation") if (folder / "validation").is_dir() else None
    if "suffix_starts" not in train.column_names:
        hint = "Give a corpus that was made with domain_tokenizer."
        raise UserError(f"{folder} holds no domain names", hint=hint, code="no_names")
    settings = json.loads((folder / SETTINGS_FILE).read_text("utf-8"))["validation"]
    fraction = settings["fraction"] if "names_per_suffix" in settings else None
    limit = None if fraction is None else int(fraction * HASHES)
    corpora = [train] + ([held_out] if held_out else [])
    progress = Progress("reading names", sum(corpus.num_tokens for corpus in corpora), "names")
    try:
        of_validation, hashes = SuffixCounter(), [NO_HASHES]
        for found in _read(held_out.shards if held_out else [], of_validation, threads, progress):
            of_validation.add(found.suffixes)
            hashes.append(found.hashes)
        members, in_both, problems = _Members(np.unique(np.concatenate(hashes))), 0, []
        total: Counter[str] = Counter()
        split = None if limit is None else first_split(limit)
        for number, parts in enumerate(_segments(corpora)):
            counter, below, own = SuffixCounter(split if number else None), 0, [NO_HASHES]
            for side, shards in enumerate(parts):
                for found in _read(shards, counter, threads, progress):
                    counter.add(found.suffixes)
                    if side:
                        own.append(found.hashes)
                    else:
                        in_both += members.count(found.hashes)
                        below += int((found.hashes < np.uint64(limit)).sum()) if limit else 0
            counts = counter.counts()
            total.update(dict(zip(counts.suffixes, counts.counts.tolist(), strict=True)))
            if split is not None:
                split = split.extended(counts)
                where = f"in addition {number}, " if number else ""
                problems += [where + problem for problem in _compare(split, np.concatenate(own), members, below)]
    finally:
        progress.close()
    if in_both:
        problems.append(f"{in_both:,} training names are validation names, too")
    held = of_validation.counts()
    by_suffix = dict(zip(held.suffixes, held.counts.tolist(), strict=True))
    suffixes = sorted(total, key=lambda suffix: (-total[suffix], suffix))
    validation = np.array([by_suffix.get(suffix, 0) for suffix in suffixes], np.int64)
    names = np.array([total[suffix] for suffix in suffixes], np.int64)
    return SplitReport(suffixes, names - validation, validation, in_both, fraction, problems)


def _compare(split: NameSplit, held_out: np.ndarray, members: "_Members", below: int) -> list[str]:
    """What is not as the rule says of names that were made together.

    Args:
        split: what the rule gives, with these names.
        held_out: hashes of those that are held out, uint64.
        members: all that are held out, of other names, too.
        below: training names whose hash is below the limit.
    """
    problems = []
    if below:
        problems.append(f"{below:,} training names are to be held out by their hash")
    if others := int((~split.holds_out(held_out)).sum()):
        problems.append(f"{others:,} validation names are not to be held out")
    if missing := len(split.chosen) - members.count(split.chosen):
        problems.append(f"{missing:,} public suffixes have {FEW} names or more, and the one to be held out is not")
    return problems


class _Members:
    """A set of hashes, from which most others differ in their highest bits."""

    def __init__(self, hashes: np.ndarray):
        self.hashes = hashes  # ascending
        self._filter = np.zeros(1 << FILTER_BITS, bool)
        self._filter[hashes >> np.uint64(64 - FILTER_BITS)] = True

    def count(self, hashes: np.ndarray) -> int:
        """The number of these hashes that are in the set."""
        likely = hashes[self._filter[hashes >> np.uint64(64 - FILTER_BITS)]]
        if not len(likely):
            return 0
        near = np.minimum(self.hashes.searchsorted(likely), len(self.hashes) - 1)
        return int((self.hashes[near] == likely).sum())


class _Found(NamedTuple):
    """Some names: what `SuffixCounter.look` gives, and uint64 hashes."""

    suffixes: Any
    hashes: np.ndarray


def _read(shards: list[Shard], counter: SuffixCounter, threads: int | None, progress: Progress) -> Iterator[_Found]:
    def pieces() -> Iterator[tuple[Shard, int, int]]:
        for shard in shards:
            count = len(shard.document_offsets) - 1
            for first in range(0, count, NAMES_AT_A_TIME):
                yield shard, first, min(first + NAMES_AT_A_TIME, count)

    def look(piece: tuple[Shard, int, int]) -> tuple[_Found, int]:
        shard, first, last = piece
        offsets = shard.document_offsets[first : last + 1]
        tokens = shard.tokens[offsets[0] : offsets[-1]]
        _check_names(shard, offsets, tokens, shard.columns["suffix_starts"][first:last])
        offsets = offsets - offsets[0]
        is_character = np.ones(len(tokens), bool)
        is_character[offsets[:-1]] = is_character[offsets[1:] - 1] = False  # [CLS] and [SEP]
        characters, lengths = CHARACTER_OF[tokens[is_character]], np.diff(offsets) - 2
        starts = shard.columns["suffix_starts"][first:last].astype(np.int64) - 1
        hashes = name_hashes(characters, lengths)
        return _Found(counter.look(characters, lengths, starts, hashes), hashes), len(tokens)

    with closing(in_order(look, pieces(), num_threads(threads))) as results:
        for _, (found, num_tokens) in results:
            progress.add(len(found.hashes), num_tokens)
            yield found


def _check_names(shard: Shard, offsets: np.ndarray, tokens: np.ndarray, suffix_starts: np.ndarray) -> None:
    """Refuses what are no names, or names without a suffix: their hashes would be of nothing."""
    lengths, starts = np.diff(offsets), offsets[:-1] - offsets[0]
    if (
        len(tokens) == offsets[-1] - offsets[0]
        and lengths.min() > 2
        and not (tokens >= len(VOCABULARY)).any()
        and (tokens[starts] == CLS).all()
        and (tokens[starts + lengths - 1] == SEP).all()
        and ((suffix_starts > 0) & (suffix_starts < lengths - 1)).all()
    ):
        return
    raise UserError(
        f"{shard.path} is corrupt: it holds documents that are no names",
        hint="Check every byte with tune-style data verify, and build the corpus again.",
        code="corrupt_corpus",
    )


def _segments(corpora: list[Corpus]) -> list[list[list[Shard]]]:
    """The shards that were made together, by corpus: those of the corpora at first, then of each addition."""
    ends = [[0, *(one["first_shard"] for one in corpus.additions), len(corpus.shards)] for corpus in corpora]
    number = len(corpora[0].additions) + 1
    return [
        [corpus.shards[own[i] : own[i + 1]] for corpus, own in zip(corpora, ends, strict=True)] for i in range(number)
    ]
