"""Sources of text: each iterates over documents and has a fingerprint of its content.

text_files          `files`: .txt, .md, .jsonl, .csv, .tsv and .parquet, plain or compressed
file_slice          `text_span`: a slice of one text file as one document
hugging_face        `hf_dataset`: the `datasets` library, streamed or not
standard_library    `python_docs`, `python_source`: documentation and code that ship with Python
mixed_sources       `mixture`: several sources with weights
part                `SourcePart`: one of several equal parts of a source
records             `Source`, `Document`, `BadRecord`, `ReadStats`, and the checksum of a file's content
dataset_repository  the splits and subsets of a cloned dataset repository
resolve_paths       from paths, folders and patterns to a list of files
line_reader         from the bytes of a file to numbered lines; recognizes other formats
plain_text          from lines to documents: plain text
json_records        from lines to documents: JSON lines, and one JSON array
tables              from rows to documents: CSV, TSV, Parquet
text_column         what of a record is its text
record_columns      `RecordColumns`: the fields of a record that has several
chat_template       from a list of chat messages to a text
pieces              cuts long texts
text_rows           one text for every line or row, empty ones too: to embed
"""

from torchrecipes.data.sources.file_slice import text_span
from torchrecipes.data.sources.hugging_face import hf_dataset
from torchrecipes.data.sources.mixed_sources import Mixture, mixture
from torchrecipes.data.sources.part import SourcePart
from torchrecipes.data.sources.record_columns import RecordColumns
from torchrecipes.data.sources.records import BadRecord, Document, ReadStats, Source, require_documents
from torchrecipes.data.sources.standard_library import python_docs, python_source
from torchrecipes.data.sources.text_files import files
from torchrecipes.data.sources.text_rows import TextRows

__all__ = [
    "BadRecord",
    "Document",
    "Mixture",
    "ReadStats",
    "RecordColumns",
    "Source",
    "SourcePart",
    "TextRows",
    "files",
    "hf_dataset",
    "mixture",
    "python_docs",
    "python_source",
    "require_documents",
    "text_span",
]
