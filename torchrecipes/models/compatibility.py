"""Checks that sizes are valid, and that a model fits the tokenizer, the row length and the objective."""

from collections.abc import Collection
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from torch import nn

from torchrecipes.errors import UserError
from torchrecipes.models.hf_adapter import HFAdapter

if TYPE_CHECKING:
    from torchrecipes.data.tokenizers.tokenizer import Tokenizer


def check_sizes(config: Any, may_be_zero: Collection[str] = ()) -> None:
    """Checks that every integer of a model's config is 1 or more.

    Args:
        config: a dataclass.
        may_be_zero: fields that are no sizes.

    Raises:
        UserError: `bad_size`, naming those that are not.
    """
    sizes = {field.name: getattr(config, field.name) for field in fields(config) if field.type is not float}
    low = [f"{name}={size}" for name, size in sizes.items() if type(size) is int and size < (name not in may_be_zero)]
    if low:
        raise UserError(f"{', '.join(low)}: sizes are 1 or more", code="bad_size")


def check_causal(model: nn.Module, causal: bool) -> None:
    """Checks that a model is a decoder where one is needed, or an encoder; a model that is not ours passes.

    Args:
        model: any module.
        causal: whether the next token is predicted, from those before it only.

    Raises:
        UserError: `wrong_direction`.
    """
    if not isinstance(getattr(model, "hf_adapter", None), HFAdapter) or model.causal == causal:
        return
    name = model.config.model_type
    if causal:
        problem = f"{name} is an encoder: it sees the tokens that are to be predicted"
        raise UserError(problem, key="model", hint="Train it with mlm_pretrain", code="wrong_direction")
    problem = f"{name} is a decoder: it sees no later token"
    raise UserError(problem, key="model", hint="Train it with causal_pretrain", code="wrong_direction")


def check_tokenizer_compatibility(model: nn.Module, tokenizer: "Tokenizer", seq_len: int) -> None:
    """Checks that the model has an embedding for every token and token type, a position for every place in a row, and
    the padding.

    A model without a `config` that says so passes.

    Args:
        model: may have `config.vocab_size` and `config.max_position_embeddings`.
        tokenizer: has `vocab_size` and `pad_id`.
        seq_len: tokens per row.

    Raises:
        UserError: `vocab_too_large`, `too_few_token_types`, `seq_len_too_long` or `other_padding`.
    """
    rows = getattr(getattr(model, "config", None), "vocab_size", None)
    if rows is not None and tokenizer.vocab_size > rows:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens and the model's embedding {rows:,} rows",
            key="tokenizer",
            hint="Use the model's own tokenizer, with pad_vocab_to_multiple_of: 1 if it was made without padding",
            code="vocab_too_large",
        )
    _check_token_types(model, tokenizer)
    pad_id = getattr(getattr(model, "config", None), "pad_token_id", None)
    keeps_pad_id = getattr(getattr(model, "hf_adapter", None), "keeps_pad_id", False)
    if keeps_pad_id and getattr(tokenizer, "pad_id", None) not in (None, pad_id):
        raise UserError(
            f"positions begin after the id of padding, which is {pad_id} for the model and {tokenizer.pad_id} for the "
            f"tokenizer: other libraries would give token {pad_id} the position of padding",
            key="model.pad_token_id",
            hint=f"Set model.pad_token_id={tokenizer.pad_id}, or use the tokenizer of the model.",
            code="other_padding",
        )
    check_positions(model, seq_len)


def _check_token_types(model: nn.Module, tokenizer: "Tokenizer") -> None:
    domain, adapter = getattr(tokenizer, "domain", None), getattr(model, "hf_adapter", None)
    if domain is None or not getattr(adapter, "token_types", False):
        return
    needed, has = domain.num_token_types, model.config.type_vocab_size * getattr(model.config, "num_suffixes", 1)
    if has < needed:
        raise UserError(
            f"the tokenizer gives {needed:,} token types, those of {len(domain.suffixes):,} suffixes, and the model "
            f"has {has:,}",
            key="model",
            hint=f"Use torchrecipes.models.domain_bert with num_suffixes={len(domain.suffixes) + 1}, or a tokenizer of "
            "fewer suffixes.",
            code="too_few_token_types",
        )


def check_positions(model: nn.Module, seq_len: int) -> None:
    """Checks that the model has a position for every place in a row; one without a config that says so passes, and one
    whose last position repeats.

    Raises:
        UserError: `seq_len_too_long`.
    """
    positions = max_positions(model)
    repeats_last = getattr(getattr(model, "embedding", None), "repeat_last_position", False)
    if positions is not None and seq_len > positions and not repeats_last:
        raise UserError(
            f"{seq_len} is more than the {positions} positions of the model (max_position_embeddings)",
            key="seq_len",
            hint="Lower seq_len, or raise model.max_position_embeddings; a trained model takes longer rows after "
            "torchrecipes.models.extend_context",
            code="seq_len_too_long",
        )


def max_positions(model: nn.Module) -> int | None:
    """The longest document that a model takes, in tokens; None for one without a config that says so.

    That is `max_position_embeddings`, less the rows of the table that are not positions (RoBERTa).
    """
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return None if positions is None else positions - getattr(model, "position_offset", 0)
