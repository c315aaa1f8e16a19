"""`setup_model`: a model that is ready to train, prepared in the one order that is correct."""

import inspect
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from torchrecipes.data.tokenizers import Tokenizer
from torchrecipes.distributed.fsdp import init_on_device, parallelize
from torchrecipes.errors import UserError
from torchrecipes.models import Transformer, check_tokenizer_compatibility, load_hf_weights
from torchrecipes.modules.blocks import transformer_blocks
from torchrecipes.training.activation_checkpointing import apply_activation_checkpointing
from torchrecipes.training.float8 import convert_to_float8
from torchrecipes.training.precision import set_residual_dtype
from torchrecipes.training.run import Run


def setup_model(build_model: Callable[[Any, Any], nn.Module], config: Any, tokenizer: Tokenizer, run: Run) -> nn.Module:
    """Builds a model and prepares it for training: float8, activation checkpointing, compile, sharding, weights.

    Each step needs the ones before it: checkpointing and compile wrap the converted layers, and `fully_shard` wraps
    compiled blocks. A model with `init_weights(seed)` is built on the meta device and gets its weights where they stay,
    so that no rank ever holds a whole model. Any other is built on the CPU of every rank, from the same seed.

    Args:
        build_model: the recipe's.
        config: the recipe's, with the keys `seq_len`, `compute`, `seed`, `init_from` and `freeze`.
        tokenizer: the model's vocabulary must hold it.
        run: the processes and the device.

    Returns:
        The model, in training mode.

    Raises:
        UserError: model and tokenizer, or a setting, do not fit together.
    """
    with torch.device("meta"):
        model = build_model(config, tokenizer)
    if not _takes_seed(getattr(model, "init_weights", None)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = build_model(config, tokenizer)
    check_tokenizer_compatibility(model, tokenizer, config.seq_len)
    compute, name = config.compute, type(model).__name__  # fully_shard changes the class
    set_residual_dtype(model, compute.residual, run.dtype)
    convert_to_float8(model, compute.precision, device=run.device, emulate=compute.emulate_float8)
    apply_activation_checkpointing(model, compute.activation_checkpointing)
    if compute.compile:
        compile_model(model, run.device)
    freeze(model, config.freeze)
    model.train()  # a classifier leaves what is frozen in evaluation mode
    parallelize(model, compute.strategy, run.device, run.dtype, compute.reduce_gradients)
    init_on_device(model, run.device, config.seed)
    if config.init_from and not run.resumes:
        load_hf_weights(model, config.init_from, config.seed)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    frozen = f", {total - trainable:,} of them frozen" if trainable < total else ""
    print(f"model: {name}, {total:,} parameters{frozen}", flush=True)
    return model


def compile_model(model: nn.Module, device: torch.device, backend: str = "inductor") -> None:
    """Compiles the model's blocks, one after the other, and what a `Transformer` has before and after them.

    Args:
        model: changed in place, after activation checkpointing and before sharding.
        device: where the model will run. On a CPU the embedding is not compiled: its backward pass would add up
            tokens in the order in which threads finish.
        backend: of `torch.compile`.
    """
    import torch._dynamo.config
    import torch._functorch.config  # a part of dynamo, which only compiled models need

    # As without compile, where the backward pass runs outside of autocast: a router's gradient stays in fp32.
    torch._functorch.config.backward_pass_autocast = "off"
    # Kinds of layers (global and local) times training and evaluation times shapes: all blocks share one limit.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    for block in transformer_blocks(model):
        block.compile(backend=backend)
    for module in model.modules():
        if isinstance(module, Transformer):
            module.compile_ends(embedding=device.type == "cuda", backend=backend)


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Excludes parameters from training.

    Args:
        model: changed in place.
        patterns: of parameter names, with `*` for any characters: `embedding.*`, `blocks.0.*`.

    Raises:
        UserError: a pattern matches nothing (code `no_such_parameter`), or nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        matching = [name for name in parameters if fnmatchcase(name, pattern)]
        if not matching:
            raise UserError(
                f"no parameter matches {pattern!r}",
                key="freeze",
                hint=f"Parameters are named like these: {', '.join(list(parameters)[:3])}, ...",
                code="no_such_parameter",
            )
        for name in matching:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise UserError("no parameter is left to train", key="freeze", code="nothing_to_train")


def _takes_seed(init_weights: Callable | None) -> bool:
    # Models of other libraries have methods of this name, without a seed.
    return callable(init_weights) and "seed" in inspect.signature(init_weights).parameters
