"""Domain names: parsing, public suffixes, sources, their tokenizer and what a corpus holds of them.

public_suffix_list  `PublicSuffixList`: where the public suffix of a name starts
parsing             `parse_name` and `parse_lines`: from lines to normalized names, or the reason why there is none
name_files          `domain_names`: names in files
made_names          `synthetic_names`: names made by a generator
tokenizer           `domain_tokenizer`: 43 tokens and the most frequent public suffixes
encoding            `DomainEncoding`: tokens, suffix ids and token types of names
"""

from torchrecipes.data.domains.encoding import DomainEncoding
from torchrecipes.data.domains.made_names import synthetic_names
from torchrecipes.data.domains.name_files import NameBlock, count_names, domain_names
from torchrecipes.data.domains.parsing import (
    REASONS,
    NameOptions,
    ParsedNames,
    Rejected,
    RejectedLines,
    name_hashes,
    parse_lines,
    parse_name,
)
from torchrecipes.data.domains.public_suffix_list import PublicSuffixList
from torchrecipes.data.domains.tokenizer import domain_tokenizer

__all__ = [
    "REASONS",
    "DomainEncoding",
    "NameBlock",
    "NameOptions",
    "ParsedNames",
    "PublicSuffixList",
    "Rejected",
    "RejectedLines",
    "count_names",
    "domain_names",
    "domain_tokenizer",
    "name_hashes",
    "parse_lines",
    "parse_name",
    "synthetic_names",
]
