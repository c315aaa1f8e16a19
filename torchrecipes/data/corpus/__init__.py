"""A corpus: tokenized documents on disk, read by memory map.

corpus         `Corpus`: reading, verifying, summary; `prepare_corpus` opens one or builds it
build          documents in, shards out; `check_corpus_dir`
append         `append_to_corpus`, and `merge_parts` for a job array
lengths        the lengths of documents and their distribution
shards         the file format of a shard
shard_writer   writes the shards and `corpus.json` of one split
"""

from torchrecipes.data.corpus.append import append_to_corpus, merge_parts, part_folder
from torchrecipes.data.corpus.build import check_corpus_dir
from torchrecipes.data.corpus.corpus import Corpus, open_corpus, prepare_corpus

__all__ = [
    "Corpus",
    "append_to_corpus",
    "check_corpus_dir",
    "merge_parts",
    "open_corpus",
    "part_folder",
    "prepare_corpus",
]
