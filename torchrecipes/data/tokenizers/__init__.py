"""Tokenizers: load one, or train one on the text that a model will see.

load                  `load_tokenizer`: tokenizer.json, Hugging Face folders, vocab.txt, SentencePiece models
train                 `train_wordpiece`, `train_bpe`, `train_unigram`, `train_char`
extend                `extend_tokenizer`, `learn_tokens`: more tokens; those that are there keep their ids
inspect               `describe_tokenizer`, `measure_tokenizer`: what it is made of, and how well it suits text
tokenizer             `Tokenizer`: ids of text, and special tokens by their role
tokenizer_files       which file of a folder is read, and which token has which role
sentencepiece_model   a SentencePiece `.model` as a `tokenizers` object with the same ids
"""

from torchrecipes.data.tokenizers.extend import Extension, extend_tokenizer, learn_tokens
from torchrecipes.data.tokenizers.inspect import describe_tokenizer, measure_tokenizer
from torchrecipes.data.tokenizers.load import load_tokenizer
from torchrecipes.data.tokenizers.tokenizer import Tokenizer
from torchrecipes.data.tokenizers.train import train_bpe, train_char, train_unigram, train_wordpiece

__all__ = [
    "Extension",
    "Tokenizer",
    "describe_tokenizer",
    "extend_tokenizer",
    "learn_tokens",
    "load_tokenizer",
    "measure_tokenizer",
    "train_bpe",
    "train_char",
    "train_unigram",
    "train_wordpiece",
]
