"""A corpus: tokenized documents on disk, read by memory map.

build          documents in, shards out: `prepare_corpus` builds what is not there yet
corpus         `Corpus`: reading, verifying and summarizing
shards         the file format of a shard
shard_writer   batches of tokens to the shards and `corpus.json` of one split
"""

from torchrecipes.data.corpus.corpus import Corpus, open_corpus, prepare_corpus

__all__ = ["Corpus", "open_corpus", "prepare_corpus"]
