"""`ExampleCorpus`: tokenized examples on disk, read by memory map.

1. `prepare_examples` tokenizes a source into the corpora `train` and `validation` (build.py does the work). Called
   again with the same arguments it opens them; after an interruption it continues after the last complete shard.
2. A corpus is a folder of shards (shards.py) and a `corpus.json`, which is written last.

Opening takes milliseconds: sizes are always checked, checksums by `verify()`.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from torchrecipes.data.corpus.shard_writer import CORPUS_FILE
from torchrecipes.data.examples.block import ExampleBlock
from torchrecipes.data.examples.build import PROGRESS_FILE, Totals, build_examples, example_settings
from torchrecipes.data.examples.example import ExampleSource
from torchrecipes.data.examples.labels import check_task, label_name
from torchrecipes.data.examples.shards import FORMAT, ExampleShard, file_checksum, open_arrays, read_examples
from torchrecipes.data.tokenizers.tokenizer import Tokenizer
from torchrecipes.errors import UserError


class ExampleCorpus:
    """Tokenized examples, opened by `open_examples`. Threads may share it; pickled, it is its path.

    Attributes:
        folder: the folder.
        kind: `pairs`, `scored_pairs`, `labeled` or `texts`.
        columns: names of the texts of an example.
        num_examples, num_texts, num_tokens: totals, special tokens included.
        num_truncated: texts that were longer than `max_length`.
        shortest_text, longest_text: in tokens.
        num_duplicates: examples whose texts an earlier one has already.
        num_conflicts: those of them that have another label.
        texts_per_example: the most texts that an example has.
        scores_per_example: the most scores; 0 where there are none.
        task: of the labels: `single_label`, `multi_label` or `regression`; None where there are none.
        label_names: names of the classes; None where there are none.
        label_counts: examples of every class.
        max_length: tokens of a text at most.
        prompts, prompt_lengths: of every column; the latter as `ExampleEncoder` counts it.
        tokenizer_fingerprint: fingerprint of the tokenizer that made it.
        fingerprint: xxh3-128 (hex) of the tokenizer's fingerprint and of all shards.
    """

    def __init__(self, folder: Path, account: dict[str, Any], shards: list[ExampleShard]):
        self.folder, self.account, self.shards = folder, account, shards
        totals = Totals(**account["totals"])
        self.kind: str = account["kind"]
        self.columns: tuple[str, ...] = tuple(account["columns"])
        self.num_examples, self.num_texts, self.num_tokens = totals.examples, totals.texts, totals.tokens
        self.num_truncated = totals.truncated
        self.num_duplicates: int = account["statistics"]["duplicates"]
        self.num_conflicts: int = account["statistics"]["conflicts"]
        self.shortest_text, self.longest_text = totals.shortest, totals.longest
        self.texts_per_example, self.scores_per_example = totals.texts_per_example, totals.scores_per_example
        self.task: str | None = account["task"]
        self.label_names: list[str] | None = account["label_names"]
        self.label_counts: list[int] = totals.label_counts
        self.max_length: int = account["settings"]["max_length"]
        self.prompts: tuple[str, ...] = tuple(account["prompts"])
        self.prompt_lengths: tuple[int, ...] = tuple(account["prompt_lengths"])
        self.tokenizer_fingerprint: str = account["tokenizer"]["fingerprint"]
        described = [self.tokenizer_fingerprint, *(shard["xxh3"] for shard in account["shards"])]
        self.fingerprint = xxhash.xxh3_128_hexdigest("".join(described).encode())

    def __reduce__(self) -> tuple:
        return _reopen, (self.folder, self.fingerprint)

    @cached_property
    def example_lengths(self) -> np.ndarray:
        """Tokens of all texts of every example, int64 `[num_examples]`."""
        return np.concatenate([shard.example_lengths() for shard in self.shards])

    @cached_property
    def labels(self) -> np.ndarray | None:
        """The labels of all examples."""
        parts = [shard.labels for shard in self.shards]
        return None if parts[0] is None else np.concatenate(parts)

    def read(self, numbers: Sequence[int] | np.ndarray) -> ExampleBlock:
        """Reads examples, given by their numbers from 0, in the order given.

        Args:
            numbers: int `[n]`.
        """
        numbers = np.asarray(numbers, np.int64)
        if len(numbers) and not (numbers.min() >= 0 and numbers.max() < self.num_examples):
            raise ValueError(f"examples are numbered from 0 to {self.num_examples - 1}")
        width = (self.texts_per_example, self.scores_per_example)
        return read_examples(self.shards, numbers, *width, self.prompt_lengths)

    def verify(self) -> None:
        """Reads all shards and compares checksums.

        Raises:
            UserError: shards are corrupt (code `corrupt_corpus`); names each.
        """
        stated = zip(self.shards, self.account["shards"], strict=True)
        corrupt = [shard.path.name for shard, one in stated if file_checksum(shard.path) != one["xxh3"]]
        if corrupt:
            raise _corrupt(self.folder, f"{', '.join(corrupt)}: wrong checksum")

    def summary(self, name: str | None = None) -> str:
        """Describes the content in a few lines, with warnings about what makes training poor.

        Args:
            name: of the data set; None: the only one.
        """
        split = self.account["split"]
        title = split if name is None else name if split == "train" else f"{name}, {split}"
        what = {"pairs": "pairs", "scored_pairs": "scored pairs", "labeled": "labeled texts", "texts": "texts"}
        texts = "" if self.num_texts == self.num_examples else f", {self.num_texts:,} texts"
        lines = [f"{title}: {self.num_examples:,} {what[self.kind]}{texts}, {self.num_tokens:,} tokens"]
        for column, (mean, median, most, longest) in self.account["statistics"]["lengths"].items():
            lines.append(
                f"  {column}: {mean:,.1f} tokens, half up to {median:,}, 90% up to {most:,}, longest {longest:,}"
            )
        if self.num_truncated:
            share = self.num_truncated / self.num_texts
            lines.append(f"  {self.num_truncated:,} texts ({share:.1%}) were cut to {self.max_length:,} tokens")
        if self.num_duplicates:
            lines.append(f"  duplicates: {self.num_duplicates:,} examples whose texts an earlier one has")
        if self.num_conflicts:
            lines.append(f"  warning: {self.num_conflicts:,} of them have another label")
        if self.label_names:
            shown = [f"{n} {c:,}" for n, c in zip(self.label_names[:20], self.label_counts[:20], strict=True)]
            more = len(self.label_names) - len(shown)
            lines.append(f"  labels: {', '.join(shown)}" + (f" and {more:,} more" if more else ""))
            absent = [n for n, c in zip(self.label_names, self.label_counts, strict=True) if not c]
            if absent:
                lines.append(f"  warning: no example has the label {', '.join(absent[:10])}")
            single = [n for n, c in zip(self.label_names, self.label_counts, strict=True) if c == 1]
            if single and split == "train":
                lines.append(f"  warning: one example only has the label {', '.join(single[:10])}: misspelt?")
        return "\n".join([*lines, *(f"  {line}" for line in self.account["skipped"])])

    def __repr__(self) -> str:
        return f"ExampleCorpus({str(self.folder)!r}: {self.num_examples:,} {self.kind}, {self.num_tokens:,} tokens)"


def prepare_examples(
    folder: str | Path,
    source: ExampleSource,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    prompts: dict[str, str] | None = None,
    validation_fraction: float = 0.0,
    split_by: str | None = None,
    task: str = "single_label",
    label_names: Sequence[str] | None = None,
    tokenizer_threads: int | None = None,
    shard_tokens: int = 16 << 20,
) -> tuple[ExampleCorpus, ExampleCorpus | None]:
    """Tokenizes a source into the corpora `folder/train` and `folder/validation`, or opens them if that is done.

    Examples keep the source's order, and the files are the same whatever the number of threads and however often the
    work was interrupted. A source with labels, or one that is split, is read twice: for its labels and the split first.

    Args:
        folder: made if missing.
        source: the examples.
        tokenizer: makes the tokens.
        max_length: tokens of a text at most, special ones included; longer texts are cut at their end and counted.
        prompts: what is written before the texts, see `ExampleEncoder`.
        validation_fraction: share of the examples held out for validation, chosen by a hash of their texts: exact for
            every label, and at least one example of each label that has two. 0: no validation corpus.
        split_by: the text whose hash decides, `query` or `positive` of pairs: examples that share it are on the same
            side. None: all texts of the example.
        task: what labels are: `single_label`, `multi_label` or `regression`.
        label_names: the classes in their order; for validation data those of the training data. None: those of the
            source, or those that occur, sorted (as numbers where all are integers).
        tokenizer_threads: threads that tokenize, beside one that reads. 0: that one does both; None: one per core.
        shard_tokens: tokens of a shard, about; they are in memory until it is written.

    Returns:
        Train and validation; None for the latter if there is none.

    Raises:
        UserError: no examples (code `no_examples`) or none that could be held out (`one_example`); an unknown label
            (`unknown_label`), a number that is none (`bad_label`), one class only (`one_class`), labels of another task
            (`wrong_task`) or too many (`many_classes`); the folder holds a corpus of other settings (`other_corpus`),
            or cannot be written (`not_writable`).
    """
    folder = Path(folder)
    names = None if label_names is None else [label_name(name) for name in label_names]
    if source.has_labels:
        check_task(task, names)
    settings = example_settings(
        source, tokenizer, max_length, prompts, validation_fraction, split_by, task, names, shard_tokens
    )
    build_examples(folder, source, tokenizer, settings, tokenizer_threads)
    train = open_examples(folder / "train", tokenizer)
    if not validation_fraction:
        return train, None
    return train, open_examples(folder / "validation", tokenizer)


def open_examples(folder: str | Path, tokenizer: Tokenizer | None = None) -> ExampleCorpus:
    """Opens an example corpus.

    Args:
        folder: what `prepare_examples` made, with `/train` or `/validation` at its end.
        tokenizer: if given, it must be the one that the corpus was made with.

    Raises:
        UserError: no corpus there (code `no_corpus`), an unfinished one (`unfinished_corpus`), a corrupt one
            (`corrupt_corpus`), one of another format (`corpus_format`) or another tokenizer (`other_tokenizer`).
    """
    folder = Path(folder)
    file = folder / CORPUS_FILE
    try:
        account = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise _no_corpus(folder) from None
    except (OSError, ValueError) as error:
        raise _corrupt(folder, f"{CORPUS_FILE} cannot be read ({error})") from error
    try:
        if account["format"] != FORMAT:
            raise UserError(
                f"{file} has the format {account['format']!r}; a corpus of examples has {FORMAT!r}",
                hint="Make one with tune-style data pairs.",
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
        return ExampleCorpus(folder, account, _open_shards(folder, account))
    except (KeyError, TypeError, AttributeError) as error:
        raise _corrupt(folder, f"{CORPUS_FILE} lacks {error}") from error


def holds_examples(folder: str | Path) -> bool:
    """Whether a folder holds a corpus of examples, not of text."""
    try:
        return str(json.loads((Path(folder) / CORPUS_FILE).read_text("utf-8"))["format"]).startswith(FORMAT[:-1])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _open_shards(folder: Path, account: dict[str, Any]) -> list[ExampleShard]:
    shards: list[ExampleShard] = []
    first = 0
    for stated in account["shards"]:
        path = folder / stated["file"]
        try:
            if path.stat().st_size != stated["size"]:
                raise ValueError(f"it has {path.stat().st_size:,} bytes, not {stated['size']:,}")
            shard = open_arrays(path, first)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _corrupt(folder, f"{path.name}: {error}") from error
        shards.append(shard)
        first += shard.num_examples
    if not shards or first != account["totals"]["examples"]:
        raise _corrupt(folder, f"{CORPUS_FILE}: its totals are not those of its shards")
    return shards


def _reopen(folder: Path, fingerprint: str) -> ExampleCorpus:
    corpus = open_examples(folder)
    if corpus.fingerprint != fingerprint:
        raise _corrupt(folder, "it has changed since it was opened")
    return corpus


def _corrupt(folder: Path, what: str) -> UserError:
    hint = f"Delete {folder} and build the corpus again."
    return UserError(f"the corpus in {folder} is corrupt: {what}", hint=hint, code="corrupt_corpus")


def _no_corpus(folder: Path) -> UserError:
    problem, hint, code = f"{folder} holds no {CORPUS_FILE}", "Make a corpus with tune-style data pairs.", "no_corpus"
    if not folder.is_dir():
        problem = f"there is no folder {folder}"
    elif (folder / "train" / CORPUS_FILE).exists():
        hint = f"Open {folder / 'train'} or {folder / 'validation'}."
    elif (folder.parent / PROGRESS_FILE).exists():
        hint, code = "The corpus is not finished: run what builds it again to continue.", "unfinished_corpus"
    return UserError(problem, hint=hint, code=code)
