"""Adds tokens to a tokenizer; those that it has keep their ids.

1. `extend_tokenizer` adds tokens that somebody chose. They are found in the text before anything else is.
2. `learn_tokens` finds tokens in text that the tokenizer splits too finely, and makes them part of its model: BPE is
   trained further from where it ended (each new token joins two), WordPiece and Unigram get whole words.
3. Both say which pieces every new token was until now: the rows of a model's embedding for it are made of theirs.

The new ids follow the largest one. Vocabulary padding at the end is not in the way: it moves.
"""

import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import tokenizers
from tokenizers import AddedToken

from torchrecipes.data.progress import Progress, waiting_for
from torchrecipes.data.sources.records import Source, require_documents
from torchrecipes.data.tokenizers.tokenizer import Tokenizer, make_tokenizer, one_thread
from torchrecipes.data.tokenizers.tokenizer_files import PADDING, ROLES
from torchrecipes.errors import UserError

LOWEST_SCORE = -1e6  # of names in a Unigram model that no text may give
MARGIN = 1e-3  # by which a new Unigram piece is better than the pieces it replaces


@dataclass(frozen=True)
class Extension:
    """A tokenizer with new tokens.

    Attributes:
        tokenizer: the new one.
        first_id: of the new tokens, which follow each other.
        names: of the new tokens, as the tokenizer's model writes them.
        pieces: for each new token, the ids that its text had until now; without the unknown one, so it may be empty.
    """

    tokenizer: Tokenizer
    first_id: int
    names: list[str]
    pieces: list[list[int]]


def extend_tokenizer(
    tokenizer: Tokenizer, tokens: Sequence[str], special: bool = False, pad_vocab_to_multiple_of: int = 1
) -> Extension:
    """Adds tokens, as `add_tokens` of `transformers` does.

    A token of letters and digits is found as a whole word only; any other one wherever its characters stand. In a
    tokenizer whose words begin with their blank (byte-level BPE) the blank before such a word is a token of its own.

    Args:
        tokenizer: is not changed.
        tokens: texts; those that are tokens already are left out.
        special: in documents, the texts stay text; in prompts they are the tokens.
        pad_vocab_to_multiple_of: the new vocabulary is padded to a multiple of this.

    Raises:
        UserError: a token is blank (code `blank_token`), all of them are there already (`nothing_to_add`), or the
            vocabulary has holes that they would fill (`holes`).
    """
    if blank := [token for token in tokens if not token.strip()]:
        hint = "Leave it out: the tokenizer splits at white space itself."
        raise UserError(f"{blank[0]!r} is blank", hint=hint, code="blank_token")
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    new = [token for token in dict.fromkeys(tokens) if token not in vocabulary]
    if not new:
        raise _nothing(f"all of {', '.join(map(repr, tokens[:5]))} are tokens already")
    content = _content(tokenizer)
    for i, token in enumerate(new, start=tokenizer.unpadded_vocab_size):
        kind = {"special": special, "normalized": not special, "single_word": not special and token.isalnum()}
        content["added_tokens"].append({"id": i, "content": token, "lstrip": False, "rstrip": False, **kind})
    pieces = [_pieces(tokenizer, token) for token in new]
    return _extension(tokenizer, content, new, pieces, pad_vocab_to_multiple_of)


