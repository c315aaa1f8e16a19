"""`load_examples`: the tokenizer and the examples of a fine-tuning run; corpora that are not there yet are built."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from torchrecipes.atomic_write import write_atomically
from torchrecipes.config import Component, build
from torchrecipes.config.components import resolve
from torchrecipes.config.metadata import Count, Fraction, MayChange
from torchrecipes.data.batching.dataset_batches import DatasetBatches
from torchrecipes.data.batching.example_rows import ExampleRows
from torchrecipes.data.batching.grouped_rows import GroupedRows
from torchrecipes.data.batching.loader import rows_per_rank
from torchrecipes.data.batching.streamed_examples import StreamedExampleRows
from torchrecipes.data.corpus.shard_writer import to_json
from torchrecipes.data.examples import ExampleCorpus, ExampleSource, StreamedExamples, open_examples, prepare_examples
from torchrecipes.data.tokenizers import Tokenizer
from torchrecipes.data.tokenizers.load import load_model_tokenizer
from torchrecipes.distributed.collectives import rank0_first, world_size
from torchrecipes.errors import UserError
from torchrecipes.model_folder import resolve_model_folder

VALIDATION, TEST = "validation", "test"  # evaluation sets
ONE_SOURCE = "train"
STREAM_FILE = "stream.json"


@dataclass
class ExampleData:
    """The config group `data` of a fine-tuning recipe."""

    source: Component | None = None  # pairs, scored_pairs, labeled_texts, raw_texts: what to train on
    sources: dict[str, Component] = field(default_factory=dict)  # several instead, by name: each step is of one of them
    weights: Literal["proportional", "round_robin"] | dict[str, float] = "proportional"  # how often each is chosen
    dataset_prompts: dict[str, dict[str, str]] = field(default_factory=dict)  # of one in sources, by kind of text
    validation: Component | None = None  # examples for `eval/validation`; None: a share of those to train on
    validation_fraction: Fraction = 0.0  # that share, chosen by a hash of the texts, the same of every label
    split_by: Literal["query", "positive"] | None = None  # pairs: which text's hash, so that both sides share none
    test: Component | None = None  # examples for `eval/test`, once, at the end
    per_label: Count = 0  # examples of the same label that come together, for losses that compare labels; 0: none do
    window: Count = 0  # examples that are tokenized at a time while the model trains; 0: all before that
    corpus_dir: MayChange[str | None] = None  # folder of tokenized examples, shared by runs; None: <output_dir>/corpus
    shuffle: bool = True  # False: examples in the order of the source
    num_workers: MayChange[Count] = 0  # loader processes; 0: in this process, which is fast enough for most models

    pads_rows = False  # texts are packed

    def check(self) -> list[UserError]:
        """Problems of the sources. Nothing is read."""
        if (self.source is None) == (not self.sources):
            hint = "Set data.source to one source, or data.sources to several by name."
            return [UserError("set exactly one of source and sources", key="source", hint=hint, code="no_source")]
        if isinstance(self.weights, dict) and self.weights.keys() != self.sources.keys():
            names = ", ".join(self.sources) or "there are none"
            return [UserError(f"needs a weight for every source: {names}", key="weights", code="unknown_name")]
        if self.sources and self.validation_fraction and self.validation is None:
            hint = "Give data.validation, or train without: data.validation_fraction=0."
            problem = "a share is held out of one source, and these are several"
            return [UserError(problem, key="validation_fraction", hint=hint, code="several_sources")]
        if unknown := self.dataset_prompts.keys() - self.sources.keys():
            return [UserError("there is no such source", key=f"dataset_prompts.{min(unknown)}", code="unknown_name")]
        if self.window:
            whole = ("sources", "validation_fraction", "split_by", "per_label")
            hint = "A stream is one source, read once: give data.validation, or set window=0."
            given = [key for key in whole if getattr(self, key)]
            return [UserError("it needs all examples at once", key=k, hint=hint, code="streamed") for k in given]
        return []

    def open(self, config: Any, corpus_dir: Path) -> tuple[Any, dict[str, ExampleRows]]:
        """Opens the examples that a run has prepared in `corpus_dir`: (those to train on, evaluation sets by name)."""
        return open_example_rows(config, corpus_dir)

    def computed_tokens(self, config: Any, rows: Any | None) -> float:
        """Tokens that a model computes per example; without rows, as if every text had `seq_len`."""
        return rows.tokens_per_row if rows else config.seq_len


@dataclass(frozen=True)
class ExampleSets:
    """What `load_examples` gives.

    Attributes:
        tokenizer: the model's.
        train: the examples to train on, for a `Loader`.
        eval_sets: `validation` and `test`, those of them that there are.
        label_names: of a classification, in the order of their numbers; () otherwise.
        label_counts: how many of the examples to train on have each of them.
        num_examples: how many these are.
        origins: a line for each source: its name, and how many examples it gave.
    """

    tokenizer: Tokenizer
    train: Any
    eval_sets: dict[str, ExampleRows]
    label_names: tuple[str, ...] = ()
    label_counts: tuple[int, ...] = ()
    num_examples: int = 0
    origins: tuple[str, ...] = ()

    def complete(self, config: Any) -> Any:
        """A copy of a recipe's config with `label_names`, `label_counts` and `num_examples` where it has none."""
        found = {"label_names": list(self.label_names) or None, "label_counts": list(self.label_counts) or None}
        found |= {"num_examples": self.num_examples}
        return replace(config, **{key: value for key, value in found.items() if getattr(config, key) is None})


