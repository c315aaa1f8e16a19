"""Tokenizers: load one, or train one on the text that a model will see.

`load_tokenizer` reads a `tokenizer.json`, a Hugging Face folder or a SentencePiece model; `train_wordpiece`,
`train_bpe`, `train_unigram` and `train_char` make one from documents (tokenizer_training.py). All give a `Tokenizer`
(tokenizer.py).
"""

from collections.abc import Sequence
from pathlib import Path

from torchrecipes.data.tokenizers.tokenizer import Tokenizer, make_tokenizer, special_tokens
from torchrecipes.data.tokenizers.tokenizer_files import ROLES, USUAL_NAMES, read_tokenizer
from torchrecipes.data.tokenizers.train import train_bpe, train_char, train_unigram, train_wordpiece
from torchrecipes.errors import UserError

__all__ = ["Tokenizer", "load_tokenizer", "train_bpe", "train_char", "train_unigram", "train_wordpiece"]


def load_tokenizer(
    path: str | Path, pad_vocab_to_multiple_of: int = 64, required: Sequence[str] | None = None, causal: bool = False
) -> Tokenizer:
    """Reads a tokenizer from disk.

    Args:
        path: a `tokenizer.json`, a folder that has one (a Hugging Face model's or tokenizer's, a checkpoint), a BERT
            `vocab.txt`, or a SentencePiece `.model`; to the latter `[CLS]`, `[SEP]`, `[PAD]` and `[MASK]` are added
            where it has none (its begin- and end-of-sentence tokens are `[CLS]` and `[SEP]` where it has these).
        pad_vocab_to_multiple_of: the number of ids is filled up to a multiple of this. 1: none is added.
        required: the roles that must be filled. None: `("mask", "pad")`, which masked language modelling needs.
        causal: for a model that predicts the next token. Whatever the tokenizer's own form of a document is, it becomes
            `eos text`, or `bos text eos` where there are both. An eos is needed; it pads where there is no padding.

    Raises:
        UserError: nothing to read there, or a required special token is missing.
    """
    if required is None:
        required = ("eos",) if causal else ("mask", "pad")
    if unknown := [role for role in required if role not in ROLES]:
        raise UserError(f"required: {', '.join(unknown)} is none of the roles {', '.join(ROLES)}.")
    backend, roles = read_tokenizer(Path(path), causal)
    for role in required:
        if role not in roles:
            other = "train_bpe with causal: true" if causal else "train_wordpiece"
            raise UserError(
                f"{path}: this tokenizer has no {role} token, which is needed here (special tokens: "
                f"{', '.join(special_tokens(backend).values()) or 'none'}). Name one in tokenizer_config.json beside "
                f'tokenizer.json, as in "{role}_token": "{USUAL_NAMES[role][0]}" (it is added where the vocabulary '
                f"lacks it), or take another tokenizer, e.g. {other}."
            )
    if causal:
        roles = {"bos": roles["eos"], "pad": roles["eos"], **roles}
    return make_tokenizer(backend, roles, pad_vocab_to_multiple_of, causal)