def learn_tokens(tokenizer: Tokenizer, source: Source, count: int, pad_vocab_to_multiple_of: int = 1) -> Extension:
    """Adds tokens for what is frequent in a source and takes many tokens.

    BPE: the most frequent pair of tokens within a word becomes a token, again and again (Sennrich et al. 2016, on the
    words as the tokenizer splits them). WordPiece and Unigram: the words that save most tokens.

    Args:
        tokenizer: is not changed.
        source: the documents; read once.
        count: tokens to add; fewer where the text does not give as many.
        pad_vocab_to_multiple_of: as for `extend_tokenizer`.

    Raises:
        UserError: no documents; a tokenizer of another kind, or of characters (code `unsupported_tokenizer`); nothing
            to add (`nothing_to_add`).
    """
    content = _content(tokenizer)
    model = content["model"]
    if model["type"] not in ("BPE", "WordPiece", "Unigram") or tokenizer.backend.pre_tokenizer is None:
        kind = "of characters" if model["type"] == "BPE" else f"of the kind {model['type']}"
        hint = "Give the tokens yourself (--tokens)."
        raise UserError(f"a tokenizer {kind} does not learn tokens from text", hint=hint, code="unsupported_tokenizer")
    words = _count_words(tokenizer, source)
    with waiting_for("choosing tokens"):
        if model["type"] == "BPE":
            names, pieces = _learn_merges(tokenizer, model, words, count)
        else:
            names, pieces = _choose_words(tokenizer, words, count)
    if not names:
        raise _nothing("nothing in this text is frequent and split into several tokens")
    _into_model(content, tokenizer.unpadded_vocab_size, names, pieces)
    return _extension(tokenizer, content, names, pieces, pad_vocab_to_multiple_of)


def _nothing(problem: str) -> UserError:
    return UserError(problem, hint="Give other tokens or other text.", code="nothing_to_add")


def _content(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer as JSON, without vocabulary padding at its end."""
    if tokenizer.domain is not None:
        problem, hint = "a tokenizer of domain names has the tokens that it has", "Leave it as it is."
        raise UserError(problem, hint=hint, code="unsupported_tokenizer")
    content = json.loads(tokenizer.backend.to_str())
    content["added_tokens"] = [
        token
        for token in content["added_tokens"]
        if token["id"] < tokenizer.unpadded_vocab_size or not PADDING.fullmatch(token["content"])
    ]
    return content


def _extension(
    tokenizer: Tokenizer, content: dict[str, Any], names: list[str], pieces: list[list[int]], multiple: int
) -> Extension:
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    decoder = tokenizer.backend.get_added_tokens_decoder()
    ids = {role: getattr(tokenizer, f"{role}_id") for role in ROLES}
    roles: dict[str, AddedToken] = {role: decoder[i] for role, i in ids.items() if i is not None}
    made = make_tokenizer(backend, roles, multiple, special_tokens=tokenizer.special_tokens)
    first = tokenizer.unpadded_vocab_size
    after = made.backend.get_vocab(with_added_tokens=True)
    expected = {
        name: i
        for name, i in tokenizer.backend.get_vocab(with_added_tokens=True).items()
        if i < first or not PADDING.fullmatch(name)
    }
    expected |= {name: first + number for number, name in enumerate(names)}
    if moved := [name for name, i in expected.items() if after.get(name) != i]:
        raise UserError(
            f"{moved[0]!r} would get the id {after.get(moved[0])}, not {expected[moved[0]]}: the vocabulary has holes, "
            "which `tokenizers` fills when it numbers added tokens",
            hint="Give these ids to tokens first: tune-style tokenizer inspect lists them.",
            code="holes",
        )
    made = replace(made, config=tokenizer.config, chat_template=tokenizer.chat_template)
    return Extension(made, first, names, pieces)


def _pieces(tokenizer: Tokenizer, text: str) -> list[int]:
    ids = tokenizer.text_backend.encode(text, add_special_tokens=False).ids
    return [i for i in ids if i != tokenizer.unknown_id]


def _count_words(tokenizer: Tokenizer, source: Source) -> Counter[str]:
    """Counts the words of a source as the tokenizer's model gets them."""
    words: Counter[str] = Counter()
    backend, progress = tokenizer.backend, Progress("counting words", source.num_bytes)
    try:
        with one_thread():
            for document in source:
                progress.add(1, len(document.text.encode()))
                text = backend.normalizer.normalize_str(document.text) if backend.normalizer else document.text
                words.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text))
    finally:
        progress.close()
    require_documents(source, source.report)
    return words


