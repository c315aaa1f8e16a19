"""`Corpus`: tokenized documents on disk, read by memory map.

1. `prepare_corpus` tokenizes a source into two corpora, `train` and `validation` (build.py does the work). Called again
   with the same arguments it opens them; after an interruption it continues after the last complete shard.
2. A corpus is a folder of shards (shards.py) and a `corpus.json`, which is written last.
3. The shards one after the other are one long row of tokens; a global position is a position in it. No document crosses
   from one shard to the next. A document is stored as the tokenizer's post-processor makes it, `[CLS] ... [SEP]`.

Opening takes milliseconds: sizes are always checked, checksums by `verify()`.
"""

import json
from bisect import bisect_right
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from torchrecipes.data.corpus.build import build_corpus, corpus_settings
from torchrecipes.data.corpus.shard_writer import CORPUS_FILE
from torchrecipes.data.corpus.shards import FORMAT, FORMATS, Shard, Statistics, checksums, open_shard
from torchrecipes.data.sources.records import Source
from torchrecipes.data.tokenizers.tokenizer import Tokenizer
from torchrecipes.errors import UserError

if TYPE_CHECKING:
    from torchrecipes.data.domains.name_split import NameSplit

MUCH_UNKNOWN = 0.02  # fraction of the tokens above which the summary warns
FEW_DOCUMENTS = 10  # for validation: below, the summary warns
PENDING_FILE = "pending.json"  # beside `train` and `validation`: what their corpus.json files will hold (append.py)


