"""`load_text`: the tokenizer and the corpora of a run, built where they are not there yet."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torchrecipes.config import Component, build, component
from torchrecipes.config.metadata import Count, Fraction, MayChange
from torchrecipes.data.batching.loader import rows_per_rank
from torchrecipes.data.batching.packing import PackedDataset, PaddedDataset
from torchrecipes.data.corpus import check_corpus_dir, prepare_corpus
from torchrecipes.data.tokenizers import Tokenizer
from torchrecipes.data.tokenizers.load import load_model_tokenizer
from torchrecipes.distributed.collectives import rank0_first, world_size
from torchrecipes.errors import UserError
from torchrecipes.model_folder import resolve_model_folder


@dataclass
class TextData:
    """The config group `data` of a pretraining recipe."""

    source: Component = component("torchrecipes.data.sources.files")  # where the text comes from
    validation_source: Component | None = None  # separate validation text; None: validation_fraction of the source
    validation_fraction: Fraction = 0.005  # share of the documents held out, chosen by a hash of their text
    corpus_dir: str | None = None  # folder of token shards, shared by runs; None: <output_dir>/corpus
    tokenizer_threads: MayChange[Count | None] = None  # threads that tokenize; None: one per core
    packing: bool = True  # rows full of documents, attention within each; False: a document per row, padded
    shuffle: bool = True  # False: rows in the order of the corpus
    num_workers: MayChange[Count] = 0  # loader processes; 0: in this process, which is fast enough for most models


@dataclass(frozen=True)
class Text:
    """What `load_text` gives: `validation` is None where no text is held out."""

    tokenizer: Tokenizer
    train: PackedDataset | PaddedDataset
    validation: PackedDataset | PaddedDataset | None


def load_text(config: Any, *, causal: bool) -> Text:
    """Loads or trains the tokenizer, tokenizes the text where that is not done, and opens the rows.

    On several ranks the first does the work and the others wait.

    Args:
        config: a recipe's, with the keys `data`, `tokenizer` (None: the one in `init_from`), `init_from`, `output_dir`,
            `seq_len` and `global_batch_size`.
        causal: for a model that predicts the next token: documents end in an eos token, rows show the token after them.

    Raises:
        UserError: the text, the tokenizer or the folder is not usable; names what and why.
    """
    rows_per_rank(config.global_batch_size, world_size())  # refused now, not after hours of tokenizing
    data = config.data
    source = _build_source("data.source", data.source)
    validation_source = _build_source("data.validation_source", data.validation_source)
    corpus_dir = Path(data.corpus_dir or Path(config.output_dir) / "corpus")
    with rank0_first("tokenizer and corpus"):
        check_corpus_dir(corpus_dir, source, 0 if validation_source else data.validation_fraction)
        if config.tokenizer is None:
            made = load_model_tokenizer(resolve_model_folder(config.init_from), causal)
        else:
            made = build(config.tokenizer, source=source, folder=corpus_dir / "tokenizer", causal=causal)
        corpora = prepare_corpus(
            corpus_dir,
            source,
            made,
            data.validation_fraction,
            validation_source,
            data.tokenizer_threads,
            seq_len=config.seq_len,
        )
    dataset = partial(
        PackedDataset if data.packing else PaddedDataset,
        seq_len=config.seq_len,
        pad_id=made.pad_id,
        lookahead=int(causal),
    )
    train, validation = (corpus and dataset(corpus) for corpus in corpora)
    print(f"training text: {train}", flush=True)
    return Text(made, train, validation)


def _build_source(key: str, node: Component | None) -> Any:
    try:
        return build(node)
    except UserError as error:
        raise error.under(key) from None
