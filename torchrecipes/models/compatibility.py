"""Whether a model's sizes are sizes, and whether model, tokenizer and row length go together."""

from dataclasses import fields
from typing import Any

from torch import nn

from torchrecipes.errors import UserError


def check_sizes(config: Any) -> None:
    """Checks that every integer of a model's config is 1 or more.

    Args:
        config: a dataclass.

    Raises:
        UserError: names those that are not.
    """
    sizes = {field.name: getattr(config, field.name) for field in fields(config) if field.type is not float}
    low = [f"{name}={size}" for name, size in sizes.items() if type(size) is int and size < 1]
    if low:
        raise UserError(f"model: {', '.join(low)}: sizes are 1 or more.")


def check_tokenizer_compatibility(model: nn.Module, tokenizer, seq_len: int) -> None:
    """Checks that the model has a row for every token and a position for every place in a row.

    Args:
        model: has `config.vocab_size` and `config.max_position_embeddings`.
        tokenizer: has `vocab_size`.
        seq_len: tokens per row.

    Raises:
        UserError: it has not; the message names the setting to change.
    """
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens and the model {model.config.vocab_size:,} rows for "
            "them. Take the model's own tokenizer, with pad_vocab_to_multiple_of: 1 if it was made without inert "
            "tokens."
        )
    check_positions(model, seq_len)


def check_positions(model: nn.Module, seq_len: int) -> None:
    """Checks that the model has a position for every place in a row.

    Raises:
        UserError: it has not; the message names the setting to change.
    """
    if seq_len > model.config.max_position_embeddings:
        raise UserError(
            f"seq_len={seq_len} is more than the model's max_position_embeddings="
            f"{model.config.max_position_embeddings}. Lower seq_len, or raise model.max_position_embeddings."
        )
