"""`load_text`: the tokenizer and the rows of a run; corpora are built where they are not there yet."""

import json
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torchrecipes.atomic_write import write_atomically
from torchrecipes.config import Component, build, component
from torchrecipes.config.components import resolve
from torchrecipes.config.metadata import Count, Documents, Fraction, MayChange
from torchrecipes.config.metadata import Rows as NumRows
from torchrecipes.data.batching.appended import rows_of_corpus
from torchrecipes.data.batching.batch import Batch
from torchrecipes.data.batching.loader import evaluation_batches, rows_per_rank
from torchrecipes.data.batching.mixture import MixtureRows
from torchrecipes.data.batching.packing import PackedRows, Packing, make_rows
from torchrecipes.data.batching.rows import Rows
from torchrecipes.data.batching.streamed import BLOCK_ROWS, StreamedRows
from torchrecipes.data.corpus import Corpus, Stream, check_corpus_dir, open_corpus, open_stream, prepare_corpus
from torchrecipes.data.corpus.shard_writer import to_json
from torchrecipes.data.sources.beginning import beginning_of
from torchrecipes.data.sources.eval_split import split_for_evaluation
from torchrecipes.data.sources.mixed_sources import Mixture, mixture
from torchrecipes.data.sources.records import Source
from torchrecipes.data.token_files.source import TokenSource
from torchrecipes.data.tokenizers import Tokenizer
from torchrecipes.data.tokenizers.load import load_model_tokenizer
from torchrecipes.distributed.collectives import rank, rank0_first, world_size
from torchrecipes.errors import UserError
from torchrecipes.model_folder import resolve_model_folder

VALIDATION = "validation"  # the evaluation set that is held out of the source
EVAL_SETS = "eval_sets"  # their folder
TOKENIZER_CHARACTERS = 200_000_000  # of a stream: what a tokenizer is trained on before the stream starts
STREAMS_FILE = "streams.json"  # in the folder of corpora: the folder of the cache by part of the text


@dataclass
class TextData:
    """The config group `data` of a pretraining recipe."""

    source: Component = component("torchrecipes.data.sources.files")  # where the text comes from
    mode: Literal["prepare", "streaming"] = "prepare"  # streaming: tokenize while training, ahead of it
    validation_fraction: Fraction = 0.005  # share of the documents held out, chosen by a hash of their text
    eval_sets: dict[str, Component] = field(default_factory=dict)  # sources by name; `validation` replaces the fraction
    eval_split: str | None = None  # a split of the source instead of a fraction; auto: validation, eval, test or dev
    eval_samples: Documents | None = None  # the first documents instead of a fraction; of eval_split, where it is set
    corpus_dir: MayChange[str | None] = None  # folder of token shards, shared by runs; None: <output_dir>/corpus
    cache_dir: MayChange[str | None] = None  # folder of streams, shared by runs; None: ~/.cache/torchrecipes
    block_rows: NumRows = BLOCK_ROWS  # of a stream: rows are shuffled within blocks of so many
    tokenizer_threads: MayChange[Count | None] = None  # threads that tokenize; None: one per core
    packing: Packing = "concat"  # concat: full rows; best_fit, next_fit: no document is cut that fits; none: one a row
    shuffle: bool = True  # False: rows in the order of the corpus
    num_workers: MayChange[Count] = 0  # loader processes; 0: in this process, which is fast enough for most models

    def check(self) -> list[UserError]:
        """Problems of a mixture: weights and names that are those of no source. Nothing is read."""
        if is_mixture(self.source):
            try:
                mixture(**self.source.args)
            except UserError as error:
                return [error.under("source")]
        return []

    @property
    def pads_rows(self) -> bool:
        """Whether rows are filled up with padding."""
        return self.packing == "none"

    def open(self, config: Any, corpus_dir: Path) -> tuple[Rows, dict[str, PackedRows]]:
        """Opens the training rows and the evaluation sets that a run has prepared in `corpus_dir`: `open_rows`."""
        return open_rows(config, corpus_dir)

    def computed_tokens(self, config: Any, rows: Rows | None) -> float:  # noqa: ARG002, see `ExampleData`
        """Tokens that a model computes per row, padding included."""
        return config.seq_len


@dataclass(frozen=True)
class Text:
    """What `load_text` gives: the training rows, and the evaluation sets by name."""

    tokenizer: Tokenizer
    train: Rows
    eval_sets: dict[str, PackedRows]

    def train_corpora(self, name: str) -> list[Corpus]:
        """The training text that an evaluation set is compared with.

        It is that of the part of a mixture with the set's name, or else of all parts; of a stream, the first block.
        """
        parts = self.train.parts if isinstance(self.train, MixtureRows) else {name: self.train}
        return [part.corpus for part in ([parts[name]] if name in parts else parts.values())]

    def eval_batches(
        self, collator: Any, rows_per_batch: int, limit: int | None, **placement: Any
    ) -> dict[str, Iterator[Batch]]:
        """The batches of every evaluation set, by name: arguments as for `evaluation_batches`."""
        sizes = (collator, rows_per_batch, limit)
        return {name: evaluation_batches(rows, *sizes, name=name, **placement) for name, rows in self.eval_sets.items()}