def _learn_merges(
    tokenizer: Tokenizer, model: dict[str, Any], words: Counter[str], count: int
) -> tuple[list[str], list[list[int]]]:
    """Continues the training of BPE: joins the most frequent pair of tokens until there are `count` new ones."""
    engine = tokenizers.models.BPE(
        model["vocab"], [tuple(pair) for pair in model["merges"]], unk_token=model["unk_token"]
    )
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    split = [([token.value for token in engine.tokenize(word)], number) for word, number in words.items()]
    split = [(tokens, number) for tokens, number in split if len(tokens) > 1 and model["unk_token"] not in tokens]
    counts: Counter[tuple[str, str]] = Counter()
    where: dict[tuple[str, str], set[int]] = defaultdict(set)
    for index, (tokens, number) in enumerate(split):
        for pair in pairwise(tokens):
            counts[pair] += number
            where[pair].add(index)
    names: list[str] = []
    pieces: dict[str, list[int]] = {}
    heap = [(-number, pair) for pair, number in counts.items()]
    heapq.heapify(heap)
    while len(names) < count and heap:
        number, pair = heapq.heappop(heap)
        if number > -2:
            break
        name = "".join(pair)
        # A count that has changed is in the heap again. A name that is a token is joined from other parts.
        if counts[pair] != -number or name in vocabulary or name in pieces:
            continue
        names.append(name)
        pieces[name] = [i for part in pair for i in pieces.get(part, [vocabulary.get(part)])]
        model["merges"].append(list(pair))
        for index in list(where[pair]):
            tokens, number = split[index]
            joined = _join(tokens, pair, name)
            split[index] = (joined, number)
            changed = set()
            for sign, sequence in ((-1, tokens), (1, joined)):
                for other in pairwise(sequence):
                    counts[other] += sign * number
                    where[other].add(index)
                    changed.add(other)
            for other in changed:
                heapq.heappush(heap, (-counts[other], other))
    return names, [pieces[name] for name in names]


def _join(tokens: list[str], pair: tuple[str, str], name: str) -> list[str]:
    joined: list[str] = []
    i = 0
    while i < len(tokens):
        found = tuple(tokens[i : i + 2]) == pair
        joined.append(name if found else tokens[i])
        i += 1 + found
    return joined


def _choose_words(tokenizer: Tokenizer, words: Counter[str], count: int) -> tuple[list[str], list[list[int]]]:
    """The words whose tokens would be saved most often."""
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    saved: list[tuple[int, str, list[int]]] = []
    for word, number in words.items():
        if number < 2 or word in vocabulary:
            continue
        ids = [token.id for token in tokenizer.backend.model.tokenize(word)]
        known = [i for i in ids if i != tokenizer.unk_id]
        if len(ids) > 1 and known == ids:
            saved.append((number * (len(ids) - 1), word, ids))
    saved.sort(key=lambda item: (-item[0], item[1]))
    return [word for _, word, _ in saved[:count]], [ids for _, _, ids in saved[:count]]


def _into_model(content: dict[str, Any], first: int, names: list[str], pieces: list[list[int]]) -> None:
    """Puts tokens into the vocabulary of the model.

    So are the added tokens before them: `tokenizers` numbers those that the model does not have by counting.
    """
    vocab, added = content["model"]["vocab"], {token["id"]: token["content"] for token in content["added_tokens"]}
    if content["model"]["type"] == "Unigram":
        for i in range(len(vocab), first):
            vocab.append([added.get(i, f"unused {i}"), LOWEST_SCORE])
        scores = [score for _, score in vocab]
        vocab += [[name, sum(scores[i] for i in ids) + MARGIN] for name, ids in zip(names, pieces, strict=True)]
        return
    vocab.update({name: i for i, name in added.items()})
    vocab.update({name: first + number for number, name in enumerate(names)})
