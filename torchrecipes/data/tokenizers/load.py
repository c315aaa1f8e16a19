"""`load_tokenizer`: a `tokenizer.json`, a Hugging Face folder, BERT's `vocab.txt` or a SentencePiece model."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import tokenizers

from torchrecipes.data.tokenizers.tokenizer import IN_DOCUMENTS, Tokenizer, make_tokenizer, special_names
from torchrecipes.data.tokenizers.tokenizer_files import DOMAIN_SUFFIXES, ROLES, USUAL_NAMES, read_tokenizer
from torchrecipes.data.tokenizers.train import train_bpe, train_char, train_unigram, train_wordpiece
from torchrecipes.errors import UserError

__all__ = ["Tokenizer", "load_tokenizer", "train_bpe", "train_char", "train_unigram", "train_wordpiece"]


def load_tokenizer(
    path: str | Path,
    pad_vocab_to_multiple_of: int = 64,
    required: Sequence[str] | None = None,
    causal: bool = False,
    special_tokens: str | None = None,
) -> Tokenizer:
    """Reads a tokenizer from disk.

    Args:
        path: a `tokenizer.json`, a folder that has one (a Hugging Face model's or tokenizer's, a checkpoint), a BERT
            `vocab.txt`, or a SentencePiece `.model`; to the latter `[CLS]`, `[SEP]`, `[PAD]` and `[MASK]` are added
            where it has none (its begin- and end-of-sentence tokens are `[CLS]` and `[SEP]` where it has these).
        pad_vocab_to_multiple_of: the vocabulary is padded to a multiple of this. 1: not padded, as that of domain names
            never is.
        required: roles that must be filled. None: `("mask", "pad")`, which masked language modeling needs, or
            `("eos",)` with `causal`.
        causal: for a model that predicts the next token. Whatever the tokenizer's own form of a document is, it becomes
            `eos text`, or `bos text eos` where there are both. The eos token pads where there is no padding token.
        special_tokens: what the names of special tokens are in documents: "text", characters like others, or "honor",
            the tokens. None: what the tokenizer was saved with, else "text".

    Raises:
        UserError: there is no tokenizer, ids of the file would change, or a required special token is missing (code
            `no_special_token`).
    """
    if required is None:
        required = ("eos",) if causal else ("mask", "pad")
    if unknown := [role for role in required if role not in ROLES]:
        raise ValueError(f"required: {', '.join(unknown)} is none of the roles {', '.join(ROLES)}")
    files = read_tokenizer(Path(path), causal)
    roles = files.roles
    for role in required:
        if role not in roles:
            names = ", ".join(special_names(files.backend).values()) or "none"
            raise UserError(
                f"the tokenizer in {path} has no {role} token, which this model needs (special tokens: {names})",
                hint=f'Name one in tokenizer_config.json beside tokenizer.json, as in "{role}_token": '
                f'"{USUAL_NAMES[role][0]}" (it is added if the vocabulary lacks it), or use another tokenizer, e.g. '
                f"{'train_bpe' if causal else 'train_wordpiece'}.",
                code="no_special_token",
            )
    if causal:
        roles = {"bos": roles["eos"], "pad": roles["eos"], **roles}
    special_tokens = special_tokens or files.config.get(IN_DOCUMENTS, "text")
    is_of_domains = DOMAIN_SUFFIXES in files.config
    multiple = 1 if is_of_domains else pad_vocab_to_multiple_of
    tokenizer = make_tokenizer(files.backend, roles, multiple, causal, special_tokens)
    tokenizer = replace(tokenizer, config=files.config, chat_template=files.chat_template)
    if not is_of_domains:
        return tokenizer
    from torchrecipes.data.domains.encoding import DomainEncoding  # it imports this package

    return tokenizer.with_domain(DomainEncoding.from_config(files.config))


def load_model_tokenizer(folder: Path, causal: bool = False) -> Tokenizer:
    """The tokenizer in a model's folder, with the vocabulary that the model was built for.

    A `config.json` says how many rows the embedding has. Without one, the vocabulary padding in `tokenizer.json` does.
    """
    multiple = 1
    if not (folder / "config.json").exists() and (folder / "tokenizer.json").exists():
        saved = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        multiple = max(saved.get_vocab(with_added_tokens=True).values()) + 1
    return load_tokenizer(folder, pad_vocab_to_multiple_of=multiple, causal=causal)
