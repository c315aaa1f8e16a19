"""`load_text`: the tokenizer and the rows of a run; corpora are built where they are not there yet."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchrecipes.config import Component, build, component
from torchrecipes.config.components import resolve
from torchrecipes.config.metadata import Count, Fraction, MayChange
from torchrecipes.data.batching.batch import Batch
from torchrecipes.data.batching.loader import evaluation_batches, rows_per_rank
from torchrecipes.data.batching.mixture import MixtureRows
from torchrecipes.data.batching.packing import PackedDataset, PaddedDataset
from torchrecipes.data.batching.rows import Rows
from torchrecipes.data.corpus import check_corpus_dir, open_corpus, prepare_corpus
from torchrecipes.data.sources.mixture import Mixture, mixture
from torchrecipes.data.sources.records import Source
from torchrecipes.data.tokenizers import Tokenizer
from torchrecipes.data.tokenizers.load import load_model_tokenizer
from torchrecipes.distributed.collectives import rank0_first, world_size
from torchrecipes.errors import UserError
from torchrecipes.model_folder import resolve_model_folder

VALIDATION = "validation"  # the evaluation set that is held out of the source
EVAL_SETS = "eval_sets"  # their folder


@dataclass
class TextData:
    """The config group `data` of a pretraining recipe."""

    source: Component = component("torchrecipes.data.sources.files")  # where the text comes from
    validation_fraction: Fraction = 0.005  # share of the documents held out, chosen by a hash of their text
    eval_sets: dict[str, Component] = field(default_factory=dict)  # sources by name; `validation` replaces the fraction
    corpus_dir: str | None = None  # folder of token shards, shared by runs; None: <output_dir>/corpus
    tokenizer_threads: MayChange[Count | None] = None  # threads that tokenize; None: one per core
    packing: bool = True  # rows full of documents, attention within each; False: a document per row, padded
    shuffle: bool = True  # False: rows in the order of the corpus
    num_workers: MayChange[Count] = 0  # loader processes; 0: in this process, which is fast enough for most models


@dataclass(frozen=True)
class Text:
    """What `load_text` gives: the training rows, and the evaluation sets by name."""

    tokenizer: Tokenizer
    train: Rows
    eval_sets: dict[str, Rows]

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
    # Folder, source and held-out share of every corpus.
    parts = source.sources if isinstance(source, Mixture) else {VALIDATION: source}
    corpora = [
        (_folder(corpus_dir, source, name), part, 0 if name in eval_sources else data.validation_fraction)
        for name, part in parts.items()
    ]
    corpora += [(corpus_dir / EVAL_SETS / name, eval_source, 0) for name, eval_source in eval_sources.items()]
    with rank0_first("tokenizer and corpus"):
        for corpus in corpora:
            check_corpus_dir(*corpus)
        if config.tokenizer is None:
            made = load_model_tokenizer(resolve_model_folder(config.init_from), causal)
        else:
            made = build(config.tokenizer, source=source, folder=corpus_dir / "tokenizer", causal=causal)
        for folder, part, held_out in corpora:
            options = {"tokenizer_threads": data.tokenizer_threads, "seq_len": config.seq_len}
            prepare_corpus(folder, part, made, held_out, **options)
    train, eval_sets = open_rows(config, corpus_dir, made, lookahead=int(causal))
    if config.eval_every and not eval_sets:
        raise UserError(
            "there is no text to evaluate on",
            key="eval_every",
            hint="Set eval_every=null, or hold text out: data.validation_fraction or data.eval_sets.",
            code="no_validation_text",
        )
    print(f"training text: {train}", flush=True)
    return Text(made, train, eval_sets)


def open_rows(
    config: Any, corpus_dir: Path, tokenizer: Tokenizer | None = None, lookahead: int = 0
) -> tuple[Rows, dict[str, Rows]]:
    """Opens the training rows and the evaluation sets that `load_text` prepared in `corpus_dir`.

    Args:
        config: a recipe's, with the keys `data`, `seq_len` and `global_batch_size`.
        corpus_dir: folder of the corpora.
        tokenizer: if given, the corpora must have been made with it; it names the token of padding.
        lookahead: tokens that a row shows beyond its end.

    Raises:
        UserError: a corpus is missing, unfinished or corrupt, or of another tokenizer.
    """
    data, pad_id = config.data, tokenizer.pad_id if tokenizer else 0
    kind = PackedDataset if data.packing else PaddedDataset

    def rows(folder: Path) -> Rows:
        return kind(open_corpus(folder, tokenizer), seq_len=config.seq_len, pad_id=pad_id, lookahead=lookahead)

    source = _build_source("data.source", data.source) if is_mixture(data.source) else None
    names = list(source.sources) if source else [VALIDATION]
    folders = {name: _folder(corpus_dir, source, name) for name in names}
    train = {name: rows(folder / "train") for name, folder in folders.items()}
    eval_sets = {
        name: rows(folder / "validation")
        for name, folder in folders.items()
        if name not in data.eval_sets and data.validation_fraction
    }
    eval_sets |= {name: rows(corpus_dir / EVAL_SETS / name / "train") for name in data.eval_sets}
    return _mix(train, source, config.global_batch_size) if source else train[VALIDATION], eval_sets


def _mix(parts: dict[str, Rows], source: Mixture, global_batch_size: int) -> MixtureRows:
    weights = source.weights and [(step * global_batch_size, shares) for step, shares in source.weights]
    return MixtureRows(parts, weights, alpha=source.alpha, max_epochs=source.max_epochs, added=source.added)


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
