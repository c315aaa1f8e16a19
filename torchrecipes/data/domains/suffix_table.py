"""Looks up the public suffixes of many names at a time.

1. A rule speaks of a tail of a name: the last label, the last two, and so on. All names are looked up by their last
   label, then those that have more by their last two, and so on; a longer tail that a rule speaks of overrides a
   shorter one.
2. A filter, indexed by a hash of a tail's length and last 8 bytes, leaves few candidates.
3. A candidate's `name_hashes` gives the only rule that it can be, by a perfect hash table ("hash, displace": Fox,
   Heath, Chen, Daoud 1992, https://doi.org/10.1145/133160.133209).
4. The bytes of both are compared, so that the answer is exact.
"""

import numpy as np

from torchrecipes.data.domains.hashing import hash_words, name_hashes, words_of

FILTER_BITS = 17
LENGTH_KEY, FILTER_KEY = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)
FILTER_SHIFT = np.uint64(64 - FILTER_BITS)
PADDING = 16  # bytes that a buffer has before the first name and after the last one
# How far a word of 8 bytes is shifted to the right, so that its last 0 to 8 bytes remain.
SHIFTS = np.array([63, 56, 48, 40, 32, 24, 16, 8, 0], np.uint64)


class SuffixTable:
    """The rules of a public suffix list as arrays.

    Args:
        rules: as in `PublicSuffixList`; those that say what the default rule says are left out.
    """

    def __init__(self, rules: dict[str, int]):
        kept = {tail.encode("latin-1"): extra for tail, extra in rules.items() if extra or "." in tail}
        self.max_labels = max((1 + tail.count(b".") for tail in kept), default=0)
        self.extra = np.array([*kept.values(), 0], np.int64)  # the last rule is none
        self.lengths = np.array([*map(len, kept), 0], np.int64)
        buffer = np.frombuffer(b"".join([bytes(PADDING), *kept, bytes(PADDING)]), np.uint8)
        self.ends = PADDING + np.cumsum(self.lengths)
        self.words = words_of(buffer)
        self.filter = np.zeros(1 << FILTER_BITS, bool)
        self.filter[_filter_places(self.words[self.ends[:-1] - 8], self.lengths[:-1])] = True
        self.slots = _PerfectTable(name_hashes(buffer[PADDING:-PADDING], self.lengths[:-1]))

    def suffix_labels(
        self, words: np.ndarray, ends: np.ndarray, label_starts: np.ndarray, last: np.ndarray, num_labels: np.ndarray
    ) -> np.ndarray:
        """Return the number of labels of every name's public suffix.

        Args:
            words: `words_of` a buffer with `PADDING` before the first name and after the last one.
            ends: where the names end in the buffer, `[D]`.
            label_starts: where labels start in the buffer, `[L]`.
            last: which of these is each name's last label; its labels follow each other, `[D]`.
            num_labels: labels of each name, `[D]`.

        Returns:
            `[D]` int64, from 1 to `num_labels`.
        """
        end_words = words[ends - 8]
        names, lengths = None, ends - label_starts[last]  # of all names, the tail of one label
        tails = []  # candidates: names, lengths of the tails, labels of the tails
        for labels in range(1, self.max_labels + 1):
            if labels == 2:
                lengths = ends - label_starts[last - 1]  # most names have two: the others are a suffix at any rate
            elif labels > 2:
                names = np.flatnonzero(num_labels >= labels) if names is None else names[num_labels[names] >= labels]
                if not len(names):
                    break
                lengths = ends[names] - label_starts[last[names] - (labels - 1)]
            places = _filter_places(end_words if names is None else end_words[names], lengths)
            some = np.flatnonzero(self.filter[places])
            tails.append((some if names is None else names[some], lengths[some], np.full(len(some), labels)))
        found = np.ones(len(ends), np.int64)
        if tails:
            names, lengths, labels = map(np.concatenate, zip(*tails, strict=True))
            which, rules = self._match(words, ends[names], lengths)
            names = names[which]
            # Of several values for a name the last is kept, which is that of its longest tail.
            found[names] = np.minimum(labels[which] + self.extra[rules], num_labels[names])
        return found

    def _match(self, words: np.ndarray, ends: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the tails that a rule speaks of, as indices, and these rules."""
        rules = self.slots.find(hash_words(words, ends - lengths, lengths))
        tails = np.flatnonzero(self.lengths[rules] == lengths)
        rules, lengths, ends = rules[tails], lengths[tails], ends[tails]
        differ = np.zeros(len(tails), bool)
        some = np.arange(len(tails))
        for back in range(0, int(lengths.max(initial=0)), 8):
            if back:
                some = some[lengths[some] > back]
            ours, theirs = words[ends[some] - (back + 8)], self.words[self.ends[rules[some]] - (back + 8)]
            differ[some] |= (ours ^ theirs) >> SHIFTS.take(lengths[some] - back, mode="clip") != 0
        same = ~differ
        return tails[same], rules[same]


class _PerfectTable:
    """Maps each of some different hashes to its index, and others to any index or to `len(hashes)`.

    Hashes are in groups by their highest bits. A group's displacement is chosen so that its hashes fall on free slots.
    """

    def __init__(self, hashes: np.ndarray):
        bits = max(8, len(hashes).bit_length() + 1)
        self.group_shift = np.uint64(64 - (bits - 4))
        self.mask = np.uint64((1 << bits) - 1)
        self.indices = np.full(1 << bits, len(hashes), np.int64)
        self.displacements = np.zeros(1 << (bits - 4), np.uint64)
        groups: dict[int, list[tuple[int, int]]] = {}
        for index, value in enumerate(hashes.tolist()):
            groups.setdefault(value >> int(self.group_shift), []).append((index, value))
        free, mask = bytearray(b"\1" * (1 << bits)), int(self.mask)
        for group, members in sorted(groups.items(), key=lambda item: -len(item[1])):
            for displacement in range(1 << 32):
                slots = [(value + displacement * (value >> 20)) & mask for _, value in members]
                if len(set(slots)) == len(slots) and all(map(free.__getitem__, slots)):
                    break
            self.displacements[group] = displacement
            for slot, (index, _) in zip(slots, members, strict=True):
                free[slot], self.indices[slot] = 0, index

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """Return the index that each hash would have, `[T]` int64."""
        displacements = self.displacements[(hashes >> self.group_shift).view(np.int64)]
        slots = (hashes + displacements * (hashes >> np.uint64(20))) & self.mask
        return self.indices[slots.view(np.int64)]


def _filter_places(end_words: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The places of tails in the filter, given the 8 bytes up to their end and their lengths, `[T]` int64."""
    keys = end_words >> SHIFTS.take(lengths, mode="clip")
    keys += lengths.view(np.uint64) * LENGTH_KEY
    keys *= FILTER_KEY
    keys >>= FILTER_SHIFT
    return keys.view(np.int64)
