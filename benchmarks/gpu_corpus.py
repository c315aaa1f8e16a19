"""A corpus of random tokens in documents of web-like lengths, written as shards without tokenizing text."""

from pathlib import Path

import numpy as np

from torchrecipes.data.corpus import Corpus, open_corpus
from torchrecipes.data.corpus.shard_writer import CORPUS_FILE, ShardWriter, Tokenized
from torchrecipes.data.sources.records import ReadStats
from torchrecipes.planning.fake_model import TokenizerStandIn

# Tokens of a document. Web text: log-normal, 400 on average, a fifth of the documents longer than 600.
LENGTHS = {"web": (5.49, 1.0, 16_384), "lines": (2.9, 0.5, 40)}  # mean and deviation of the logarithm, the longest


def document_lengths(kind: str, tokens: int, seed: int = 0) -> np.ndarray:
    """Lengths of documents, at least 4 tokens each, that hold `tokens` tokens together or a few more."""
    mean, deviation, longest = LENGTHS[kind]
    rng = np.random.default_rng(seed)
    lengths = np.empty(0, np.int64)
    while lengths.sum() < tokens:
        more = rng.lognormal(mean, deviation, 1 + tokens // 16).astype(np.int64)
        lengths = np.concatenate([lengths, more.clip(4, longest)])
    return lengths[: int(lengths.cumsum().searchsorted(tokens)) + 1]


def row_boundaries(kind: str, rows: int, row_len: int, seed: int = 0) -> np.ndarray:
    """Flat positions at which documents start in packed rows: a document that crosses the end of a row is cut there."""
    starts = document_lengths(kind, rows * row_len, seed).cumsum()
    starts = np.concatenate([starts[starts < rows * row_len], np.arange(rows) * row_len])
    return np.unique(starts)


def write_corpus(
    folder: Path, tokenizer: TokenizerStandIn, kind: str, tokens: int, *, causal: bool, seed: int = 0
) -> Corpus:
    """Writes a corpus unless it is there, and opens it.

    Frequencies fall as in text (Zipf's law), and half of the tokens follow from the one before, so that there is
    something to learn.

    Args:
        folder: made if missing.
        tokenizer: its ids are used; 0 to 4 are special.
        kind: of `LENGTHS`.
        tokens: about how many.
        causal: documents are `eos text`, else `cls text sep`.
        seed: chooses tokens and lengths.
    """
    if (folder / CORPUS_FILE).exists():
        return open_corpus(folder)
    rng = np.random.default_rng(seed)
    lengths = document_lengths(kind, tokens, seed)
    size, ordinary = int(lengths.sum()), tokenizer.vocab_size - 5
    drawn = (ordinary ** rng.random(size)).astype(np.int64) - 1  # log-uniform: the frequency of rank r is 1 / r
    follower = rng.permutation(ordinary)
    follows = rng.random(size) < 0.5
    follows[0] = False
    before = np.roll(drawn, 1)
    content = 5 + np.where(follows, follower[before], drawn)
    ends = lengths.cumsum()
    content[ends - lengths] = tokenizer.eos_id if causal else tokenizer.cls_id
    if not causal:
        content[ends - 1] = tokenizer.sep_id
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    writer = ShardWriter({"train": folder}, {"dtype": dtype, "shard_tokens": 1 << 26, "made_from": f"seed {seed}"})
    counts = np.stack([4 * lengths, 4 * lengths, 0 * lengths, 0 * lengths], axis=1)
    writer.add(Tokenized(content.astype(dtype), lengths, counts))
    writer.finish(ReadStats(), tokenizer)
    return open_corpus(folder)
