"""Tokens of many texts at once, for inference."""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from torchrecipes.data.examples.encode import ExampleEncoder
from torchrecipes.data.examples.example import Example


class TextTokens(NamedTuple):
    """Tokens of n texts, one text after the other.

    Attributes:
        tokens: int64, 1-D.
        lengths: `[n]` int64, at least 1.
        is_empty: `[n]` bool: texts without a token of their own.
        is_truncated: `[n]` bool: texts whose ends were cut off.
        token_type_ids: int64, of the tokens, see `Tokenizer.token_type_ids`. None: all are 0.
        reasons: why a text is no valid domain name, by its place (`torchrecipes.data.domains.REASONS`); its tokens are
            those of the text as it is written. None: the tokenizer is not one of domain names.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    is_empty: np.ndarray
    is_truncated: np.ndarray
    token_type_ids: np.ndarray | None = None
    reasons: dict[int, str] | None = None


def tokenize_texts(encoder: ExampleEncoder, texts: Sequence[str], pad_id: int) -> TextTokens:
    """The tokens of texts, with special tokens around them, cut to the encoder's `max_length`.

    Args:
        encoder: of one column.
        texts: with their prompts.
        pad_id: the only token of a text that has none, not even a special one.
    """
    if encoder.tokenizer.domain is not None and not any(encoder.prompts):
        return _tokenize_names(encoder, texts, pad_id)
    return _tokenize(encoder, texts, pad_id)


def _tokenize(encoder: ExampleEncoder, texts: Sequence[str], pad_id: int) -> TextTokens:
    tokenizer = encoder.tokenizer
    if tokenizer.domain is not None and tokenizer.special_tokens == "text":
        tokens, lengths, characters = tokenizer.domain.encode_texts(texts, encoder.max_length)
        types = tokenizer.token_type_ids(tokens, lengths)
        return TextTokens(tokens.astype(np.int64), lengths, characters == 0, characters + 2 > lengths, types)
    before, after = encoder.before, encoder.after
    room = encoder.max_length - len(before) - len(after)
    ids = [found.ids for found in encoder.backend.encode_batch_fast(texts, add_special_tokens=False)]
    num_tokens = np.fromiter(map(len, ids), np.int64, len(ids))
    tokens, lengths = flatten_ids([before + found[:room] + after or [pad_id] for found in ids])
    types = None if tokenizer.domain is None else tokenizer.token_type_ids(tokens, lengths)
    return TextTokens(tokens, lengths, num_tokens == 0, num_tokens > room, types)


def _tokenize_names(encoder: ExampleEncoder, names: Sequence[str], pad_id: int) -> TextTokens:
    """Domain names as `domain_names` reads them with `strip_url` and `underscore: accept`, many at a time."""
    from torchrecipes.data.domains import REASONS, NameOptions, parse_lines

    domain, lines = encoder.tokenizer.domain, "\n".join(names)
    if lines.count("\n") >= len(names):  # a text with a line end, such as a CSV's cell
        lines = "\n".join(name.replace("\n", " ") for name in names)
    options = NameOptions(strip_url=True, underscore="accept")
    # Without an end a last blank line would be none.
    parsed = parse_lines(lines.encode("utf-8", "surrogatepass") + b"\n", options, domain.suffix_list)
    own_tokens, own_lengths, columns = domain.encode(parsed)
    codes = list(REASONS)
    rejected = parsed.rejected_lines
    reasons = dict(zip(rejected.tolist(), (codes[code] for code in parsed.rejected_reasons), strict=True))
    others = _tokenize(encoder, [names[line] for line in reasons], pad_id)

    lengths = np.empty(len(names), np.int64)
    lengths[parsed.line_numbers], lengths[rejected] = own_lengths, others.lengths
    is_name = np.ones(len(names), bool)
    is_name[rejected] = False
    of_name = is_name.repeat(lengths)
    tokens = np.empty(len(of_name), np.int64)
    tokens[of_name], tokens[~of_name] = own_tokens, others.tokens
    types = np.empty(len(tokens), np.int64)
    types[of_name], types[~of_name] = domain.types_of_parsed(parsed, columns["suffix_ids"]), others.token_type_ids
    is_cut = lengths > encoder.max_length
    if is_cut.any():
        places = np.arange(len(tokens)) - (np.cumsum(lengths) - lengths).repeat(lengths)
        is_kept = (places < encoder.max_length - 1) | (places == lengths.repeat(lengths) - 1)
        tokens, types, lengths = tokens[is_kept], types[is_kept], np.minimum(lengths, encoder.max_length)
        is_of_cut = is_cut.repeat(lengths)  # as in training, their suffixes are those of what is left
        types[is_of_cut] = encoder.tokenizer.token_type_ids(tokens[is_of_cut], lengths[is_cut])
    is_empty = np.zeros(len(names), bool)
    is_cut[rejected], is_empty[rejected] = others.is_truncated, others.is_empty
    return TextTokens(tokens, lengths, is_empty, is_cut, types, reasons)


def tokenize_pairs(encoder: ExampleEncoder, pairs: Sequence[tuple[str, str]], pad_id: int) -> TextTokens:
    """The same of pairs of texts; one is empty where one of its texts is.

    Args:
        encoder: of two columns.
        pairs: the texts.
        pad_id: the only token of an empty pair.
    """
    encoded = encoder.encode([Example(tuple(pair)) for pair in pairs])
    lengths, seconds = np.ones((2, len(pairs)), np.int64)
    lengths[encoded.kept], seconds[encoded.kept] = encoded.text_lengths, encoded.second_starts
    tokens = np.full(lengths.sum(), pad_id, np.int64)
    tokens[np.repeat(encoded.kept, lengths)] = encoded.tokens
    is_truncated = np.zeros(len(pairs), bool)
    is_truncated[encoded.kept] = encoded.truncated
    types = encoder.tokenizer.token_type_ids(tokens, lengths, seconds)
    return TextTokens(tokens, lengths, ~encoded.kept, is_truncated, types)


def flatten_ids(ids: Sequence[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """The ids of all texts, one text after the other, and their number in each: int64, `[N]` and `[n]`."""
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    return np.fromiter(chain.from_iterable(ids), np.int64, int(lengths.sum())), lengths


def utf8_lengths(texts: Sequence[str]) -> np.ndarray:
    """Bytes of each text, `[n]` int64."""
    # Only text that is not ASCII has to be encoded.
    return np.fromiter(
        (len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass")) for text in texts),
        np.int64,
        len(texts),
    )
