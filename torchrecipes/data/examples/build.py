"""Builds an example corpus: examples in, shards out.

1. `plan.py` reads the source for its labels and the split, where these need it.
2. This thread reads examples in batches, other threads tokenize them; results are taken in order.
3. When enough tokens are there, the shards of all splits are written, and then `progress.json`, which lists them and
   says how far the source had been read: a call that was interrupted continues there.
4. `corpus.json` is written last, that of `train` after that of `validation`.

Batches end at the same examples wherever reading begins, and shards at ends of batches, so the files are the same
however the work was done.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from torchrecipes.atomic_write import write_atomically
from torchrecipes.data.corpus.build import SETTINGS_FILE, in_order, locked, num_threads
from torchrecipes.data.corpus.shard_writer import CORPUS_FILE, to_json, writing
from torchrecipes.data.corpus.shards import shard_name
from torchrecipes.data.examples.encode import EncodedExamples, ExampleEncoder
from torchrecipes.data.examples.example import Example, ExampleSource
from torchrecipes.data.examples.labels import Labels
from torchrecipes.data.examples.plan import Plan, encode_label, make_plan
from torchrecipes.data.examples.shards import FORMAT, offsets, open_arrays, write_arrays
from torchrecipes.data.examples.statistics import statistics
from torchrecipes.data.progress import Progress
from torchrecipes.data.sources.records import EXAMPLES_PER_REASON, BadRecord, ReadStats
from torchrecipes.data.tokenizers.tokenizer import Tokenizer, one_thread
from torchrecipes.errors import UserError

PROGRESS_FILE = "progress.json"
BATCH_CHARACTERS = 1 << 17  # of text that one thread tokenizes at a time
SPLITS = ("train", "validation")
NO_TOKENS = "a text without tokens of its own"


@dataclass
class Totals:
    """Counts of a split: examples, texts, tokens, texts that were cut, texts' lengths in tokens, and labels."""

    examples: int = 0
    texts: int = 0
    tokens: int = 0
    truncated: int = 0
    shortest: int = 0
    longest: int = 0
    texts_per_example: int = 0
    scores_per_example: int = 0
    with_negatives: int = 0
    label_counts: list[int] = field(default_factory=list)


@dataclass
class _Batch:
    examples: list[Example]
    held_out: list[bool]
    labels: list[Any]
    num_bytes: int
    position: dict[str, Any] | None  # after it
    report: dict[str, Any]  # of the source, up to there


def example_settings(
    source: ExampleSource,
    tokenizer: Tokenizer,
    max_length: int,
    prompts: dict[str, str] | None = None,
    validation_fraction: float = 0.0,
    split_by: str | None = None,
    task: str = "single_label",
    label_names: list[str] | None = None,
    shard_tokens: int = 16 << 20,
) -> dict[str, Any]:
    """What the files of an example corpus depend on: `prepare.json`. Arguments: see `prepare_examples`."""
    if not 0 <= validation_fraction < 1:
        hint = "Set a fraction of the examples, from 0 to below 1."
        problem = f"{validation_fraction} is out of range"
        raise UserError(problem, key="data.validation_fraction", hint=hint, code="invalid_value")
    return {
        "format": FORMAT,
        "source": source.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "max_length": max_length,
        "prompts": dict(sorted((prompts or {}).items())),
        "validation": {"fraction": validation_fraction, "split_by": split_by},
        "task": task if source.has_labels else None,
        "label_names": None if label_names is None else [str(name) for name in label_names],
        "shard_tokens": shard_tokens,
    }


def build_examples(
    folder: Path, source: ExampleSource, tokenizer: Tokenizer, settings: dict[str, Any], threads: int | None
) -> bool:
    """Builds what is missing of the corpora `folder/train` and `folder/validation`; returns whether anything was."""
    fraction = settings["validation"]["fraction"]
    splits = SPLITS if fraction else SPLITS[:1]
    encoder = ExampleEncoder(tokenizer, source.kind, source.columns, settings["max_length"], settings["prompts"])
    threads = num_threads(threads)
    if _same_settings(folder, settings) and (folder / "train" / CORPUS_FILE).exists():
        return False
    with locked(folder):
        if _same_settings(folder, settings) and (folder / "train" / CORPUS_FILE).exists():
            return False  # another process built it while this one waited
        plan = make_plan(
            source, settings["task"] or "", settings["label_names"], fraction, settings["validation"]["split_by"]
        )
        writer = _Writer(folder, splits, encoder, plan, settings)
        try:
            _tokenize_source(source, encoder, plan, writer, threads)
        except KeyboardInterrupt:
            saved = sum(map(len, writer.shards.values()))
            kept = f"{saved} shards are kept in {folder}; run the same command to continue after them."
            again = "Nothing was complete yet; run the same command to start again."
            print(f"\nInterrupted while tokenizing. {kept if saved else again}", file=sys.stderr, flush=True)
            raise
        writer.finish(source, tokenizer)
    return True


