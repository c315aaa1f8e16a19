"""`Tokenizer`: ids of text, and special tokens by their role.

1. The vocabulary is padded to a multiple of `pad_vocab_to_multiple_of` with tokens `<|inert_0|>`, ... that no text
   contains and no model predicts: matrix products are faster if the embedding has a round number of rows. The padding
   is part of the saved tokenizer, so that a token added later, here or in `transformers`, gets an id after it.
2. A document is text and nothing else: a literal `[MASK]` or `</s>` in it is tokenized as characters (`encode`), unless
   `special_tokens` is "honor". In a prompt the names of special tokens are always the tokens (`encode_prompt`).
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
import xxhash
from tokenizers import AddedToken, Regex, pre_tokenizers

from torchrecipes.atomic_write import write_atomically
from torchrecipes.data.tokenizers.tokenizer_files import (
    CHAT_TEMPLATE,
    IDS_KEY,
    PADDING,
    ROLES,
    begin_with,
    between,
    ids_checksum,
)
from torchrecipes.errors import UserError

if TYPE_CHECKING:
    from torchrecipes.data.domains.encoding import DomainEncoding

SPECIAL_TOKENS = ("text", "honor")
IN_DOCUMENTS = "special_tokens_in_documents"  # key of tokenizer_config.json; others ignore it


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A `tokenizers.Tokenizer` whose special tokens are known by their role. Made by `load_tokenizer` and `train_*`.

    Attributes:
        backend: as `AutoTokenizer` uses it: the names of special tokens in a text are the tokens themselves.
        cls_id, sep_id, pad_id, mask_id, unk_id, bos_id, eos_id: the token in this role, or None.
        vocab_size: number of ids including vocabulary padding: the rows of an embedding.
        unpadded_vocab_size: ids from here on are vocabulary padding.
        special_ids: all special tokens, vocabulary padding included.
        append_eos: whether a document ends with `eos_id`, which a prompt never does.
        fingerprint: xxh3-128 (hex) of the tokenizer without vocabulary padding. Equal fingerprints mean equal ids.
        special_tokens: "text": the names of special tokens in a document are characters like others; "honor": they are
            the tokens.
        config: further keys of `tokenizer_config.json`, which `save` keeps.
        chat_template: content of `chat_template.jinja`, which `save` keeps.
        domain: what a tokenizer of domain names knows of a name beside its characters; None: a tokenizer of text.
    """

    backend: tokenizers.Tokenizer
    cls_id: int | None
    sep_id: int | None
    pad_id: int | None
    mask_id: int | None
    unk_id: int | None
    bos_id: int | None
    eos_id: int | None
    vocab_size: int
    unpadded_vocab_size: int
    special_ids: list[int]
    append_eos: bool
    fingerprint: str
    special_tokens: str = "text"
    config: dict[str, Any] = field(default_factory=dict)
    chat_template: bytes | None = None
    domain: "DomainEncoding | None" = None

    def __getstate__(self) -> dict:
        # Pickling a backend loses `encode_special_tokens`: the text backend is made anew where it is needed.
        return {name: value for name, value in self.__dict__.items() if name not in ("text_backend", "_name_finders")}

    @property
    def unknown_id(self) -> int | None:
        """`unk_id`, or None where that token has another role, too, and so says nothing about the text (GPT-2's)."""
        others = (self.cls_id, self.sep_id, self.pad_id, self.bos_id, self.eos_id)
        return None if self.unk_id in others else self.unk_id

    @cached_property
    def text_backend(self) -> tokenizers.Tokenizer:
        """The backend for documents.

        As `backend`, but unless special tokens are honored, no text gives one (other than the unknown one).
        """
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        if self.append_eos:
            bos, eos = (backend.id_to_token(i) for i in (self.bos_id, self.eos_id))
            backend.post_processor = between(backend, bos, eos)
        if self.special_tokens == "honor":
            return backend
        backend.encode_special_tokens = True
        names = [self.backend.id_to_token(i) for i in self.special_ids]
        # A model whose own vocabulary has the name, such as Unigram, finds it nevertheless: there the name is cut after
        # its first character before the model sees it.
        found = [
            name
            for name, i in zip(names, self.special_ids, strict=True)
            if len(name) > 1 and i in backend.encode(name, add_special_tokens=False).ids
        ]
        if found:
            cut = Regex("|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in found))
            before = [backend.pre_tokenizer] if backend.pre_tokenizer else []
            cutter = pre_tokenizers.Split(cut, behavior="merged_with_previous")
            backend.pre_tokenizer = pre_tokenizers.Sequence([*before, cutter])
        return backend

    @cached_property
    def _name_finders(self) -> list[tuple[str, re.Pattern]]:
        """The first characters of special tokens' names, each with a pattern of the names that begin so."""
        names = {self.backend.id_to_token(i) for i in self.special_ids}
        names = sorted((name for name in names if len(name) > 1 and not PADDING.fullmatch(name)), key=len, reverse=True)
        starts = sorted({name[:2] for name in names})
        return [(s, re.compile("|".join(re.escape(name) for name in names if name.startswith(s)))) for s in starts]

    def count_special_names(self, text: str) -> int:
        """How often the name of a special token stands in a text."""
        # To look for two characters is a hundred times faster than for many names.
        return sum(sum(1 for _ in names.finditer(text)) for start, names in self._name_finders if start in text)

    def encode(self, text: str) -> list[int]:
        """Ids of a document, with the special tokens that the tokenizer puts around it (`[CLS]` and `[SEP]`)."""
        return self.text_backend.encode(text).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, in several threads unless the variable TOKENIZERS_PARALLELISM says otherwise."""
        return [encoding.ids for encoding in self.text_backend.encode_batch_fast(list(texts))]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a prompt, in which `[MASK]` and the names of other special tokens are the tokens.

        They are what `AutoTokenizer` gives. For a causal model no eos token follows: the model continues the text.
        """
        return self.backend.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, with special tokens by their names."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def decode_token(self, token: int) -> str:
        """The text of one token, as `##ing` or ` the`; of a special token, its name."""
        return self.backend.id_to_token(token) if token in self.special_ids else self.decode([token])

    def token_type_ids(
        self, tokens: np.ndarray, lengths: np.ndarray, second_starts: np.ndarray | None = None
    ) -> np.ndarray:
        """The token types of texts, for a model that has them.

        They are 1 from the second sentence of a pair on (Devlin et al. 2018). For domain names they say which public
        suffix a name has, and which part of the name a character belongs to: `DomainEncoding.token_type_ids`.

        Args:
            tokens: `[N]`, of the texts, one after the other, as `encode` gives them.
            lengths: `[T]`, tokens of each text.
            second_starts: `[T]`, where the second sentence begins in its text; the text's length where there is none.

        Returns:
            int64 `[N]`.
        """
        if self.domain is not None:
            return self.domain.token_type_ids(tokens, lengths, second_starts)
        if second_starts is None:
            return np.zeros(len(tokens), np.int64)
        lengths = np.asarray(lengths, np.int64)
        firsts = np.cumsum(lengths) - lengths
        return (np.arange(len(tokens)) >= (firsts + second_starts).repeat(lengths)).astype(np.int64)

    def with_domain(self, domain: "DomainEncoding") -> "Tokenizer":
        """This tokenizer of characters as one of domain names: its fingerprint covers their suffixes and rules."""
        content = "\n".join([self.fingerprint, *domain.config.values()])
        fingerprint = xxhash.xxh3_128_hexdigest(content.encode())
        return replace(self, domain=domain, config=self.config | domain.config, fingerprint=fingerprint)

    def save(self, folder: str | Path, model_max_length: int | None = None) -> None:
        """Writes the files that `AutoTokenizer` and `load_tokenizer` read.

        These are `tokenizer.json`, `tokenizer_config.json` and, where the tokenizer was loaded with one,
        `chat_template.jinja`.

        Args:
            folder: made if missing; other files in it stay.
            model_max_length: tokens that the model takes, for the Hugging Face side.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        ids = {role: getattr(self, f"{role}_id") for role in ROLES}
        config = {
            "model_input_names": ["input_ids", "attention_mask"],
            **self.config,
            # Whatever the model's family, `tokenizer.json` is the tokenizer: a family's own class would rebuild it.
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{role}_token": self.backend.id_to_token(i) for role, i in ids.items() if i is not None},
            "clean_up_tokenization_spaces": False,
            IDS_KEY: ids_checksum(self.backend, self.unpadded_vocab_size),
        }
        config.pop(IN_DOCUMENTS, None)
        if self.special_tokens != "text":
            config[IN_DOCUMENTS] = self.special_tokens
        if model_max_length is not None:
            config["model_max_length"] = model_max_length
        stated = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        write_atomically(folder / "tokenizer.json", [self.backend.to_str(pretty=True).encode("utf-8")])
        write_atomically(folder / "tokenizer_config.json", [stated.encode("utf-8")])
        if self.chat_template is not None:
            write_atomically(folder / CHAT_TEMPLATE, [self.chat_template])


def make_tokenizer(
    backend: tokenizers.Tokenizer,
    roles: dict[str, AddedToken],
    pad_vocab_to_multiple_of: int,
    causal: bool = False,
    special_tokens: str = "text",
) -> Tokenizer:
    """Makes a `Tokenizer` around `backend`, which is changed: tokens of `roles` that it lacks and padding are added.

    Args:
        backend: a tokenizer without vocabulary padding at its end.
        roles: special tokens by role, one of `cls, sep, pad, mask, unk, bos, eos`.
        pad_vocab_to_multiple_of: the vocabulary is padded to a multiple of this.
        causal: for a model that predicts the next token. A document is `bos text eos`, or `eos text` where both are one
            token: it begins a document and is the last target of the one before. A prompt is the same without the end.
        special_tokens: "text" or "honor", see `Tokenizer`.

    Raises:
        UserError: ids between 0 and the largest belong to no token, and tokens must be added (code `holes`);
            `special_tokens` is something else (`invalid_value`).
    """
    if pad_vocab_to_multiple_of < 1:
        raise UserError(
            f"{pad_vocab_to_multiple_of} is less than 1", key="pad_vocab_to_multiple_of", hint="64 is a good choice."
        )
    if special_tokens not in SPECIAL_TOKENS:
        problem, hint = f"'{special_tokens}' is not a valid value", f"Set one of {', '.join(SPECIAL_TOKENS)}."
        raise UserError(problem, key="special_tokens", hint=hint, code="invalid_value")
    before = backend.get_vocab(with_added_tokens=True)
    special = special_names(backend)
    backend.add_special_tokens([token for token in roles.values() if token.content not in special.values()])
    end = ""
    if causal:
        backend.post_processor = begin_with(backend, roles["bos"].content)
        end = roles["eos"].content if roles["eos"].content != roles["bos"].content else ""
    honored = "\0honor" if special_tokens == "honor" else ""
    fingerprint = xxhash.xxh3_128_hexdigest(_canonical(backend) + (end + honored).encode())
    unpadded_vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    vocab_size = -(-unpadded_vocab_size // pad_vocab_to_multiple_of) * pad_vocab_to_multiple_of
    unused = (name for i in count() if (name := f"<|inert_{i}|>") not in before)
    padding = islice(unused, vocab_size - unpadded_vocab_size)
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in padding])
    _check_added(before, backend.get_vocab(with_added_tokens=True))
    ids = {f"{role}_id": backend.token_to_id(roles[role].content) if role in roles else None for role in ROLES}
    return Tokenizer(
        backend=backend,
        **ids,
        vocab_size=vocab_size,
        unpadded_vocab_size=unpadded_vocab_size,
        special_ids=sorted(special_names(backend)),
        append_eos=bool(end),
        fingerprint=fingerprint,
        special_tokens=special_tokens,
    )


def special_names(backend: tokenizers.Tokenizer) -> dict[int, str]:
    """The names of the special tokens by id."""
    return {i: token.content for i, token in backend.get_added_tokens_decoder().items() if token.special}


def _check_added(before: dict[str, int], after: dict[str, int]) -> None:
    """Checks that what was added has the ids after the largest: `tokenizers` counts tokens, and holes mislead it."""
    first = max(before.values(), default=-1) + 1
    added = sorted(i for name, i in after.items() if name not in before)
    if added != list(range(first, first + len(added))):
        holes = sorted(set(range(first)) - set(before.values()))
        names = ", ".join(map(str, holes[:10])) + (f" and {len(holes) - 10} more" if len(holes) > 10 else "")
        raise UserError(
            f"the vocabulary has holes: no token has the ids {names}; tokens that are added would get ids of others",
            hint="Give these ids to tokens, or use a vocabulary that needs no further tokens with "
            "pad_vocab_to_multiple_of=1.",
            code="holes",
        )


def _canonical(backend: tokenizers.Tokenizer) -> bytes:
    """What decides the ids, as bytes that do not depend on the order in which a file lists it."""
    content = json.loads(backend.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if not PADDING.fullmatch(token["content"])]
    if content["model"]["type"] == "Unigram":  # its scores change in the last digit when a file is read and written
        content["model"]["vocab"] = [[name, f"{score:.9g}"] for name, score in content["model"]["vocab"]]
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8")


@contextmanager
def one_thread() -> Iterator[None]:
    """Keeps `tokenizers` from starting threads of its own, and from warning about processes that are forked later."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
