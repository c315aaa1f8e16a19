"""Sources of text: each iterates over documents and has a fingerprint of its content.

text_files          `files`: .txt, .md, .jsonl, .csv, .tsv and .parquet, plain or compressed
file_slice          `text_span`: a byte range of one text file as one document
hugging_face        `hf_dataset`: the `datasets` library, streamed or not
standard_library    `python_docs`: the documentation that ships with Python
records             `Document`, `BadRecord`, `ReadStats`: what a source yields, and its accounting
resolve_paths       paths, folders and globs to a list of files
line_reader         bytes of a file to numbered lines, block by block
text_and_jsonl      lines to documents: plain text and JSON lines
tables              rows to documents: CSV, TSV, Parquet
"""

from torchrecipes.data.sources.file_slice import text_span
from torchrecipes.data.sources.hugging_face import hf_dataset
from torchrecipes.data.sources.records import BadRecord, Document, ReadStats, Source
from torchrecipes.data.sources.standard_library import python_docs
from torchrecipes.data.sources.text_files import files

__all__ = ["BadRecord", "Document", "ReadStats", "Source", "files", "hf_dataset", "python_docs", "text_span"]
