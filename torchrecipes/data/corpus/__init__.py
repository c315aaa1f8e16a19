"""A corpus: tokenized documents on disk, read by memory map.

corpus         `Corpus`: reading, verifying, summary; `prepare_corpus` opens one or builds it
build          documents in, shards out; `check_corpus_dir`
bulk           the same for domain names, in blocks
append         `append_to_corpus`, and `merge_parts` for a job array
lengths        the lengths of documents and their distribution
stream         `open_stream`: a corpus that is read while a process writes it
tokenizer_process   that process
cache          the folders of streams: `default_cache_dir`
shards         the file format of a shard
shard_writer   writes the shards and `corpus.json` of one split
"""

from torchrecipes.data.corpus.append import append_to_corpus, merge_parts, part_folder
from torchrecipes.data.corpus.build import check_corpus_dir
from torchrecipes.data.corpus.cache import default_cache_dir
from torchrecipes.data.corpus.corpus import Corpus, open_corpus, prepare_corpus
from torchrecipes.data.corpus.stream import Stream, open_stream

__all__ = [
    "Corpus",
    "Stream",
    "append_to_corpus",
    "check_corpus_dir",
    "default_cache_dir",
    "merge_parts",
    "open_corpus",
    "open_stream",
    "part_folder",
    "prepare_corpus",
]
