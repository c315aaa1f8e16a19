"""Whether what a config names can be built and goes together: told before a corpus is made, not after."""

import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchrecipes.config import build
from torchrecipes.errors import UserError
from torchrecipes.models import check_causal, check_positions, meta_model_from_hf
from torchrecipes.modules import MoE

VOCAB_SIZE = 1024  # of a tokenizer that is not there yet
MANY = 10**9  # steps, where the corpus decides how many there are


def check_components(config: Any, *, causal: bool) -> list[str]:
    """Builds the model, on the meta device, its optimizer, the schedule and the guard, and throws them away.

    Args:
        config: a recipe's.
        causal: whether the recipe trains decoders, or encoders.

    Returns:
        One line per problem, with its key first.
    """
    problems: list[str] = []

    def tried(key: str, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except (UserError, ValueError) as error:
            problems.append(_with_key(key, str(error)))
        except Exception as error:  # of a component of the user's own, or one that is none
            last = traceback.extract_tb(error.__traceback__)[-1]
            # Told already, by the check of arguments.
            missing_argument = isinstance(error, TypeError) and last.filename == build.__code__.co_filename
            # An optimizer that looks at values cannot be tried on a model that has none: it passes.
            no_values = key == "optimizer" and isinstance(error, RuntimeError) and "meta" in str(error).lower()
            if not missing_argument and not no_values:
                problems.append(f"{key}: {type(error).__name__}: {error} ({last.filename}:{last.lineno})")

    if not config.init_from:
        key, model = "model", tried("model", lambda: _network(config))
    elif Path(config.init_from).exists():
        key, model = "init_from", tried("init_from", lambda: meta_model_from_hf(config.init_from))
    else:
        model = None  # a laptop may check what runs where the files are
    if model is not None:
        tried(key, lambda: check_causal(model, causal))
        tried("seq_len", lambda: check_positions(model, config.seq_len))
        if not config.data.packing and any(isinstance(part, MoE) for part in model.modules()):
            problems.append("data.packing: false fills rows up with padding, which routers of experts would learn from")
        tried("optimizer", lambda: _optimizer(config, model))
    tried("lr_scheduler", lambda: _schedule(config))
    tried("guard", lambda: build(config.guard))
    return problems


def _network(config: Any) -> nn.Module:
    with torch.device("meta"):
        model = build(config.model, vocab_size=VOCAB_SIZE, seed=0)
    return model


def _optimizer(config: Any, model: nn.Module) -> None:
    optimizer = build(config.optimizer, model=model)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"{config.optimizer.path} gave {type(optimizer).__name__}, and no torch.optim.Optimizer")


def _schedule(config: Any) -> None:
    steps = config.max_steps
    if config.total_tokens and config.data.packing:
        steps = -(-config.total_tokens // (config.global_batch_size * config.seq_len))
    steps = MANY if steps is None else steps
    if steps < 1 or config.seq_len < 1 or config.global_batch_size < 1:
        return  # told already
    optimizer = torch.optim.SGD([torch.zeros(1)])
    schedule = build(config.lr_scheduler, optimizer=optimizer, max_steps=steps)
    if not isinstance(schedule, torch.optim.lr_scheduler.LRScheduler):
        raise UserError(
            f"{config.lr_scheduler.path} gave {type(schedule).__name__}, and no torch.optim.lr_scheduler.LRScheduler"
        )


def _with_key(key: str, said: str) -> str:
    """`optimizer lr: ...` and `lr: ...` become `optimizer.lr: ...`; what names no argument gets the key before it."""
    if said.startswith(f"{key}."):
        return said
    said = said.removeprefix(f"{key}: ").removeprefix(f"{key} ")
    return f"{key}.{said}" if re.match(r"\w+: ", said) else f"{key}: {said}"
