"""Whether what a config names can be built and goes together: told before a corpus is made, not after."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchrecipes.config import build
from torchrecipes.errors import UserError
from torchrecipes.models import check_positions, hf_network
from torchrecipes.modules import MoE

VOCAB_SIZE = 1024  # of a tokenizer that is not there yet


def check_components(config: Any, *, causal: bool) -> list[str]:
    """Builds the model, on the meta device, its optimizer, the schedule and the guard, and throws them away.

    Args:
        config: a recipe's.
        causal: whether the recipe trains decoders, or encoders.

    Returns:
        One line per problem, with its key first.
    """
    problems: list[str] = []

    def tried(key: str, make: Any) -> Any:
        try:
            return make()
        except (UserError, ValueError) as error:
            said = str(error)  # some name their key already
            if not said.startswith(f"{key}."):
                said = f"{key}: {said.removeprefix(f'{key}: ').removeprefix(f'{key} ')}"
            problems.append(said)

    def network() -> nn.Module:
        with torch.device("meta"):
            return build(config.model, vocab_size=VOCAB_SIZE, seed=0)

    if not config.init_from:
        key, model = "model", tried("model", network)
    elif Path(config.init_from).is_dir():
        key, model = "init_from", tried("init_from", lambda: hf_network(config.init_from))
    else:
        model = None  # a laptop may check what runs where the files are
    if model is not None:
        problems += _of_kind(key, model, causal)
        tried("seq_len", lambda: check_positions(model, config.seq_len))
        if not config.data.packing and any(isinstance(part, MoE) for part in model.modules()):
            problems.append("data.packing: false fills rows up with padding, which routers of experts would learn from")
        tried("optimizer", lambda: build(config.optimizer, model=model))
    if config.max_steps and config.max_steps > 0:
        tried("schedule", lambda: build(config.schedule, max_steps=config.max_steps))
    tried("guard", lambda: build(config.guard))
    return problems


def _of_kind(key: str, model: nn.Module, causal: bool) -> Iterator[str]:
    name = type(model).__name__
    if causal and not hasattr(model, "router_loss"):
        yield f"{key}: {name} is an encoder, which sees the tokens that are to be predicted. It is for mlm_pretrain"
    if not causal and hasattr(model, "router_loss"):
        yield f"{key}: {name} is a decoder, which sees no later token. It is for causal_pretrain"