class Corpus:
    """Tokenized documents, opened by `open_corpus`. Threads may share it; pickled, it is its path and is opened again.

    Attributes:
        folder: the folder.
        shards: the open shards, in order; their arrays may be read directly.
        num_documents, num_tokens: totals, special tokens included.
        shortest_document, longest_document: lengths in tokens, special ones included.
        dtype: type of the tokens, uint8, uint16 or uint32.
        column_names: of the numbers that its shards hold of every document (`Shard.columns`), such as `suffix_ids`.
        tokenizer_fingerprint: fingerprint of the tokenizer that made it.
        fingerprint: xxh3-128 (hex) of the tokenizer's fingerprint and the tokens, wherever they came from.
        statistics: more numbers: see `summary`.
    """

    def __init__(
        self, folder: Path, account: dict[str, Any], shards: list[Shard], reopen: tuple[Any, tuple] | None = None
    ):
        self.folder, self.account, self.shards = folder, account, shards
        self._reopen = reopen  # a function and its arguments
        self.statistics = Statistics(**account["statistics"])
        self.num_documents, self.num_tokens = self.statistics.documents, self.statistics.tokens
        self.shortest_document, self.longest_document = self.statistics.shortest, self.statistics.longest
        self.dtype = shards[0].tokens.dtype
        self.column_names = tuple(shards[0].columns)
        self.tokenizer_fingerprint: str = account["tokenizer"]["fingerprint"]
        self.fingerprint = _fingerprint(account, len(shards))
        self._first = [shard.token_offset for shard in shards]
        self._first_document = np.array([shard.document_offset for shard in shards])

    def __reduce__(self) -> tuple:
        return self._reopen or (_reopen, (self.folder, self.fingerprint))

    @property
    def additions(self) -> list[dict[str, Any]]:
        """What `append_to_corpus` has added, the oldest first: its records, as that function returns them."""
        return self.account.get("additions", [])

    @property
    def lineage(self) -> list[str]:
        """The fingerprints that this corpus has had: one before each addition, and its own last."""
        sizes = [addition["first_shard"] for addition in self.additions]
        return [*(_fingerprint(self.account, size) for size in sizes), self.fingerprint]

    def before_additions(self, fingerprint: str) -> "Corpus":
        """This corpus as it was when it had the fingerprint, one of `lineage`."""
        if fingerprint == self.fingerprint:
            return self
        number = self.lineage.index(fingerprint)
        size, statistics = (self.additions[number][key] for key in ("first_shard", "before"))
        shards = {"shards": self.account["shards"][:size], "statistics": statistics}
        account = {**self.account, **shards, "additions": self.additions[:number]}
        return Corpus(self.folder, account, self.shards[:size])

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens at the global positions from `start` up to `stop`: `[stop - start]` of `dtype`, read-only."""
        self._check(start, stop)
        pieces = [shard.tokens[i:j] for shard, i, j in self._shards_in(start, stop)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def boundaries(self, start: int, stop: int) -> np.ndarray:
        """The global positions strictly between `start` and `stop` at which documents start, int64."""
        self._check(start, stop)
        pieces = []
        for shard, i, j in self._shards_in(start, stop):
            starts = shard.document_offsets
            # The first document of a shard starts inside the range if the range began in an earlier shard.
            inside = starts[starts.searchsorted(i, "left" if shard.token_offset > start else "right") :]
            pieces.append(inside[: inside.searchsorted(j)] + shard.token_offset)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def spans(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The global positions of the starts and ends of documents, given by their numbers from 0; int64."""
        documents = np.asarray(documents, np.int64)
        if documents.size and not (documents.min() >= 0 and documents.max() < self.num_documents):
            raise ValueError(f"documents are numbered from 0 to {self.num_documents - 1}")
        starts, stops = np.empty_like(documents), np.empty_like(documents)
        of_shard = np.searchsorted(self._first_document, documents, "right") - 1
        for index in np.unique(of_shard):
            shard, chosen = self.shards[index], of_shard == index
            local = documents[chosen] - shard.document_offset
            starts[chosen] = shard.document_offsets[local] + shard.token_offset
            stops[chosen] = shard.document_offsets[local + 1] + shard.token_offset
        return starts, stops

    def verify(self) -> None:
        """Reads all shards and compares checksums.

        Raises:
            UserError: shards are corrupt (code `corrupt_corpus`); names each.
        """
        corrupt = [
            shard.path.name
            for shard, stated in zip(self.shards, self.account["shards"], strict=True)
            if checksums(shard.path)[0] != stated["xxh3"]
        ]
        if corrupt:
            raise _corrupt(self.folder, f"{', '.join(corrupt)}: wrong checksum")

    def summary(self, seq_len: int | None = None, name: str | None = None) -> str:
        """Describes the content in a few lines, with warnings about what makes training or its evaluation poor.

        Args:
            seq_len: tokens per row. If given, documents that are much shorter are reported.
            name: of the part of a mixture, or of the evaluation set; None: the only text.
        """
        numbers, split = self.statistics, self.account["split"]
        title = split if name is None else name if split == "train" else f"{name}, {split}"
        lines = [
            f"{title}: {numbers.documents:,} documents, {numbers.tokens:,} tokens "
            f"({numbers.tokens / numbers.documents:,.1f} per document, {numbers.shortest:,} to {numbers.longest:,}), "
            f"{numbers.bytes / numbers.tokens:.2f} bytes of text per token, "
            f"{numbers.unknown / numbers.tokens:.3%} unknown tokens"
        ]
        if numbers.unknown > MUCH_UNKNOWN * numbers.tokens:
            lines.append(
                "  warning: many tokens are unknown: the model learns to predict that one, and losses look too good. "
                "Use a larger vocabulary (limit_alphabet), or train_bpe, to which nothing is unknown"
            )
        mean = numbers.tokens / numbers.documents
        if split == "validation" and numbers.documents < FEW_DOCUMENTS:
            lines.append(
                f"  warning: few validation documents ({numbers.documents}): noisy loss. Set data.validation_fraction "
                f"higher, or give data.eval_sets.{name or 'validation'}"
            )
        # Documents that the source describes with columns, such as names, are short by nature.
        if seq_len is not None and mean < seq_len / 8 and not self.column_names:
            lines.append(
                f"  warning: documents are short, {mean:,.0f} tokens on average in rows of {seq_len:,}, and attention "
                "never crosses from one to another. If they are lines or paragraphs of longer texts, set sample_by to "
                "document"
            )
        if numbers.special_names:
            remedy = (
                "characters like others; if they are meant as tokens, set tokenizer.special_tokens=honor, and if they "
                "stand between documents, the separator of the source"
            )
            is_honored = self.account["tokenizer"].get("special_tokens") == "honor"
            lines.append(
                f"  {numbers.special_names:,} names of special tokens in {numbers.documents_with_special_names:,} "
                f"documents are {'the tokens' if is_honored else remedy}"
            )
        if numbers.empty:
            lines.append(f"  skipped {numbers.empty:,}: documents that have no tokens of their own")
        return "\n".join([*lines, *(f"  {line}" for line in self.account["skipped"])])

    def __repr__(self) -> str:
        return f"Corpus({str(self.folder)!r}: {self.num_documents:,} documents, {self.num_tokens:,} tokens)"

    def _check(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(f"[{start}, {stop}) is not in a corpus of {self.num_tokens} tokens")

    def _shards_in(self, start: int, stop: int) -> list[tuple[Shard, int, int]]:
        """The shards that the range touches, at least one, each with the range in its own positions."""
        index = bisect_right(self._first, start) - 1
        found = []
        while True:
            shard = self.shards[index]
            end = shard.token_offset + len(shard.tokens)
            found.append(
                (shard, max(start, shard.token_offset) - shard.token_offset, min(stop, end) - shard.token_offset)
            )
            if stop <= end:
                return found
            index += 1


def account_of(
    split: str, settings: dict[str, Any], statistics: Statistics, shards: list[dict[str, Any]]
) -> dict[str, Any]:
    """What `corpus.json` would hold of some shards: what a `Corpus` needs of it."""
    return {
        "format": settings.get("format", FORMAT),
        "split": split,
        "tokenizer": {"fingerprint": settings["tokenizer"]},
        "settings": settings,
        "statistics": asdict(statistics),
        "skipped": [],
        "shards": shards,
    }


def open_corpus(folder: str | Path, tokenizer: Tokenizer | None = None) -> Corpus:
    """Opens a corpus.

    Args:
        folder: what `prepare_corpus` made, with `/train` or `/validation` at its end.
        tokenizer: if given, it must be the one that the corpus was made with.

    Raises:
        UserError: no corpus there (code `no_corpus`), an unfinished one (`unfinished_corpus`), a corrupt one
            (`corrupt_corpus`), or one of another tokenizer (`other_tokenizer`).
    """
    folder = Path(folder)
    file = folder / CORPUS_FILE
    try:
        account = _read_account(folder)
    except FileNotFoundError:
        raise _no_corpus(folder) from None
    except (OSError, ValueError) as error:
        raise _corrupt(folder, f"{CORPUS_FILE} cannot be read ({error})") from error
    try:
        if account["format"] not in FORMATS:
            raise UserError(
                f"{file} has the format {account['format']!r}, and this version of torchrecipes reads "
                f"{' and '.join(map(repr, FORMATS))}",
                hint="Build the corpus again, in another folder.",
                code="corpus_format",
            )
        made_with = account["tokenizer"]["fingerprint"]
        if tokenizer is not None and made_with != tokenizer.fingerprint:
            raise UserError(
                f"the corpus in {folder} was made with the tokenizer {made_with}, but the tokenizer of this run is "
                f"{tokenizer.fingerprint}",
                key="data.corpus_dir",
                hint="Use the tokenizer of the corpus, or another folder.",
                code="other_tokenizer",
            )
        return Corpus(folder, account, _open_shards(folder, account))
    except (KeyError, TypeError, AttributeError) as error:
        raise _corrupt(folder, f"{CORPUS_FILE} lacks {error}") from error


def prepare_corpus(
    folder: str | Path,
    source: Source,
    tokenizer: Tokenizer,
    validation_fraction: float = 0.005,
    validation_source: Source | None = None,
    tokenizer_threads: int | None = None,
    shard_tokens: int = 64 * 2**20,
    seq_len: int | None = None,
    eval_samples: int | None = None,
    name: str | None = None,
    split: "NameSplit | None" = None,
) -> tuple[Corpus, Corpus | None]:
    """Tokenizes a source into the corpora `folder/train` and `folder/validation`, or opens them if that is done.

    The documents keep the source's order, and the files are the same, byte for byte, whatever the number of threads and
    however often the work was interrupted. Shards are held in memory until they are written: one per split.

    Args:
        folder: made if missing.
        source: the documents.
        tokenizer: makes the tokens.
        validation_fraction: fraction of the documents held out for validation, chosen by a hash of the text, so that
            equal texts are always on the same side; at least one document. Of domain names also one at least of every
            public suffix with 100 names or more. 0: no validation corpus.
        validation_source: documents for validation; then all of `source` is for training.
        tokenizer_threads: threads that tokenize, beside one that reads. 0: that one does both; None: one per core.
        shard_tokens: maximum tokens of a shard (a longer document has a shard of its own). 64Mi are 128 MiB of uint16.
        seq_len: tokens per row, for the warning of `Corpus.summary`.
        eval_samples: the first documents, so many, are for validation, instead of a fraction.
        name: of the part of a mixture, or of the evaluation set, for messages; None: the only text.
        split: which domain names are for validation, where they are added to others; None: it is chosen here.

    Returns:
        Train and validation; None for the latter if there is none.

    Raises:
        UserError: no documents; a single one, and a fraction of it is to be held out (code `one_document`); the folder
            holds a corpus of other settings, sources or tokenizer (`other_corpus`), or cannot be written
            (`not_writable`).
    """
    folder = Path(folder)
    settings = corpus_settings(source, tokenizer, validation_fraction, validation_source, eval_samples, shard_tokens)
    made = build_corpus(folder, source, tokenizer, settings, validation_source, tokenizer_threads, split=split)
    corpora = [
        open_corpus(folder / split, tokenizer)
        for split in ("train", "validation")
        if split == "train" or validation_source is not None or eval_samples or validation_fraction
    ]
    if made:
        for corpus in corpora:
            corpus.verify()
            print(corpus.summary(seq_len, name), flush=True)
    return corpora[0], corpora[1] if len(corpora) > 1 else None


def _read_account(folder: Path) -> dict[str, Any]:
    # An addition is there as soon as the pending file is (append.py).
    try:
        pending = json.loads((folder.parent / PENDING_FILE).read_text("utf-8"))
    except FileNotFoundError:
        pending = {}
    return pending.get(folder.name) or json.loads((folder / CORPUS_FILE).read_text("utf-8"))


def _reopen(folder: Path, fingerprint: str) -> Corpus:
    return open_corpus(folder).before_additions(fingerprint)


def _fingerprint(account: dict[str, Any], num_shards: int) -> str:
    """The fingerprint of the first shards of a corpus."""
    arrays = [shard["arrays_xxh3"] for shard in account["shards"][:num_shards]]
    return xxhash.xxh3_128_hexdigest(
        " ".join([account["format"], account["tokenizer"]["fingerprint"], *arrays]).encode()
    )


def _open_shards(folder: Path, account: dict[str, Any]) -> list[Shard]:
    shards: list[Shard] = []
    tokens = documents = 0
    for stated in account["shards"]:
        path = folder / stated["file"]
        try:
            if path.stat().st_size != stated["size"]:
                raise ValueError(f"{path.stat().st_size:,} bytes, not {stated['size']:,}")
            shard, _ = open_shard(path, tokens, documents)
            if (len(shard.tokens), len(shard.document_offsets)) != (stated["tokens"], stated["documents"] + 1):
                raise ValueError(f"not the number of tokens or documents in {CORPUS_FILE}")
        except FileNotFoundError:
            raise _corrupt(folder, f"{path.name} is missing") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _corrupt(folder, f"{path.name}: {error}") from error
        shards.append(shard)
        tokens += len(shard.tokens)
        documents += len(shard.document_offsets) - 1
    if not shards or (tokens, documents) != (account["statistics"]["tokens"], account["statistics"]["documents"]):
        raise _corrupt(folder, f"{CORPUS_FILE}: its totals are not those of its shards")
    return shards


def _corrupt(folder: Path, what: str) -> UserError:
    hint = f"Delete {folder} and build the corpus again."
    return UserError(f"the corpus in {folder} is corrupt: {what}", hint=hint, code="corrupt_corpus")


def _no_corpus(folder: Path) -> UserError:
    problem, hint, code = (
        f"{folder} holds no {CORPUS_FILE}",
        "Make a corpus with tune-style data tokenize.",
        "no_corpus",
    )
    if not folder.is_dir():
        problem = f"there is no folder {folder}"
    elif (folder / "train" / CORPUS_FILE).exists():
        hint = f"Open {folder / 'train'} or {folder / 'validation'}."
    elif any(folder.glob("shard-*.safetensors")):
        hint, code = "The corpus is not finished: run what builds it again to continue.", "unfinished_corpus"
    return UserError(problem, hint=hint, code=code)
