"""Gradients of a device compared with those of the CPU: kernels of `mps` have been wrong, silently."""

import copy
from types import ModuleType
from typing import Any

import torch
from torch import nn

from torchrecipes.data.batching.loader import largest_micro_batch
from torchrecipes.planning.fake_model import tokenizer_for
from torchrecipes.training.precision import autocast, resolve_dtype


def gradient_error(recipe: ModuleType, config: Any, device: torch.device) -> float:
    """The distance of a micro-batch's gradients on `device` from those of the CPU in fp32, as a share of their norm.

    In fp32 it is about 1e-5, in fp16 1e-3, in bf16 1e-2. The micro-batch has the run's size, since wrong kernels have
    been wrong for large tensors only; dropout is off.

    Args:
        recipe: the recipe's module.
        config: its config; `micro_batch_size: auto` counts as one row.
        device: the run's.
    """
    tokenizer = tokenizer_for(config)
    asked = config.micro_batch_size
    rows = 1 if asked == "auto" else largest_micro_batch(config.global_batch_size, asked)
    batch = recipe.build_collator(config, tokenizer).example_batch(rows, config.seq_len)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        with torch.device("cpu"):
            model = recipe.build_model(config, tokenizer)
    if any(parameter.is_meta for parameter in model.parameters()):  # from init_from, whose weights do not matter here
        model = model.to_empty(device="cpu")
        model.init_weights(config.seed)
    dtype = resolve_dtype(config.compute.precision, device, config.compute.emulate_float8)
    expected = _gradients(recipe, config, copy.deepcopy(model), batch, torch.device("cpu"), torch.float32)
    found = _gradients(recipe, config, model, batch, device, dtype)
    pairs = [(expected[name], found[name]) for name in expected]
    error = sum((ours - theirs).square().sum() for theirs, ours in pairs)
    return float((error / sum(theirs.square().sum() for theirs, _ in pairs)).sqrt())


def _gradients(
    recipe: ModuleType, config: Any, model: nn.Module, batch: Any, device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    model = model.to(device).eval()
    with autocast(device, dtype):
        loss, _ = recipe.compute_loss(model, batch.to(device), config)
    (loss / max(1, batch.num_targets)).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: gradient.cpu().double() for name, gradient in gradients.items() if gradient is not None}