def load_text(config: Any, *, causal: bool) -> Text:
    """Loads or trains the tokenizer, tokenizes the text where that is not done, and opens the rows.

    One source: the held-out share of its documents is the evaluation set `validation`. A mixture: that of every part is
    a set of the part's name. `data.eval_sets` adds sets; one of the same name replaces the held-out share, and all of
    that source is for training.

    With `data.mode=streaming` a process tokenizes the source into a folder of `data.cache_dir` while the model is
    trained; a tokenizer is trained on the beginning of the text. Documents held out are those of the first block.

    On several ranks the first does the work and the others wait.

    Args:
        config: a recipe's, with the keys `data`, `tokenizer` (None: the one in `init_from`), `init_from`, `output_dir`,
            `seq_len`, `global_batch_size` and `eval_every`.
        causal: for a model that predicts the next token: documents end in an eos token, rows show the token after them.

    Raises:
        UserError: the text, the tokenizer or the folder is not usable; names what and why.
    """
    rows_per_rank(config.global_batch_size, world_size())  # refused now, not after hours of tokenizing
    data = config.data
    source = _build_source("data.source", data.source)
    eval_sources = {name: _build_source(f"data.eval_sets.{name}", node) for name, node in data.eval_sets.items()}
    corpus_dir = Path(data.corpus_dir or Path(config.output_dir) / "corpus")
    parts = source.sources if isinstance(source, Mixture) else {VALIDATION: source}
    if data.eval_split:
        splits = {name: part for name, part in parts.items() if name not in eval_sources}
        eval_sources |= {
            name: split_for_evaluation(part, data.eval_split, data.eval_samples) for name, part in splits.items()
        }
    is_stream = data.mode == "streaming"
    if is_stream and isinstance(source, Mixture) and (source.weights is None or source.max_epochs):
        key = "weights" if source.weights is None else "max_epochs"
        raise UserError(
            "the length of a stream is not known before it has ended",
            key=f"data.source.{key}",
            hint="Give every source a weight, and no max_epochs; or set data.mode=prepare.",
            code="unfinished_stream",
        )
    # What is held out of every part: a fraction, or a number of documents.
    held_out = {name: (0.0, None) if name in eval_sources else _held_out(data) for name in parts}
    for name in _tokens(parts):
        if held_out[name][0]:
            raise UserError(
                f"{parts[name].name} holds tokens, of which no fraction is held out by a hash of the text",
                key="data.validation_fraction",
                hint="Set data.eval_samples to hold out the first documents, or name a set in data.eval_sets; or "
                "data.validation_fraction=0 eval_every=null.",
                code="tokens_not_split",
            )
    texts = {name: part for name, part in parts.items() if name not in _tokens(parts)}
    eval_texts = {name: part for name, part in eval_sources.items() if name not in _tokens(eval_sources)}
    with rank0_first("tokenizer and corpus"):
        for name, part in texts.items():
            if not is_stream:
                check_corpus_dir(_folder(corpus_dir, source, name), part, *held_out[name])
        for name, eval_source in eval_texts.items():
            check_corpus_dir(corpus_dir / EVAL_SETS / name, eval_source)
        if config.tokenizer is None:
            made = load_model_tokenizer(resolve_model_folder(config.init_from), causal)
        else:
            text = beginning_of(source, TOKENIZER_CHARACTERS) if is_stream else source
            made = build(config.tokenizer, source=text, folder=corpus_dir / "tokenizer", causal=causal)
        options: dict[str, Any] = {"tokenizer_threads": data.tokenizer_threads}
        for name, eval_source in eval_texts.items():
            folder = corpus_dir / EVAL_SETS / name
            prepare_corpus(
                folder, eval_source, made, 0, seq_len=config.seq_len, name=f"{name}, evaluation set", **options
            )
        streams = {}
        for name, part in texts.items():
            fraction, samples = held_out[name]
            options |= {"validation_fraction": fraction, "eval_samples": samples}
            if is_stream and rank() == 0:
                streams[name] = str(open_stream(part, made, cache_dir=data.cache_dir, **options).folder.absolute())
            elif not is_stream:
                options |= {"seq_len": config.seq_len, "name": name if len(parts) > 1 else None}
                prepare_corpus(_folder(corpus_dir, source, name), part, made, **options)
        if streams:
            corpus_dir.mkdir(parents=True, exist_ok=True)
            write_atomically(corpus_dir / STREAMS_FILE, [to_json(streams)])
    train, eval_sets = open_rows(config, corpus_dir, made, lookahead=int(causal), wait=True, source=source)
    # Of a prepared text one document is held out at least; what a stream holds out is what its first block holds.
    none = [name for name in parts if is_stream and any(held_out[name]) and name not in eval_sets]
    if config.eval_every and (none or not eval_sets):
        of_part = f" of {none[0]}" if len(parts) > 1 and none else ""
        raise UserError(
            f"there is no text{of_part} to evaluate on"
            + (": the first block holds no document for it" if none else ""),
            key="eval_every",
            hint="Set eval_every=null, or hold text out: data.validation_fraction, data.eval_split, data.eval_samples "
            "or data.eval_sets.",
            code="no_validation_text",
        )
    print(f"training text: {train}", flush=True)
    return Text(made, train, eval_sets)


