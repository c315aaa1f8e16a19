"""Restores a checkpoint: model, optimizer, named state and random generators."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from torchrecipes.checkpoint.optimizer_state import check_same_optimizer, like_stored, unflatten_optimizer
from torchrecipes.checkpoint.random_state import restore_random_state
from torchrecipes.checkpoint.resume import check_same_architecture
from torchrecipes.checkpoint.state import flatten_state, unflatten_state
from torchrecipes.checkpoint.tensor_files import iterate_shards, load_shards
from torchrecipes.errors import UserError
from torchrecipes.models.hub import stored_tensors
from torchrecipes.modules.init import copy_full


def restore_checkpoint(
    path: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tokenizer: Any,
    state: Mapping[str, Any],
    max_steps: int | None = None,
) -> int:
    """Sets everything to what a checkpoint holds, on any number of ranks, and returns its step.

    All of it is compared before any of it is changed.

    Args:
        path: the checkpoint's folder, verified.
        model, optimizer, tokenizer, state: see `Checkpointer`.
        max_steps: the last step of this run, for a check.

    Raises:
        UserError: the checkpoint is of another model, optimizer, tokenizer or data, or of a step after the last.
    """
    stored = json.loads((path / "state.json").read_text(encoding="utf-8"))
    step = stored["step"]
    if max_steps is not None and step > max_steps:
        raise UserError(
            f"{path} is of step {step:,}, and the run ends at step {max_steps:,}",
            key="max_steps",
            hint=f"Train for more steps, or take its weights alone: output_dir=OTHER init_from={path}",
            code="beyond_last_step",
        )
    fingerprint = getattr(tokenizer, "fingerprint", None)
    if stored["tokenizer"] != fingerprint:
        raise UserError(
            f"{path} was trained with another tokenizer (fingerprint {stored['tokenizer']}, current {fingerprint})",
            key="tokenizer",
            hint=f"Use the tokenizer in the checkpoint: tokenizer._component_=torchrecipes.data.tokenizers."
            f"load_tokenizer tokenizer.path={path}",
            code="other_tokenizer",
        )
    if stored["state"].keys() != state.keys():
        raise UserError(
            f"{path} has the state of {', '.join(stored['state']) or 'nothing'}, this run that of "
            f"{', '.join(state) or 'nothing'}",
            key="checkpoint.resume",
            hint="Resume with the recipe and settings that saved it, or train its weights from step 1: "
            f"init_from={path} output_dir=OTHER.",
            code="other_state",
        )
    check_same_architecture(path, model)
    check_same_optimizer(stored["optimizer"], optimizer, model, str(path))
    parameters = model.state_dict()
    with torch.no_grad():
        for name, tensor in stored_tensors(model, path):
            copy_full(parameters[name], tensor)
    scalars = stored["optimizer"]["scalars"]
    tensors = iterate_shards(path / "optimizer", lambda key, meta: like_stored(key, meta, model, scalars))
    scheduled = any(isinstance(obj, LRScheduler) for obj in state.values())
    unflatten_optimizer(tensors, stored["optimizer"], optimizer, model, str(path), scheduled)
    _load_state(path, stored["state"], state)
    restore_random_state(stored["random"], load_file(path / "rng.safetensors"), step)
    return step


def _load_state(path: Path, stored: dict, state: Mapping[str, Any]) -> None:
    _, current = flatten_state({name: obj.state_dict() for name, obj in state.items()})

    def like(key: str, meta: Any) -> Tensor:
        now = current.get(key)
        if now is not None and now.shape == meta.size:
            return torch.empty_like(now, dtype=meta.properties.dtype, requires_grad=False)
        return torch.empty(meta.size, dtype=meta.properties.dtype)

    values = unflatten_state(stored, load_shards(path / "state", like))
    for name, obj in state.items():
        obj.load_state_dict(values[name])
