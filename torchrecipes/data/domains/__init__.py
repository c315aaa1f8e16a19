"""Domain names: parsing, public suffixes, sources, their tokenizer, what a corpus holds of them, look-alikes.

public_suffix_list  `PublicSuffixList`: where the public suffix of a name starts
suffix_table        the same for many names at a time
name_syntax         `parse_name`: from a line to a normalized name, or the reason why there is none
line_parsing        `parse_lines`: the same for many lines at a time
hashing             `name_hashes`
name_files          `domain_names`: names in files
made_names          `synthetic_names`: names made by a generator
tokenizer           `domain_tokenizer`: 43 tokens and the most frequent public suffixes
encoding            `DomainEncoding`: tokens, suffix ids and token types of names
suffix_keys         suffixes as 64-bit keys, and the place of each in a list
suffix_counts       `count_suffixes`: names by public suffix
name_split          `NameSplit`: which names are held out
split_report        `report_split`: how the names of a corpus are divided
lookalike_names     `lookalikes`: names that pass for another one
lookalike_examples  `LookalikeCollator`, `domain_texts`, `lookalike_pairs`: look-alikes to train on and to search with
collator            `DomainCollator`: masked characters and hidden suffixes
names_in_rows       where the names of rows are, and their token types
"""

from typing import TYPE_CHECKING, Any

from torchrecipes.data.domains.encoding import DomainEncoding
from torchrecipes.data.domains.hashing import name_hashes
from torchrecipes.data.domains.line_parsing import ParsedNames, RejectedLines, parse_lines
from torchrecipes.data.domains.lookalike_examples import LookalikeCollator, domain_texts, lookalike_pairs
from torchrecipes.data.domains.lookalike_names import Lookalike, lookalikes
from torchrecipes.data.domains.made_names import synthetic_names
from torchrecipes.data.domains.name_files import NameBlock, count_names, domain_names
from torchrecipes.data.domains.name_split import NameSplit
from torchrecipes.data.domains.name_syntax import REASONS, NameOptions, Rejected, parse_name
from torchrecipes.data.domains.public_suffix_list import PublicSuffixList
from torchrecipes.data.domains.split_report import SplitReport, report_split
from torchrecipes.data.domains.suffix_counts import SuffixCounts, count_suffixes
from torchrecipes.data.domains.tokenizer import domain_tokenizer

if TYPE_CHECKING:
    from torchrecipes.data.domains.collator import DomainCollator

__all__ = [
    "REASONS",
    "DomainCollator",
    "DomainEncoding",
    "Lookalike",
    "LookalikeCollator",
    "NameBlock",
    "NameOptions",
    "NameSplit",
    "ParsedNames",
    "PublicSuffixList",
    "Rejected",
    "RejectedLines",
    "SplitReport",
    "SuffixCounts",
    "count_names",
    "count_suffixes",
    "domain_names",
    "domain_texts",
    "domain_tokenizer",
    "lookalike_pairs",
    "lookalikes",
    "name_hashes",
    "parse_lines",
    "parse_name",
    "report_split",
    "synthetic_names",
]


def __getattr__(name: str) -> Any:
    # Imported when it is used: batches need torch, which takes seconds, and what prepares a corpus does without.
    if name == "DomainCollator":
        from torchrecipes.data.domains.collator import DomainCollator

        return DomainCollator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
