"""What the rest of the library knows of a tokenizer: ids of text, and special tokens by their role.

1. The vocabulary is filled up to a multiple of `pad_vocab_to_multiple_of` with inert tokens, which no text contains
   and no model
   predicts: the embedding's rows are then a round number, which matrix products like.
2. A document is text and nothing else: a literal `[MASK]` or `</s>` in it is tokenized as the characters that it is
   (`encode`). Only in a prompt are the names of special tokens the tokens themselves (`encode_prompt`).
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import tokenizers
import xxhash
from tokenizers import AddedToken, Regex, pre_tokenizers

from torchrecipes.atomic_write import write_atomically
from torchrecipes.data.tokenizers.tokenizer_files import INERT, ROLES, begin_with, between
from torchrecipes.errors import UserError


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A `tokenizers.Tokenizer` whose special tokens are known by their role. Made by `load_tokenizer` and `train_*`.

    Attributes:
        backend: as `AutoTokenizer` uses it: the names of special tokens in a text are the tokens themselves.
        cls_id, sep_id, pad_id, mask_id, unk_id, bos_id, eos_id: the token in this role, None where there is none.
        vocab_size: number of ids, inert ones included: the rows of an embedding.
        unpadded_vocab_size: ids from here on are inert.
        special_ids: all special tokens, inert ones included.
        append_eos: whether a document ends with `eos_id`, which a prompt never does.
        fingerprint: xxh3-128 (hex) of the tokenizer without its inert tokens. Equal fingerprints, equal ids.
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

    def __getstate__(self) -> dict:
        # Pickling a backend forgets `encode_special_tokens`: the text backend is made anew where it is needed.
        return {name: value for name, value in self.__dict__.items() if name != "text_backend"}

    @property
    def unknown_id(self) -> int | None:
        """`unk_id`, or None where that token has another role, too, and so says nothing of the text (GPT-2's)."""
        others = (self.cls_id, self.sep_id, self.pad_id, self.bos_id, self.eos_id)
        return None if self.unk_id in others else self.unk_id

    @cached_property
    def text_backend(self) -> tokenizers.Tokenizer:
        """The backend for documents: as `backend`, but no text gives a special token (other than the unknown one)."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.encode_special_tokens = True
        if self.append_eos:
            bos, eos = (backend.id_to_token(i) for i in (self.bos_id, self.eos_id))
            backend.post_processor = between(backend, bos, eos)
        names = [self.backend.id_to_token(i) for i in self.special_ids]
        # A model whose own vocabulary has the name, as Unigram's has, finds it nevertheless: there it is cut behind
        # its first character, before the model sees it.
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

    def encode(self, text: str) -> list[int]:
        """Ids of a document, between the special tokens that the tokenizer puts around it (`[CLS]` and `[SEP]`)."""
        return self.text_backend.encode(text).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, in several threads unless the variable TOKENIZERS_PARALLELISM says otherwise."""
        return [encoding.ids for encoding in self.text_backend.encode_batch_fast(list(texts))]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a prompt: `[MASK]` in it is the mask token, and so for the other special tokens.

        They are what `AutoTokenizer` gives. That of a causal model does not end the text, which is to go on.
        """
        return self.backend.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens by their names."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def decode_token(self, token: int) -> str:
        """The text of one token, as `##ing` or ` the`; of a special token, its name."""
        return self.backend.id_to_token(token) if token in self.special_ids else self.decode([token])

    def save(self, folder: str | Path, model_max_length: int | None = None) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, as `AutoTokenizer` and `load_tokenizer` read them.

        Args:
            folder: made where missing; other files in it stay.
            model_max_length: tokens that the model takes, for the Hugging Face side.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        ids = {role: getattr(self, f"{role}_id") for role in ROLES}
        config = {
            # Whatever the model's family, `tokenizer.json` is the tokenizer: a family's own class would rebuild it.
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{role}_token": self.backend.id_to_token(i) for role, i in ids.items() if i is not None},
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
        }
        if model_max_length is not None:
            config["model_max_length"] = model_max_length
        stated = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        write_atomically(folder / "tokenizer.json", [self.backend.to_str(pretty=True).encode("utf-8")])
        write_atomically(folder / "tokenizer_config.json", [stated.encode("utf-8")])


def make_tokenizer(
    backend: tokenizers.Tokenizer, roles: dict[str, AddedToken], pad_vocab_to_multiple_of: int, causal: bool = False
) -> Tokenizer:
    """A `Tokenizer` around `backend`, which is changed: tokens of `roles` that it lacks and inert ones are added.

    Args:
        backend: a tokenizer without inert tokens.
        roles: special tokens by role, one of `cls, sep, pad, mask, unk, bos, eos`.
        pad_vocab_to_multiple_of: the number of ids is filled up to a multiple of this.
        causal: for a model that predicts the next token. A document is `bos text eos` then, or `eos text` where both
            are one token: it begins a document, and is what the last token of the one before has to predict. A prompt
            is the same without the end.
    """
    if pad_vocab_to_multiple_of < 1:
        raise UserError(
            f"pad_vocab_to_multiple_of is {pad_vocab_to_multiple_of}; it is 1 or more (64 is a good choice)."
        )
    special = special_tokens(backend)
    backend.add_special_tokens([token for token in roles.values() if token.content not in special.values()])
    end = ""
    if causal:
        backend.post_processor = begin_with(backend, roles["bos"].content)
        end = roles["eos"].content if roles["eos"].content != roles["bos"].content else ""
    fingerprint = xxhash.xxh3_128_hexdigest(_canonical(backend) + end.encode())
    unpadded_vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    vocab_size = -(-unpadded_vocab_size // pad_vocab_to_multiple_of) * pad_vocab_to_multiple_of
    backend.add_special_tokens(
        [AddedToken(f"<|inert_{i}|>", normalized=False, special=True) for i in range(vocab_size - unpadded_vocab_size)]
    )
    ids = {f"{role}_id": backend.token_to_id(roles[role].content) if role in roles else None for role in ROLES}
    return Tokenizer(
        backend=backend,
        **ids,
        vocab_size=vocab_size,
        unpadded_vocab_size=unpadded_vocab_size,
        special_ids=sorted(special_tokens(backend)),
        append_eos=bool(end),
        fingerprint=fingerprint,
    )


def special_tokens(backend: tokenizers.Tokenizer) -> dict[int, str]:
    """The names of the special tokens by id."""
    return {i: token.content for i, token in backend.get_added_tokens_decoder().items() if token.special}


def _canonical(backend: tokenizers.Tokenizer) -> bytes:
    """What decides the ids, as bytes that do not depend on the order in which a file lists it."""
    content = json.loads(backend.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if not INERT.fullmatch(token["content"])]
    if content["model"]["type"] == "Unigram":  # its scores change in the last digit when a file is read and written
        content["model"]["vocab"] = [[name, f"{score:.9g}"] for name, score in content["model"]["vocab"]]
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8")


@contextmanager
def one_thread() -> Iterator[None]:
    """Keeps `tokenizers` from starting threads of its own, also lest it warn of processes that are forked later."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
