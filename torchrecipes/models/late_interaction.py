"""`LateInteraction`: settings of a model that gives a vector for every token, as ColBERT."""

import string
from dataclasses import dataclass


@dataclass
class LateInteraction:
    """A vector for every token, compared by MaxSim (ColBERT: Khattab and Zaharia, 2020, arXiv:2004.12832).

    A marker is a token of the tokenizer, after the first token of a text: it says what the text is. The tokenizer of
    BERT has `[unused0]` and `[unused1]` for this.
    """

    query_length: int = 32  # tokens of a query; what is longer is cut
    document_length: int = 180  # tokens of a document; what is longer is cut
    expand_queries: bool = True  # shorter queries are filled up with [MASK] tokens, whose vectors count as well
    query_marker: str | None = None  # as in [unused0]; None: none
    document_marker: str | None = None  # as in [unused1]
    skip: str = string.punctuation  # characters that are no vectors of a document
    size: int = 128  # numbers in a vector, by a linear layer
