"""Examples to fine-tune on: pairs, scored pairs, labeled texts and raw texts, tokenized on disk.

components   `pairs`, `scored_pairs`, `labeled_texts`, `raw_texts`: sources of examples, from files or datasets
example      `Example`, `ExampleSource`
fields       from the fields of a record to an example
labels       from labels to class numbers
plan         the names of the classes, and which examples are held out
encode       `ExampleEncoder`: prompts, truncation, tokens
build        examples in, shards out
corpus       `ExampleCorpus`: reading; `prepare_examples`, `open_examples`
streamed     `StreamedExamples`: examples that are tokenized while they are trained on
statistics   duplicates, contradicting labels, lengths
block        `ExampleBlock`: examples that were read
shards       the file format of a shard
standard_library_labels  `docstring_packages`: docstrings, labeled with the package that they are from
standard_library_pairs   `docstring_code_pairs`: descriptions and code of Python's own functions
"""

from torchrecipes.data.examples.block import ExampleBlock
from torchrecipes.data.examples.components import labeled_texts, pairs, raw_texts, scored_pairs
from torchrecipes.data.examples.corpus import ExampleCorpus, holds_examples, open_examples, prepare_examples
from torchrecipes.data.examples.encode import ExampleEncoder
from torchrecipes.data.examples.example import Example, ExampleSource
from torchrecipes.data.examples.standard_library_labels import docstring_packages
from torchrecipes.data.examples.standard_library_pairs import docstring_code_pairs
from torchrecipes.data.examples.streamed import StreamedExamples

__all__ = [
    "Example",
    "ExampleBlock",
    "ExampleCorpus",
    "ExampleEncoder",
    "ExampleSource",
    "StreamedExamples",
    "docstring_code_pairs",
    "docstring_packages",
    "holds_examples",
    "labeled_texts",
    "open_examples",
    "pairs",
    "prepare_examples",
    "raw_texts",
    "scored_pairs",
]