class _Writer:
    """Collects tokens and writes shards, after those that an interrupted call left."""

    def __init__(
        self, folder: Path, splits: tuple[str, ...], encoder: ExampleEncoder, plan: Plan, settings: dict[str, Any]
    ):
        self.folder, self.splits, self.encoder, self.plan, self.settings = folder, splits, encoder, plan, settings
        self.shards: dict[str, list[dict[str, Any]]] = {split: [] for split in splits}
        self.totals = {split: Totals() for split in splits}
        self.pending: dict[str, list[tuple[EncodedExamples, list[tuple[float, ...]], list[Any]]]] = {}
        self.pending_tokens = 0
        self.position: dict[str, Any] | None = None
        self.skipped = ReadStats()
        with writing(folder):
            for split in splits:
                (folder / split).mkdir(parents=True, exist_ok=True)
            self._continue()
            write_atomically(folder / SETTINGS_FILE, [to_json(settings)])

    def _continue(self) -> None:
        """Takes over the shards of an interrupted call, and removes all other files of earlier ones."""
        try:
            saved = json.loads((self.folder / PROGRESS_FILE).read_text("utf-8"))
            if saved["settings"] == self.settings:
                self.shards, self.position = saved["shards"], saved["position"]
                self.totals = {split: Totals(**totals) for split, totals in saved["totals"].items()}
                self.skipped = ReadStats(**saved["report"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        for split in SPLITS:
            kept = {shard["file"] for shard in self.shards.get(split, [])}
            for path in (self.folder / split).glob("*"):
                if path.is_file() and path.name not in kept:
                    path.unlink()

    def add(self, batch: _Batch, encoded: EncodedExamples) -> None:
        """Adds a batch; writes shards when there are tokens enough."""
        keep, held_out = encoded.kept, np.array(batch.held_out, bool)
        for example, is_kept in zip(batch.examples, keep, strict=True):
            if not is_kept:
                self.skipped.add(BadRecord(example.source, NO_TOKENS))
        kept = [i for i in range(len(batch.examples)) if keep[i]]
        values, labels = [batch.examples[i].values for i in kept], [batch.labels[i] for i in kept]
        out = held_out[keep]
        for split, chosen in zip(self.splits, (~out, out), strict=False):
            if chosen.any():
                part = encoded if chosen.all() else _select(encoded, chosen)
                own = np.flatnonzero(chosen)
                self.pending.setdefault(split, []).append((part, [values[i] for i in own], [labels[i] for i in own]))
                self.pending_tokens += len(part.tokens)
        if self.pending_tokens >= self.settings["shard_tokens"]:
            self._commit(batch)

    def _commit(self, batch: _Batch | None) -> None:
        for split, parts in self.pending.items():
            arrays = join_arrays(parts, self.plan.labels)
            self._count(self.totals[split], parts, arrays)
            path = self.folder / split / shard_name(len(self.shards[split]))
            with writing(self.folder):
                shard = write_arrays(path, arrays)
            self.shards[split].append({**shard, "examples": len(arrays["example_offsets"]) - 1})
        self.pending, self.pending_tokens = {}, 0
        if batch is not None and batch.position is not None:
            report = _joined_report(self.skipped, batch.report)
            state = {
                "settings": self.settings, "shards": self.shards, "position": batch.position, "report": report,
                "totals": {split: asdict(totals) for split, totals in self.totals.items()},
            }  # fmt: skip
            with writing(self.folder):
                write_atomically(self.folder / PROGRESS_FILE, [to_json(state)])

    def _count(self, totals: Totals, parts: list, arrays: dict[str, np.ndarray]) -> None:
        lengths = np.diff(arrays["text_offsets"])
        counts = np.diff(arrays["example_offsets"])
        totals.examples += len(counts)
        totals.texts += len(lengths)
        totals.tokens += int(lengths.sum())
        totals.truncated += sum(int(encoded.truncated.sum()) for encoded, _, _ in parts)
        totals.shortest = min(totals.shortest or int(lengths.min()), int(lengths.min()))
        totals.longest = max(totals.longest, int(lengths.max()))
        totals.texts_per_example = max(totals.texts_per_example, int(counts.max()))
        totals.with_negatives += int((counts > 2).sum())
        if "values" in arrays:
            totals.scores_per_example = max(totals.scores_per_example, arrays["values"].shape[1])
        if self.plan.labels is not None and self.plan.labels.task != "regression":
            labels, number = arrays["labels"], len(self.plan.labels.names)
            own = labels.sum(0).astype(int) if labels.ndim == 2 else np.bincount(labels, minlength=number)
            totals.label_counts = [a + int(b) for a, b in zip(totals.label_counts or [0] * number, own, strict=True)]

    def finish(self, source: ExampleSource, tokenizer: Tokenizer) -> None:
        """Writes the last shards and every `corpus.json`.

        Raises:
            UserError: there are no examples (code `no_examples`).
        """
        report = ReadStats(**_joined_report(self.skipped, asdict(source.report)))
        if self.pending:
            self._commit(None)
        if not self.totals["train"].examples:
            skipped = report.lines()[1:] or ["it is empty, or holds blank lines only"]
            raise UserError("\n  ".join([f"no examples in {source.name}", *skipped]), code="no_examples")
        if source.kind == "pairs" and len(source.columns) > 2 and not self.totals["train"].with_negatives:
            problem, hint = "no example has a negative", "Check the name of the column, or leave negatives out."
            raise UserError(problem, key="negatives", hint=hint, code="no_negatives")
        labels = self.plan.labels
        # Two sentences in one text have one length.
        names = [" and ".join(source.columns)] if self.encoder.is_pair else source.columns
        for split in reversed(self.splits):
            shards = [open_arrays(self.folder / split / shard["file"], 0) for shard in self.shards[split]]
            account = {
                "format": FORMAT,
                "split": split,
                "kind": source.kind,
                "columns": list(source.columns),
                "source": source.name,
                "tokenizer": {
                    "fingerprint": tokenizer.fingerprint,
                    "vocab_size": tokenizer.vocab_size,
                    "special_tokens": tokenizer.special_tokens,
                },
                "settings": self.settings,
                "prompts": list(self.encoder.prompts),
                "prompt_lengths": list(self.encoder.prompt_lengths),
                "task": None if labels is None else labels.task,
                "label_names": None if labels is None else labels.names,
                "totals": asdict(self.totals[split]),
                "statistics": statistics(shards, names, self.settings["max_length"]),
                "skipped": report.lines()[1:] if split == "train" else [],
                "num_skipped": sum(report.skipped.values()) if split == "train" else 0,
                "shards": self.shards[split],
            }
            with writing(self.folder):
                write_atomically(self.folder / split / CORPUS_FILE, [to_json(account)])
        (self.folder / PROGRESS_FILE).unlink(missing_ok=True)


def _tokenize_source(source: ExampleSource, encoder: ExampleEncoder, plan: Plan, writer: _Writer, threads: int) -> None:
    progress = Progress("tokenizing", source.num_bytes, "examples")
    if complete := sum(map(len, writer.shards.values())):
        message = f"{complete} shards are complete from an earlier call: continuing after them"
        print(message, file=sys.stderr, flush=True)
    try:
        batches = _batches(source, plan, writer.position)
        results = in_order(lambda batch: encoder.encode(batch.examples), batches, threads)
        with one_thread(), closing(results):
            for batch, encoded in results:
                writer.add(batch, encoded)
                progress.add(len(batch.examples), batch.num_bytes, len(encoded.tokens))
    finally:
        progress.close()


def _batches(source: ExampleSource, plan: Plan, position: dict[str, Any] | None) -> Iterator[_Batch]:
    def batch() -> _Batch:
        return _Batch(examples, held_out, labels, characters, source.position(), _copy(source.report))

    examples, held_out, labels, characters = [], [], [], 0
    for example in source.read(position):
        label = None
        if plan.labels is not None:
            label = encode_label(plan, example)
            if isinstance(label, BadRecord):
                source.report.add(label)
                continue
        examples.append(example)
        held_out.append(plan.is_held_out(example))
        labels.append(label)
        characters += sum(map(len, example.texts))
        if characters >= BATCH_CHARACTERS:
            yield batch()
            examples, held_out, labels, characters = [], [], [], 0
    if examples:
        yield batch()


def _copy(report: ReadStats) -> dict[str, Any]:
    return {"skipped": dict(report.skipped), "examples": {key: list(some) for key, some in report.examples.items()}}


def _joined_report(before: ReadStats, since: dict[str, Any]) -> dict[str, Any]:
    """What was skipped in an earlier call, and what the source has skipped since."""
    skipped = dict(before.skipped)
    examples = {reason: list(some) for reason, some in before.examples.items()}
    for reason, count in since["skipped"].items():
        skipped[reason] = skipped.get(reason, 0) + count
        own = examples.setdefault(reason, [])
        own += since["examples"][reason][: EXAMPLES_PER_REASON - len(own)]
    return {"skipped": skipped, "examples": examples}


def _select(encoded: EncodedExamples, chosen: np.ndarray) -> EncodedExamples:
    """The chosen examples of a batch."""
    texts = np.repeat(chosen, encoded.example_texts)
    tokens = np.repeat(texts, encoded.text_lengths)
    per_text = (encoded.text_lengths, encoded.second_starts, encoded.text_hashes)
    return EncodedExamples(
        encoded.tokens[tokens],
        *(array[texts] for array in per_text),
        encoded.example_texts[chosen],
        encoded.truncated[texts],
        encoded.kept,
    )


def join_arrays(parts: list, labels: Labels | None) -> dict[str, np.ndarray]:
    """The arrays of a shard.

    Args:
        parts: `(EncodedExamples, scores, labels)` of batches; the last two are lists of the examples that were kept.
        labels: what turned labels into numbers; None: there are none.
    """
    encoded = [part for part, _, _ in parts]
    values = [row for _, rows, _ in parts for row in rows]
    arrays = {
        "tokens": np.concatenate([part.tokens for part in encoded]),
        "text_offsets": offsets(np.concatenate([part.text_lengths for part in encoded])),
        "second_starts": np.concatenate([part.second_starts for part in encoded]),
        "text_hashes": np.concatenate([part.text_hashes for part in encoded]),
        "example_offsets": offsets(np.concatenate([part.example_texts for part in encoded])),
    }
    if width := max(map(len, values)):
        arrays["values"] = np.full((len(values), width), np.nan, np.float32)
        for row, own in zip(arrays["values"], values, strict=True):
            row[: len(own)] = own
    if labels is not None:
        arrays["labels"] = np.array([label for _, _, own in parts for label in own], labels.dtype)
    return arrays


def _same_settings(folder: Path, settings: dict[str, Any]) -> bool:
    """Return whether the folder holds a complete corpus with these settings; False where it holds none.

    Raises:
        UserError: it holds one with other settings (code `other_corpus`).
    """
    if not (folder / "train" / CORPUS_FILE).exists():
        return False
    try:
        made_with = dict(json.loads((folder / SETTINGS_FILE).read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        hint = f"Delete {folder} to build the corpus again."
        problem = f"{folder / SETTINGS_FILE} cannot be read ({error})"
        raise UserError(problem, hint=hint, code="corrupt_corpus") from error
    differ = [key for key, value in settings.items() if made_with.get(key) != value]
    if not differ:
        return True
    lines = [f"{key}: {made_with.get(key)} saved, {settings[key]} current" for key in differ]
    if "source" in differ:
        lines.append("(a source changes with the content and order of its files, and with how they are read)")
    raise UserError(
        "\n  ".join([f"{folder} holds a corpus that was built from something else:", *lines]),
        key="data.corpus_dir",
        hint=f"Delete {folder} to tokenize the examples again, unless a run with checkpoints needs it; or give another "
        "folder, as in output_dir=OTHER.",
        code="other_corpus",
    )
