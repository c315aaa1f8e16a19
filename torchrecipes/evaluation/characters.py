"""Baselines for tokenizers whose tokens are single characters: kinds of characters, and an n-gram model."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from torchrecipes.evaluation.ngrams import NGramModel

if TYPE_CHECKING:
    from torchrecipes.data.corpus.corpus import Corpus
    from torchrecipes.data.tokenizers.tokenizer import Tokenizer

KINDS = ("letter", "digit", "hyphen", "dot", "other")
MAX_CHARACTERS = 256  # of a vocabulary, special tokens included, that n-grams are counted for
NGRAMS = {"trigram": 3, "fivegram": 5}  # the orders that an evaluation reports


@dataclass(frozen=True, eq=False)
class CharacterBaselines:
    """What a character model is compared with.

    Attributes:
        kind_of_token: `[V]` int64: the place of every token's kind in `KINDS`; special tokens are of the last one.
        most_frequent: `[5]` int64: the most frequent token of every kind in the evaluation set; -1 where there is none.
        ngrams: a model of the training text, or None.
    """

    kind_of_token: np.ndarray
    most_frequent: np.ndarray
    ngrams: NGramModel | None


def character_kinds(tokenizer: "Tokenizer") -> np.ndarray | None:
    """The kind of every token, by its text: `[V]` int64, places in `KINDS`; None unless tokens are single characters.

    Letters are those of any script (`str.isalpha`), digits too (`str.isdigit`). Special tokens count as `other`.
    """
    special = set(tokenizer.special_ids)
    kinds = np.full(tokenizer.vocab_size, KINDS.index("other"), dtype=np.int64)
    for token in range(tokenizer.vocab_size):
        if token in special:
            continue
        text = tokenizer.decode_token(token)
        if len(text) != 1 or text == "\N{REPLACEMENT CHARACTER}":  # a byte of a character
            return None
        kinds[token] = KINDS.index(_kind(text))
    return kinds


def _kind(character: str) -> str:
    if character.isalpha():
        return "letter"
    return "digit" if character.isdigit() else {"-": "hyphen", ".": "dot"}.get(character, "other")


def character_baselines(
    tokenizer: "Tokenizer", counts: np.ndarray, training: Iterable["Corpus"] = ()
) -> CharacterBaselines | None:
    """Makes the baselines of an evaluation set; None where a token of the tokenizer is more than one character.

    Args:
        tokenizer: of the corpora.
        counts: `[V]`, how often the evaluation set has every token; 0 for special ones.
        training: the text that the n-gram model is of; none: no model. There is none either for more than 256 tokens.
    """
    kinds = character_kinds(tokenizer)
    if kinds is None:
        return None
    of_kind = np.where(kinds == np.arange(len(KINDS))[:, None], counts, 0)
    most_frequent = np.where(of_kind.any(1), of_kind.argmax(1), -1)
    training = list(training) if tokenizer.vocab_size <= MAX_CHARACTERS else []
    order = max(NGRAMS.values())
    ngrams = NGramModel.train(training, order, tokenizer.special_ids, tokenizer.vocab_size) if training else None
    return CharacterBaselines(kinds, most_frequent, ngrams)
