"""`NameSplit`: which names are held out for validation.

1. A name is held out if its hash is below a fraction of all hashes.
2. Of every public suffix with `FEW` names or more, one at least is held out: where rule 1 takes none, the name with the
   lowest hash is.
3. When names are added, those that are there stay where they are, and equal names are always on the same side. Rule 2
   then holds for the names of a suffix old and new together, and chooses among the new ones.

So the choice depends on the names alone, not on their order, on files or on the machine.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors import SafetensorError
from safetensors.numpy import load, save

from torchrecipes.atomic_write import write_atomically
from torchrecipes.data.corpus.build import FEW, one_document
from torchrecipes.data.domains.suffix_counts import NO_HASH, NO_HASHES, SuffixCounts, count_suffixes
from torchrecipes.errors import UserError

SPLIT_FORMAT = "torchrecipes-name-split-1"


@dataclass(frozen=True)
class NameSplit:
    """Says which names are held out, and knows what the next addition needs.

    Attributes:
        limit: names with a lower hash are held out.
        chosen: uint64 `[H]`, ascending: hashes of the other names that are.
        suffixes: S public suffixes, in alphabetical order.
        counts: int64 `[S]`, names of each that were added so far.
        is_held_out: bool `[S]`, whether a name of each is.
        few_hashes: uint64 `[F]`, ascending: the names of suffixes of which none is held out.
        few_suffixes: int64 `[F]`, the place of their suffixes in `suffixes`.
        holds_out_added: whether one of the names that were added last is held out.
    """

    limit: int
    chosen: np.ndarray
    suffixes: list[str]
    counts: np.ndarray
    is_held_out: np.ndarray
    few_hashes: np.ndarray
    few_suffixes: np.ndarray
    holds_out_added: bool = False

    def holds_out(self, hashes: np.ndarray) -> np.ndarray:
        """Whether the names with these hashes, uint64 `[D]`, are for validation: bool `[D]`."""
        held_out = hashes < np.uint64(self.limit)
        if len(self.chosen):
            near = np.flatnonzero(hashes <= self.chosen[-1])
            values = hashes[near]
            held_out[near] |= self.chosen[self.chosen.searchsorted(values)] == values
        return held_out

    def extended(self, added: SuffixCounts) -> "NameSplit":
        """The split of the names so far and of more names, which were counted with this one as the earlier split."""
        suffixes = sorted({*self.suffixes, *added.suffixes})
        place = {suffix: i for i, suffix in enumerate(suffixes)}
        old, new = (np.array([place[one] for one in own], np.int64) for own in (self.suffixes, added.suffixes))
        counts, lowest = np.zeros(len(suffixes), np.int64), np.full(len(suffixes), NO_HASH)
        held_out = np.zeros(len(suffixes), bool)
        counts[old] += self.counts
        counts[new] += added.counts
        lowest[new] = added.lowest
        held_out[old] = self.is_held_out
        held_out |= lowest < np.uint64(self.limit)
        choose = (counts >= FEW) & ~held_out & (lowest != NO_HASH)
        if self.limit and not self.suffixes and not (held_out | choose).any():  # a name at least, whatever the suffix
            choose[lowest.argmin()] = True
        held_out |= choose
        hashes = np.concatenate([self.few_hashes, added.few_hashes])
        of_suffix = np.concatenate([old[self.few_suffixes], new[added.few_suffixes]])
        few = np.flatnonzero(~held_out[of_suffix])
        few = few[np.lexsort((of_suffix[few], hashes[few]))]
        chosen = np.union1d(self.chosen, lowest[choose])
        new_held_out = bool(added.num_held_out or choose.any() or (added.lowest < np.uint64(self.limit)).any())
        return NameSplit(self.limit, chosen, suffixes, counts, held_out, hashes[few], of_suffix[few], new_held_out)

    def save(self, path: Path, made_from: dict[str, Any]) -> None:
        """Writes the split to a file; `load_split` gives it back for the same `made_from`."""
        arrays = {
            "chosen": self.chosen,
            "suffixes": np.frombuffer("\n".join(self.suffixes).encode(), np.uint8),
            "counts": self.counts,
            "is_held_out": self.is_held_out,
            "few_hashes": self.few_hashes,
            "few_suffixes": self.few_suffixes,
        }
        about = {"format": SPLIT_FORMAT, "limit": self.limit, "holds_out_added": self.holds_out_added}
        about |= {"made_from": made_from, "xxh3": _checksum(arrays)}
        write_atomically(path, [save(arrays, {"about": json.dumps(about)})])  # safetensors writes keys in any order


def first_split(limit: int) -> NameSplit:
    """The split of no names, to be extended."""
    none = np.empty(0, np.int64)
    return NameSplit(limit, NO_HASHES, [], none, none.astype(bool), NO_HASHES, none)


def load_split(path: Path, made_from: dict[str, Any] | None = None) -> NameSplit | None:
    """Reads what `NameSplit.save` wrote; None where there is no such file, or one that was made from something else.

    Raises:
        UserError: the file is corrupt (code `corrupt_corpus`).
    """
    try:
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        about = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["about"])
        if about["format"] != SPLIT_FORMAT:
            raise ValueError(f"its format is not {SPLIT_FORMAT}")
        if made_from is not None and about["made_from"] != made_from:
            return None
        arrays = load(content)
        if _checksum(arrays) != about["xxh3"]:
            raise ValueError("wrong checksum")
        suffixes = arrays.pop("suffixes").tobytes().decode().split("\n")
        return NameSplit(limit=about["limit"], suffixes=suffixes, holds_out_added=about["holds_out_added"], **arrays)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        hint = "Delete the folder and build the corpus again."
        raise UserError(f"{path} cannot be read ({error})", hint=hint, code="corrupt_corpus") from error


def _checksum(arrays: dict[str, np.ndarray]) -> str:
    return xxhash.xxh3_64_hexdigest(b"".join(arrays[name].tobytes() for name in sorted(arrays)))


def split_names(
    path: Path, source: Any, limit: int, threads: int | None, earlier: NameSplit | None = None
) -> NameSplit:
    """Reads the split of a source from `path`, or counts its names and writes it there.

    Args:
        path: the file.
        source: gives names in bulk, as `domain_names` does.
        limit: names with a lower hash are held out.
        threads: that parse names.
        earlier: the split of the names to which those of the source are added.

    Raises:
        UserError: no names (code `no_documents`), a single one (`one_document`), or what the source raises.
    """
    before = int(earlier.counts.sum()) if earlier else 0
    made_from = {"source": source.fingerprint, "limit": limit, "names_before": before, "names_per_suffix": FEW}
    split = load_split(path, made_from)
    if split is None:
        counts = count_suffixes(source, threads, earlier)
        if not earlier and counts.counts.sum() < FEW and len(np.unique(counts.few_hashes)) == 1:
            raise one_document()
        split = (earlier or first_split(limit)).extended(counts)
        split.save(path, made_from)
    return split
