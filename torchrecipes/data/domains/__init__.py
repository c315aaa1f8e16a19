"""Domain names: parsing, their tokenizer and what a corpus holds of them.

tokenizer   `domain_tokenizer`: 43 tokens and the most frequent public suffixes
encoding    `DomainEncoding`: tokens, suffix ids and token types of names
"""

from torchrecipes.data.domains.encoding import DomainEncoding
from torchrecipes.data.domains.tokenizer import domain_tokenizer

__all__ = ["DomainEncoding", "domain_tokenizer"]
