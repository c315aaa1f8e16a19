"""From a corpus to batches: rows, their order, targets, micro-batches.

rows          `Rows`: what a loader reads
packing       `PackedDataset`, `BestFitDataset`, `NextFitDataset`, `PaddedDataset`: rows of equal length from documents
best_fit      the plan of `BestFitDataset`
next_fit      the plan of `NextFitDataset`
mixture       `MixtureRows`: rows of several sources in exact proportions
appended      `AppendedRows`: rows of a corpus that text has been added to, also during a run
streamed      `StreamedRows`: rows of a corpus that is still being written
example_rows  `ExampleRows`: examples of texts in the place of rows
streamed_examples  `StreamedExampleRows`: examples that are tokenized while they are trained on
grouped_rows  `GroupedRows`: labeled examples, some of each label together
dataset_batches  `DatasetBatches`: several datasets, every step from one
features      `FeatureRows`, `FeatureCollator`: outputs of a frozen encoder in the place of texts
shuffle       the order of the rows as arithmetic: a permutation without a list
collator      `Collator`: what a loader makes batches with
mlm           `MLMCollator`: masked tokens
causal        `CausalLMCollator`: next tokens
pairs         `PairCollator`: texts that belong together
labeled       `LabeledCollator`: texts with labels
texts         `pack_texts`: texts as one row without padding
batch         `Batch`: what a model and a loss get
examples      `Examples`: which texts of a batch belong together
loader        `Loader`: from a step's number to its micro-batches
"""

from torchrecipes.data.batching.appended import AppendedRows
from torchrecipes.data.batching.batch import Batch
from torchrecipes.data.batching.causal import CausalLMCollator
from torchrecipes.data.batching.collator import Collator
from torchrecipes.data.batching.dataset_batches import DatasetBatches
from torchrecipes.data.batching.example_rows import ExampleRows
from torchrecipes.data.batching.examples import Examples
from torchrecipes.data.batching.features import FeatureCollator, FeatureRows
from torchrecipes.data.batching.grouped_rows import GroupedRows
from torchrecipes.data.batching.labeled import LabeledCollator
from torchrecipes.data.batching.loader import Loader, evaluation_batches, rows_per_rank
from torchrecipes.data.batching.mixture import MixtureRows
from torchrecipes.data.batching.mlm import MLMCollator
from torchrecipes.data.batching.packing import BestFitDataset, NextFitDataset, PackedDataset, PaddedDataset, make_rows
from torchrecipes.data.batching.pairs import PairCollator
from torchrecipes.data.batching.rows import RowBlock, Rows
from torchrecipes.data.batching.streamed import StreamedRows
from torchrecipes.data.batching.streamed_examples import StreamedExampleRows
from torchrecipes.data.batching.texts import pack_texts

__all__ = [
    "AppendedRows",
    "Batch",
    "BestFitDataset",
    "CausalLMCollator",
    "Collator",
    "DatasetBatches",
    "ExampleRows",
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
    "RowBlock",
    "Rows",
    "StreamedExampleRows",
    "StreamedRows",
    "evaluation_batches",
    "make_rows",
    "pack_texts",
    "rows_per_rank",
]