def load_examples(config: Any, prompts: dict[str, str] | None = None, **labels: Any) -> ExampleSets:
    """Loads or trains the tokenizer, tokenizes the examples where that is not done, and opens them.

    On several ranks the first does the work and the others wait.

    Args:
        config: a recipe's, with the keys `data`, `tokenizer` (None: the one in `init_from`), `init_from`, `output_dir`,
            `seq_len` and `global_batch_size`.
        prompts: text before a text, by kind: `query`, `passage`. `data.dataset_prompts` replaces them for a dataset.
        labels: `task` and `label_names`, for examples with labels: see `prepare_examples`.

    Raises:
        UserError: the examples, the tokenizer or the folder is not usable; names what and why.
    """
    rows_per_rank(config.global_batch_size, world_size())  # refused now, not after hours of tokenizing
    data, corpus_dir = config.data, _corpus_dir(config)
    sources = {name: _build(f"sources.{name}" if data.sources else "source", x) for name, x in _sources(data).items()}
    nodes = {name: getattr(data, name) for name in (VALIDATION, TEST)}
    evaluated = {name: _build(name, node) for name, node in nodes.items() if node is not None}
    if labels:
        _check_labeled({f"sources.{name}" if data.sources else "source": x for name, x in sources.items()} | evaluated)
    with rank0_first("tokenizer and examples"):
        if config.tokenizer is None:
            tokenizer = load_model_tokenizer(resolve_model_folder(config.init_from))
        else:
            text = next(iter(sources.values())).as_documents()
            tokenizer = build(config.tokenizer, source=text, folder=corpus_dir / "tokenizer", causal=False)
        prepare = partial(prepare_examples, tokenizer=tokenizer, max_length=config.seq_len)
        if data.window:
            save_stream(corpus_dir, tokenizer, prompts=prompts, **labels)
            train = open_stream(config, corpus_dir).stream
        for name, source in () if data.window else sources.items():
            options = {"prompts": data.dataset_prompts.get(name, prompts), "split_by": data.split_by, **labels}
            fraction = 0.0 if data.validation else data.validation_fraction
            train, _ = prepare(_folder(corpus_dir, name), source, validation_fraction=fraction, **options)
            print(train.summary(name), flush=True)
        if labels:
            _check_same_names(corpus_dir, () if data.window else sources)
            labels |= {"label_names": train.label_names or None}
        for name, source in evaluated.items():
            corpus, _ = prepare(_eval_folder(corpus_dir, name), source, prompts=prompts, **labels)
            print(corpus.summary(name), flush=True)
    train, eval_sets = open_example_rows(config, corpus_dir, tokenizer)
    print(f"training examples: {train}", flush=True)
    if data.window:
        names, origins = tuple(train.stream.label_names or ()), tuple(source.name for source in sources.values())
        return ExampleSets(tokenizer, train, eval_sets, names, origins=origins)
    corpora = [open_examples(_folder(corpus_dir, name) / "train") for name in sources]
    # Without a task the labels of each dataset are its own.
    counts = tuple(map(sum, zip(*(corpus.label_counts for corpus in corpora), strict=True))) if labels else ()
    if labels:
        _check_classes(labels["task"], counts)
    for name, corpus in zip(sources, corpora, strict=True):
        _check_loss(f"sources.{name}" if data.sources else "source", corpus, getattr(config, "loss", None))
    sizes = [corpus.num_examples for corpus in corpora]
    if config.global_batch_size > min(sizes):
        few = f"global_batch_size={config.global_batch_size} is more than the {min(sizes):,} examples there are"
        print(f"warning: {few}: a step has some of them several times", flush=True)
    origins = tuple(f"{source.name}: {size:,} examples" for source, size in zip(sources.values(), sizes, strict=True))
    return ExampleSets(tokenizer, train, eval_sets, tuple(corpora[0].label_names or ()), counts, sum(sizes), origins)