def open_rows(
    config: Any,
    corpus_dir: Path,
    tokenizer: Tokenizer | None = None,
    lookahead: int = 0,
    wait: bool = False,
    source: Any = None,
) -> tuple[Rows, dict[str, PackedRows]]:
    """Opens the training rows and the evaluation sets that `load_text` prepared in `corpus_dir`.

    Args:
        config: a recipe's, with the keys `data`, `seq_len` and `global_batch_size`.
        corpus_dir: folder of the corpora.
        tokenizer: if given, the corpora must have been made with it; it names the token of padding.
        lookahead: tokens that a row shows beyond its end.
        wait: wait for the first block of a stream.
        source: `data.source`, where it is built already.

    Raises:
        UserError: a corpus is missing, unfinished or corrupt, or of another tokenizer.
    """
    data, pad_id = config.data, tokenizer.pad_id if tokenizer else 0
    rows_of = partial(make_rows, data.packing, seq_len=config.seq_len, pad_id=pad_id, lookahead=lookahead)
    # Sources are built where what is in them is not in `corpus_dir` alone.
    if source is None and (is_mixture(data.source) or _is_tokens(data.source)):
        source = _build_source("data.source", data.source)
    parts = source.sources if isinstance(source, Mixture) else {VALIDATION: source}
    own_sets = [*data.eval_sets, *(parts if data.eval_split else ())]
    train: dict[str, Rows] = {}
    eval_sets: dict[str, PackedRows] = {}
    for name, part in parts.items():
        folder, is_split = _folder(corpus_dir, source, name), name not in own_sets and any(_held_out(data))
        held_out = None
        if isinstance(part, TokenSource):
            samples = data.eval_samples if is_split else None
            train[name] = rows_of(part.open(tokenizer, samples or 0))
            held_out = part.open(tokenizer, 0, samples) if samples else None
        elif data.mode == "streaming":
            folder = _stream_folder(corpus_dir, name)
            stream = train[name] = StreamedRows(Stream(folder), rows_of, config.seq_len, data.block_rows, wait)
            held_out = stream.held_out() if is_split else None
        else:
            corpus = open_corpus(folder / "train", tokenizer)
            # An addition to a part of a mixture makes another corpus of it.
            train[name] = rows_of(corpus) if len(parts) > 1 else rows_of_corpus(corpus, rows_of)
            held_out = open_corpus(folder / "validation", tokenizer) if is_split else None
        if held_out is not None:
            eval_sets[name] = rows_of(held_out)
    for name in own_sets:
        node = data.eval_sets.get(name)
        if node and _is_tokens(node):
            eval_sets[name] = rows_of(_build_source(f"data.eval_sets.{name}", node).open(tokenizer))
        else:
            eval_sets[name] = rows_of(open_corpus(corpus_dir / EVAL_SETS / name / "train", tokenizer))
    if isinstance(source, Mixture):
        return _mix(train, source, config.global_batch_size), eval_sets
    return train[VALIDATION], eval_sets


def _mix(parts: dict[str, Rows], source: Mixture, global_batch_size: int) -> MixtureRows:
    weights = source.weights and [(step * global_batch_size, shares) for step, shares in source.weights]
    return MixtureRows(parts, weights, alpha=source.alpha, max_epochs=source.max_epochs, added=source.added)


def _held_out(data: TextData) -> tuple[float, int | None]:
    """The fraction of the documents, or their number, that is for validation."""
    return (0.0, data.eval_samples) if data.eval_samples else (data.validation_fraction, None)


def _stream_folder(corpus_dir: Path, name: str) -> str:
    try:
        return json.loads((corpus_dir / STREAMS_FILE).read_text("utf-8"))[name]
    except FileNotFoundError:
        hint = "Run the recipe, which starts one."
        raise UserError(f"{corpus_dir} names no stream", hint=hint, code="no_corpus") from None


def _tokens(sources: dict[str, Any]) -> list[str]:
    return [name for name, source in sources.items() if isinstance(source, TokenSource)]


def _is_tokens(node: Component) -> bool:
    """Whether a source of a config gives tokens: the function that it names says so in its signature."""
    try:
        return typing.get_type_hints(resolve(node.path)).get("return") is TokenSource
    except (NameError, TypeError):  # annotations that only type checkers can read
        return False


def is_mixture(node: Component) -> bool:
    """Whether a source of a config is a mixture of several."""
    return resolve(node.path) is mixture


def _folder(corpus_dir: Path, source: Source | None, name: str) -> Path:
    return corpus_dir / name if isinstance(source, Mixture) else corpus_dir


def _build_source(key: str, node: Component) -> Any:
    try:
        return build(node)
    except UserError as error:
        raise error.under(key) from None
