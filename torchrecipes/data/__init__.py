"""From text to batches.

sources      files, tables, Hugging Face datasets: iterators over documents
tokenizers   load one, or train one on the text
corpus       tokenized documents on disk, read by memory map
batching     rows, their order, targets, micro-batches
text_data    `TextData` and `load_text`: all of it, from a recipe's config
progress     a bar or lines for a long pass over data
"""

from torchrecipes.data.batching import (
    Batch,
    CausalLMCollator,
    Loader,
    MixtureRows,
    MLMCollator,
    PackedDataset,
    PaddedDataset,
    Rows,
    evaluation_batches,
    rows_per_rank,
)
from torchrecipes.data.corpus import Corpus, open_corpus, prepare_corpus
from torchrecipes.data.text_data import Text, TextData, load_text
from torchrecipes.data.tokenizers import Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "CausalLMCollator",
    "Corpus",
    "Loader",
    "MLMCollator",
    "MixtureRows",
    "PackedDataset",
    "PaddedDataset",
    "Rows",
    "Text",
    "TextData",
    "Tokenizer",
    "evaluation_batches",
    "load_text",
    "load_tokenizer",
    "open_corpus",
    "prepare_corpus",
    "rows_per_rank",
]