def open_example_rows(
    config: Any, corpus_dir: Path, tokenizer: Tokenizer | None = None
) -> tuple[Any, dict[str, ExampleRows]]:
    """Opens the training examples and the evaluation sets that `load_examples` prepared in `corpus_dir`.

    Args:
        config: a recipe's, with the keys `data`, `seq_len` and `global_batch_size`.
        corpus_dir: folder of the corpora.
        tokenizer: if given, the corpora must have been made with it; it names the token of padding.

    Raises:
        UserError: a corpus is missing, unfinished or corrupt, or of another tokenizer.
    """
    data, pad_id = config.data, tokenizer.pad_id if tokenizer else 0
    rows_of = partial(ExampleRows, seq_len=config.seq_len, pad_id=pad_id)
    train_of = partial(GroupedRows, seq_len=config.seq_len, pad_id=pad_id, per_label=data.per_label)
    parts = {ONE_SOURCE: open_stream(config, corpus_dir)} if data.window else {}
    for name in () if data.window else _sources(data):
        corpus = open_examples(_folder(corpus_dir, name) / "train", tokenizer)
        parts[name] = train_of(corpus) if data.per_label else rows_of(corpus)
    train = DatasetBatches(parts, config.global_batch_size, data.weights) if data.sources else parts[ONE_SOURCE]
    eval_sets = {}
    for name in (VALIDATION, TEST):
        if getattr(data, name) is not None:
            eval_sets[name] = rows_of(open_examples(_eval_folder(corpus_dir, name) / "train", tokenizer))
        elif name == VALIDATION and data.validation_fraction and data.source:
            eval_sets[name] = rows_of(open_examples(_folder(corpus_dir, ONE_SOURCE) / VALIDATION, tokenizer))
    return train, eval_sets


def save_stream(corpus_dir: Path, tokenizer: Tokenizer, **settings: Any) -> None:
    """Keeps in `corpus_dir` what `open_stream` needs: the tokenizer, and `prompts`, `task` and `label_names`."""
    corpus_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(corpus_dir / "tokenizer")
    write_atomically(corpus_dir / STREAM_FILE, [to_json(settings)])


def open_stream(config: Any, corpus_dir: Path) -> StreamedExampleRows:
    """Opens the training examples of a config with `data.window` as a stream.

    Raises:
        UserError: `save_stream` has not been called there (code `no_corpus`); or what `StreamedExamples` raises.
    """
    try:
        settings = json.loads((corpus_dir / STREAM_FILE).read_text("utf-8"))
    except OSError:
        raise UserError(f"there is no {corpus_dir / STREAM_FILE}", hint="A run makes it.", code="no_corpus") from None
    tokenizer = load_model_tokenizer(corpus_dir / "tokenizer")
    options = {"max_length": config.seq_len, "window": config.data.window, "folder": corpus_dir / "windows"}
    stream = StreamedExamples(_build("source", config.data.source), tokenizer, **options, **settings)
    return StreamedExampleRows(stream, config.seq_len, tokenizer.pad_id)


