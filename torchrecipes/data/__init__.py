"""From text to batches.

sources      files, tables, Hugging Face datasets: iterators over documents
token_files  corpora that other tools have tokenized
tokenizers   load one, or train one on the text
corpus       tokenized documents on disk, read by memory map
examples     pairs, scores and labels to fine-tune on, tokenized on disk
domains      domain names: parsing, public suffixes, sources
batching     rows, their order, targets, micro-batches
text_data    `TextData` and `load_text`: all of it, from a pretraining recipe's config
example_data `ExampleData` and `load_examples`: the same for examples, from a fine-tuning recipe's config
progress     a bar or lines for a long pass over data
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchrecipes.data.batching import (
        Batch,
        BestFitDataset,
        CausalLMCollator,
        Collator,
        DatasetBatches,
        ExampleRows,
        Examples,
        FeatureCollator,
        FeatureRows,
        GroupedRows,
        LabeledCollator,
        Loader,
        MixtureRows,
        MLMCollator,
        NextFitDataset,
        PackedDataset,
        PaddedDataset,
        PairCollator,
        Rows,
        evaluation_batches,
        make_rows,
        rows_per_rank,
    )
    from torchrecipes.data.corpus import Corpus, open_corpus, prepare_corpus
    from torchrecipes.data.example_data import ExampleData, ExampleSets, load_examples
    from torchrecipes.data.text_data import Text, TextData, load_text
    from torchrecipes.data.tokenizers import Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "BestFitDataset",
    "CausalLMCollator",
    "Collator",
    "Corpus",
    "DatasetBatches",
    "ExampleData",
    "ExampleRows",
    "ExampleSets",
    "Examples",
    "FeatureCollator",
    "FeatureRows",
    "GroupedRows",
    "LabeledCollator",
    "Loader",
    "MLMCollator",
    "MixtureRows",
    "NextFitDataset",
    "PackedDataset",
    "PaddedDataset",
    "PairCollator",
    "Rows",
    "Text",
    "TextData",
    "Tokenizer",
    "evaluation_batches",
    "load_examples",
    "load_text",
    "load_tokenizer",
    "make_rows",
    "open_corpus",
    "prepare_corpus",
    "rows_per_rank",
]


def __getattr__(name: str) -> Any:
    # Imported when it is used: batches need torch, which takes seconds, and what tokenizes does without.
    if name in __all__:
        for module in ("tokenizers", "corpus", "batching", "text_data", "example_data"):
            exports = importlib.import_module(f"{__name__}.{module}")
            if name in exports.__dict__:
                return exports.__dict__[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
