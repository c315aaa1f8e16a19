"""What a tokenizer is made of (`describe_tokenizer`), and how well it suits text (`measure_tokenizer`)."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from typing import Any

from torchrecipes.data.sources.records import Document
from torchrecipes.data.tokenizers.tokenizer import Tokenizer, one_thread
from torchrecipes.data.tokenizers.tokenizer_files import PADDING, ROLES

# Of a round trip: blanks, line ends, letter case, accents, other scripts, digits, code.
SAMPLES = (
    "Hello, world!",
    "  two  blanks,\ta tab\nand a line ",
    "Müller café naïve ﬁne",
    "日本語 русский العربية हिन्दी",
    "🙂👩‍👩‍👧",
    "3.14159 1,000,000",
    "def f(x):\n    return {'a': x**2}  # ok",
)
LETTERS = re.compile(r"[^\W\d_]+")
MOST_WORDS = 1 << 20  # that are counted at a time
BATCH = 1 << 18  # characters that are encoded at a time


def describe_tokenizer(tokenizer: Tokenizer, examples: int = 10) -> dict[str, Any]:
    """Describes a tokenizer by itself, as JSON values.

    Returns:
        kind: BPE, WordPiece, Unigram or WordLevel.
        normalizer, pre_tokenizer, post_processor, decoder: their types, or None.
        vocab_size, padding: total ids, and how many of them are vocabulary padding.
        special_tokens: id, name and roles of each; vocabulary padding is left out.
        added_tokens: number of further tokens that are found in the text before anything else.
        holes: ids below the largest that no token has.
        longest: the tokens with the longest texts.
        not_restored: sample texts that decoding does not give back, with what it gives.
        fingerprint, chat_template (whether there is one).
    """
    content = json.loads(tokenizer.backend.to_str())
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    roles: dict[int, list[str]] = {}
    for role in ROLES:
        if (token := getattr(tokenizer, f"{role}_id")) is not None:
            roles.setdefault(token, []).append(role)
    added = tokenizer.backend.get_added_tokens_decoder()
    special = {i: token.content for i, token in sorted(added.items()) if token.special}
    texts = {i: tokenizer.decode_token(i) for i in vocabulary.values() if i not in added}
    longest = sorted(texts.items(), key=lambda item: (-len(item[1]), item[0]))[:examples]
    parts = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    return {
        "kind": content["model"]["type"],
        **{part: content[part] and content[part]["type"] for part in parts},
        "vocab_size": tokenizer.vocab_size,
        "padding": sum(bool(PADDING.fullmatch(name)) for name in special.values()),
        "special_tokens": [
            {"id": i, "name": name, "roles": roles.get(i, [])}
            for i, name in special.items()
            if not PADDING.fullmatch(name)
        ],
        "added_tokens": sum(not token.special for token in added.values()),
        "holes": sorted(set(range(max(vocabulary.values()) + 1)) - set(vocabulary.values())),
        "longest": [{"id": i, "text": text} for i, text in longest],
        "not_restored": [
            {"text": text, "decoded": decoded} for text in SAMPLES if (decoded := _round_trip(tokenizer, text)) != text
        ],
        "fingerprint": tokenizer.fingerprint,
        "chat_template": tokenizer.chat_template is not None or "chat_template" in tokenizer.config,
    }


def measure_tokenizer(
    tokenizer: Tokenizer, documents: Iterable[Document], limit: int | None = None, examples: int = 20
) -> dict[str, Any]:
    """Measures a tokenizer on text, without the special tokens around a document.

    Args:
        tokenizer: any.
        documents: the text; read once.
        limit: documents that are read at most.
        examples: of split words, and of characters that are unknown.

    Returns:
        documents, words (between white space), characters, bytes, tokens: counts.
        tokens_per_word (fertility), tokens_per_byte, bytes_per_token: NaN without text.
        unknown_share: of the tokens. unknown_characters: the most frequent ones that are not in the vocabulary.
        vocabulary_used: share of the vocabulary, without padding and special tokens, that occurs.
        restored_share: of the documents that decoding gives back exactly.
        split_words: the words (of letters) that take most tokens beyond their first: word, count, and their tokens.
    """
    backend = tokenizer.text_backend
    words: Counter[str] = Counter()
    used: set[int] = set()
    unknown_characters: Counter[str] = Counter()
    totals = dict.fromkeys(("documents", "words", "characters", "bytes", "tokens", "unknown", "restored"), 0)
    for texts in _batches(islice(documents, limit)):
        with one_thread():
            encodings = backend.encode_batch(texts, add_special_tokens=False)
        for text, encoding in zip(texts, encodings, strict=True):
            words.update(LETTERS.findall(text))
            used.update(encoding.ids)
            totals["documents"] += 1
            totals["words"] += len(text.split())
            totals["characters"] += len(text)
            totals["bytes"] += len(text.encode())
            totals["tokens"] += len(encoding.ids)
            totals["restored"] += backend.decode(encoding.ids, skip_special_tokens=False) == text
            for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
                if token == tokenizer.unknown_id:
                    totals["unknown"] += 1
                    unknown_characters.update(set(text[start:end]))
        if len(words) > MOST_WORDS:  # rare ones go: they are not among the examples
            words = Counter(dict(words.most_common(MOST_WORDS // 2)))
    ordinary = tokenizer.unpadded_vocab_size - sum(i < tokenizer.unpadded_vocab_size for i in tokenizer.special_ids)
    return {
        **{key: totals[key] for key in ("documents", "words", "characters", "bytes", "tokens")},
        "tokens_per_word": _ratio(totals["tokens"], totals["words"]),
        "tokens_per_byte": _ratio(totals["tokens"], totals["bytes"]),
        "bytes_per_token": _ratio(totals["bytes"], totals["tokens"]),
        "unknown_share": _ratio(totals["unknown"], totals["tokens"]),
        "unknown_characters": [character for character, _ in _known_last(tokenizer, unknown_characters)[:examples]],
        "vocabulary_used": _ratio(len(used - set(tokenizer.special_ids)), ordinary),
        "restored_share": _ratio(totals["restored"], totals["documents"]),
        "split_words": _split_words(tokenizer, words, examples),
    }


def _ratio(a: int, b: int) -> float:
    return a / b if b else float("nan")


def _batches(documents: Iterable[Document]) -> Iterable[list[str]]:
    texts, characters = [], 0
    for document in documents:
        texts.append(document.text)
        characters += len(document.text)
        if characters >= BATCH:
            yield texts
            texts, characters = [], 0
    if texts:
        yield texts


def _round_trip(tokenizer: Tokenizer, text: str) -> str:
    backend = tokenizer.text_backend
    return backend.decode(backend.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)


def _known_last(tokenizer: Tokenizer, characters: Counter[str]) -> list[tuple[str, int]]:
    """Characters of unknown tokens by their number; those that are unknown by themselves come first."""
    alone = {c for c in characters if tokenizer.unknown_id in tokenizer.text_backend.encode(c).ids}
    return sorted(characters.items(), key=lambda item: (item[0] not in alone, -item[1], item[0]))


def _split_words(tokenizer: Tokenizer, words: Counter[str], examples: int) -> list[dict[str, Any]]:
    backend, found = tokenizer.text_backend, []
    frequent = words.most_common(MOST_WORDS // 8)
    before = " " if len(backend.encode(" a", add_special_tokens=False).ids) == 1 else ""  # a word has its blank with it
    with one_thread():
        encodings = backend.encode_batch([before + word for word, _ in frequent], add_special_tokens=False)
    for (word, count), encoding in zip(frequent, encodings, strict=True):
        if len(encoding.ids) > 1:
            found.append((count * (len(encoding.ids) - 1), word, count, encoding.tokens))
    found.sort(key=lambda item: (-item[0], item[1]))
    return [{"word": word, "count": count, "tokens": tokens} for _, word, count, tokens in found[:examples]]