def _sources(data: ExampleData) -> dict[str, Component]:
    return data.sources or {ONE_SOURCE: data.source}


def _folder(corpus_dir: Path, name: str) -> Path:
    return corpus_dir if name == ONE_SOURCE else corpus_dir / "sources" / name


def _eval_folder(corpus_dir: Path, name: str) -> Path:
    return corpus_dir / "eval_sets" / name


def _check_labeled(sources: dict[str, ExampleSource]) -> None:
    """Checks that all sources have labels, and as many texts in an example as the first."""
    number = len(next(iter(sources.values())).columns)
    for key, source in sources.items():
        if source.kind != "labeled":
            problem, hint = f"{source.name} has no labels", "Read it with torchrecipes.data.examples.labeled_texts."
            raise UserError(problem, key=f"data.{key}", hint=hint, code="no_labels")
        if len(source.columns) != number:
            problem = f"{source.name} has {len(source.columns)} texts in an example, and {number} are trained on"
            raise UserError(problem, key=f"data.{key}", hint="Set text_pair in all sources, or in none.", code="pairs")


def _check_same_names(corpus_dir: Path, sources: Iterable[str]) -> None:
    """Checks that a number is the same class in all sources."""
    names = {name: open_examples(_folder(corpus_dir, name) / "train").label_names for name in sources}
    if len(set(map(tuple, names.values()))) <= 1:
        return
    lines = [f"{name}: {', '.join(found[:20])}" for name, found in names.items()]
    raise UserError(
        "\n  ".join(["the sources have different labels:", *lines]),
        key="label_names",
        hint="List the labels of all sources in label_names.",
        code="different_labels",
    )


def _check_classes(task: str, counts: tuple[int, ...]) -> None:
    """Checks that there is something to tell apart; `label_names` may name classes that do not occur."""
    least = {"single_label": 2, "multi_label": 1}.get(task, 0)
    if sum(map(bool, counts)) < least:
        problem = "all examples have the same label" if least == 2 else "no example has a label"
        hint = "Give data with other labels, or check which column is the label."
        raise UserError(problem, key="data", hint=hint, code="one_class")


def _check_loss(key: str, corpus: ExampleCorpus, loss: Component | None) -> None:
    """Checks scores against what the loss makes of them: its class may have `ignores_scores` and `score_range`."""
    loss = loss and loss.args.get("loss", loss)  # of Matryoshka: the loss in it
    target = loss and resolve(loss.path)
    if corpus.kind == "scored_pairs" and getattr(target, "ignores_scores", False):
        raise UserError(
            f"{target.__name__} takes every pair as one that belongs together, whatever its score",
            key=f"data.{key}",
            hint="Use CoSENT or CosineRegression as loss, or read pairs that belong together with "
            "torchrecipes.data.examples.pairs.",
            code="ignored_scores",
        )
    limits = getattr(target, "score_range", None)
    values = [shard.values for shard in corpus.shards if shard.values is not None]
    if limits and values:
        low, high = min(map(np.nanmin, values)), max(map(np.nanmax, values))
        if low < limits[0] or high > limits[1]:
            raise UserError(
                f"scores are between {low:g} and {high:g}, and {target.__name__} takes {limits[0]} to {limits[1]}",
                key=f"data.{key}",
                hint="Name the ends of the scale in low and high of the source, such as low=0 high=5.",
                code="score_range",
            )


def _corpus_dir(config: Any) -> Path:
    return Path(config.data.corpus_dir or Path(config.output_dir) / "corpus")


def _build(key: str, node: Component) -> Any:
    try:
        return build(node)
    except UserError as error:
        raise error.under(f"data.{key}") from None
