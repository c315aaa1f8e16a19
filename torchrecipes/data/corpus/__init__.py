"""A corpus: tokenized documents on disk, read by memory map.

corpus         `Corpus`: reading, verifying, summary; `prepare_corpus` opens one or builds it
build          documents in, shards out; `check_corpus_dir`
shards         the file format of a shard
shard_writer   writes the shards and `corpus.json` of one split
"""

from torchrecipes.data.corpus.build import check_corpus_dir
from torchrecipes.data.corpus.corpus import Corpus, open_corpus, prepare_corpus

__all__ = ["Corpus", "check_corpus_dir", "open_corpus", "prepare_corpus"]
