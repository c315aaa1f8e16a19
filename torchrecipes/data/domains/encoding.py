"""`DomainEncoding`: the tokens of domain names, and what is known of a name beside them.

| id | token |
|---|---|
| 0 .. 4 | `[PAD]` `[UNK]` `[CLS]` `[SEP]` `[MASK]` |
| 5 .. 30 | `a` .. `z` |
| 31 .. 40 | `0` .. `9` |
| 41 | `-` |
| 42 | `.` |

These are all characters that a host name may have (RFC 1123, section 2.1), in lower case; any other one is `[UNK]`. A
name is `[CLS] name [SEP]`. A public suffix (`com`, `co.uk`) has an id, too: 0 stands for all that are not in the list
of the most frequent ones. The rules of the Public Suffix List travel with the list, so that a name has the same suffix
wherever and whenever the tokenizer is loaded.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from torchrecipes.data.domains.line_parsing import ParsedNames
from torchrecipes.data.domains.public_suffix_list import PublicSuffixList
from torchrecipes.data.domains.suffix_keys import KeyTable, key_of, suffix_keys
from torchrecipes.data.tokenizers.tokenizer_files import DOMAIN_SUFFIXES

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789-."
VOCABULARY = (*SPECIAL, *CHARACTERS)
PAD, UNK, CLS, SEP, MASK = range(5)
DOT = VOCABULARY.index(".")

KINDS = ("label", "subdomain", "suffix", "dot")  # of a character, by number: see `DomainEncoding.token_type_ids`
NUM_KINDS = len(KINDS)
LABEL, SUBDOMAIN, SUFFIX, SEPARATOR = range(NUM_KINDS)

RULES_KEY = "public_suffix_rules"  # in tokenizer_config.json

NAMES_AT_A_TIME = 16384  # that are encoded: all arrays stay in the cache

# In a name, an unknown or masked character is one that no suffix has.
CHARACTER_OF = np.frombuffer(b"\0_\0\0?" + CHARACTERS.encode(), np.uint8)
TOKEN_OF = np.full(256, UNK, np.uint8)
TOKEN_OF[np.frombuffer(CHARACTERS.encode(), np.uint8)] = np.arange(len(SPECIAL), len(VOCABULARY))
IN_NAME = np.ones(len(VOCABULARY), bool)
IN_NAME[[PAD, CLS, SEP]] = False


class DomainEncoding:
    """Tokens, suffix ids and token types of domain names.

    Args:
        suffixes: public suffixes in lower-case ASCII; the first has id 1.
        suffix_list: the rules by which a name has its suffix.

    Attributes:
        suffixes, suffix_list: the arguments.
    """

    def __init__(self, suffixes: Sequence[str], suffix_list: PublicSuffixList):
        self.suffixes, self.suffix_list = list(suffixes), suffix_list
        self._table = KeyTable(np.array([key_of(suffix) for suffix in self.suffixes], np.uint64))

    def __reduce__(self) -> tuple:
        return DomainEncoding.from_config, (self.config,)

    @property
    def config(self) -> dict[str, Any]:
        """The keys of `tokenizer_config.json` from which `from_config` makes this again."""
        return {DOMAIN_SUFFIXES: " ".join(self.suffixes), RULES_KEY: " ".join(self.suffix_list.text.split("\n"))}

    @property
    def num_token_types(self) -> int:
        """Different values of `token_type_ids`."""
        return NUM_KINDS * (len(self.suffixes) + 1)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "DomainEncoding":
        """The encoding that the keys of a `tokenizer_config.json` describe."""
        rules = "\n".join(config[RULES_KEY].split())
        return cls(config[DOMAIN_SUFFIXES].split(), PublicSuffixList(text=rules))

    def suffix_starts(self, characters: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The characters of every name before its public suffix: int64 `[D]`, see `PublicSuffixList.suffix_starts`."""
        return self.suffix_list.suffix_starts(characters, lengths)

    def suffix_ids(self, characters: np.ndarray, lengths: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """The id of every name's public suffix, 0 where it is not in `suffixes`: uint16 `[D]`.

        Args:
            characters: uint8 `[C]`, of the names, one after the other.
            lengths: int64 `[D]`, characters of each name.
            starts: int64 `[D]`, characters of each name before its suffix.
        """
        keys = suffix_keys(characters, np.cumsum(lengths), lengths - starts)
        return (self._table.find(keys) + 1).astype(np.uint16)

    def encode(self, parsed: ParsedNames) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Turns names into documents.

        Args:
            parsed: the names.

        Returns:
            The tokens of all documents, uint8 `[N]`; the tokens of each, int64 `[D]`; and what a corpus holds of each:
            `suffix_ids` uint16 `[D]` and `suffix_starts` uint8 `[D]`, tokens before the first one of the suffix.
        """
        lengths, characters = parsed.lengths + 2, parsed.characters
        ends = np.cumsum(lengths)
        tokens = np.empty(len(characters) + 2 * len(lengths), np.uint8)
        ids = np.empty(len(lengths), np.uint16)
        for first in range(0, len(lengths), NAMES_AT_A_TIME):
            these = slice(first, first + NAMES_AT_A_TIME)
            stops = ends[these]
            start, stop = int(stops[0] - lengths[first]), int(stops[-1])
            own = characters[start - 2 * first : stop - 2 * (first + len(stops))]
            ids[these] = self.suffix_ids(own, parsed.lengths[these], parsed.suffix_starts[these])
            _between(tokens_of(own), stops - start, lengths[these], tokens[start:stop])
        return tokens, lengths, {"suffix_ids": ids, "suffix_starts": (parsed.suffix_starts + 1).astype(np.uint8)}

    def encode_texts(self, texts: Sequence[str], max_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The tokens of any texts, as the tokenizer's `encode` gives them, at once; names need not be parsed before.

        Args:
            texts: T of them.
            max_length: most tokens of a text with `[CLS]` and `[SEP]`; its end is cut off.

        Returns:
            The tokens of all texts, uint8 `[N]`; the tokens of each, int64 `[T]`; and its characters, int64 `[T]`.
        """
        lowered = [text.lower() for text in texts]
        characters = np.fromiter(map(len, lowered), np.int64, len(lowered))
        joined = "".join(lowered)
        if joined.isascii():
            content = TOKEN_OF[np.frombuffer(joined.encode(), np.uint8)]
        else:
            content = TOKEN_OF[np.minimum(np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32), 255)]
        kept = np.minimum(characters, max_length - 2)
        if (kept < characters).any():
            pieces = np.stack([kept, characters - kept], axis=1).ravel()
            content = content[np.tile([True, False], len(texts)).repeat(pieces)]
        tokens = np.empty(len(content) + 2 * len(texts), np.uint8)
        _between(content, np.cumsum(kept + 2), kept + 2, tokens)
        return tokens, kept + 2, characters

    def types_of_parsed(self, parsed: ParsedNames, suffix_ids: np.ndarray) -> np.ndarray:
        """`token_type_ids` of what `encode` makes of names, without searching for their suffixes again.

        Args:
            parsed: the names.
            suffix_ids: `[D]`, theirs, as `encode` gives them.

        Returns:
            int64 `[N]`.
        """
        lengths = parsed.lengths + 2
        ends = np.cumsum(lengths)
        types = (NUM_KINDS * suffix_ids.astype(np.int64)).repeat(lengths)
        is_character = np.ones(len(types), bool)
        is_character[ends - 1] = is_character[ends - lengths] = False
        types[is_character] += character_kinds(parsed.characters, parsed.lengths, parsed.suffix_starts)
        return types

    def columns(self, tokens: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
        """What a corpus holds of documents beside their tokens, as `encode` gives it.

        Args:
            tokens: `[N]`, of documents `[CLS] name [SEP]`, one after the other.
            lengths: int64 `[D]`, tokens of each.
        """
        _, _, starts, ids = self._split(tokens, lengths)
        return {"suffix_ids": ids, "suffix_starts": np.minimum(starts + (lengths > 0), 255).astype(np.uint8)}

    def _split(self, tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The names in texts: which tokens are theirs `[N]`, and of each name its length, suffix's start and id."""
        inside = IN_NAME[tokens]
        sizes = np.diff(np.concatenate([[0], np.cumsum(inside)])[np.cumsum(lengths)], prepend=0)
        characters, starts, ids = CHARACTER_OF[tokens[inside]], np.zeros_like(sizes), np.zeros(len(sizes), np.uint16)
        named = np.flatnonzero(sizes)
        if len(named):
            starts[named] = self.suffix_starts(characters, sizes[named])
            ids = self.suffix_ids(characters, sizes, starts)
        return inside, sizes, starts, ids

    def token_type_ids(
        self, tokens: np.ndarray, lengths: np.ndarray, second_starts: np.ndarray | None = None
    ) -> np.ndarray:
        """The token types that a model of domain names takes: 4 * suffix id + kind.

        Kinds: 0 the label before the suffix (and special tokens), 1 subdomains, 2 the suffix with the dots inside it, 3
        other dots. The suffix id is that of the name, on all its tokens; 0 where a character of the suffix is `[MASK]`.

        Args:
            tokens: `[N]`, of the texts, one after the other; a text is `[CLS] name [SEP]`, or that and `name [SEP]`.
            lengths: `[T]`, tokens of each text.
            second_starts: `[T]`, where the second name begins in its text; the text's length where there is none.

        Returns:
            int64 `[N]`.
        """
        tokens, lengths = np.asarray(tokens), np.asarray(lengths, np.int64)
        if second_starts is not None:
            lengths = np.stack([second_starts, lengths - second_starts], axis=1).ravel()
        inside, sizes, starts, ids = self._split(tokens, lengths)
        types = (NUM_KINDS * ids.astype(np.int64)).repeat(lengths)
        types[inside] += character_kinds(CHARACTER_OF[tokens[inside]], sizes, starts)
        return types


def _between(content: np.ndarray, ends: np.ndarray, lengths: np.ndarray, tokens: np.ndarray) -> None:
    """Writes documents, of these lengths and up to these ends, to `tokens`: `content` between `[CLS]` and `[SEP]`."""
    is_content = np.ones(len(tokens), bool)
    is_content[ends - lengths] = is_content[ends - 1] = False
    tokens.fill(SEP)
    tokens[ends - lengths] = CLS
    tokens[is_content] = content


def tokens_of(characters: np.ndarray) -> np.ndarray:
    """The tokens of lower-case letters, digits, hyphens, dots and underscores in ASCII: uint8, as `characters`."""
    # Sums and comparisons of bytes are several times as fast as a table, whose indices are of 8 bytes.
    tokens = characters - np.uint8(ord("a") - 5)
    tokens += (characters < ord("a")).view(np.uint8) * np.uint8(31 - ord("0") + ord("a") - 5)
    tokens += (characters < ord("0")).view(np.uint8) * np.uint8(41 - ord("-") + ord("0") - 31)
    tokens[characters == ord("_")] = UNK
    return tokens


def character_kinds(characters: np.ndarray, lengths: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The kind of every character, the place of its name in `KINDS`: uint8 `[C]`.

    Args:
        characters: uint8 `[C]`, of the names, one after the other.
        lengths: int64 `[D]`, characters of each name.
        starts: int64 `[D]`, characters before the suffix of each name.
    """
    firsts = np.cumsum(lengths) - lengths
    is_dot = characters == ord(".")
    dots = np.flatnonzero(is_dot)
    # The label before the suffix begins after the last dot but the one before the suffix.
    before = dots.searchsorted(firsts + starts - 1)
    labels = np.maximum(firsts, np.concatenate([[0], dots + 1])[before]) - firsts
    has_label = starts > 0
    sizes = np.empty((len(lengths), NUM_KINDS), np.int64)
    sizes[:, 0] = labels * has_label
    sizes[:, 1] = (starts - 1 - labels) * has_label
    sizes[:, 2] = has_label
    sizes[:, 3] = lengths - starts
    order = np.array([SUBDOMAIN, LABEL, SEPARATOR, SUFFIX], np.uint8)
    kinds = np.tile(order, len(lengths)).repeat(sizes.ravel())
    kinds[is_dot & (kinds == SUBDOMAIN)] = SEPARATOR
    return kinds
