"""What the families with mixtures of experts have in common: blocks, checks, and the key_map of stacked experts."""

import re
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from torchrecipes.errors import UserError
from torchrecipes.models.hf_adapter import KeyMap
from torchrecipes.modules import MoE, MoEBlock, PreNormBlock, RMSNorm, SwiGLU


def check_experts(config: Any, width: str = "moe_intermediate_size") -> None:
    """Checks the sizes of a family's experts; `width` is the key of what is inside one.

    Raises:
        UserError: they do not fit each other, or `grouped_mm` cannot take them.
    """
    problems = []
    if config.num_experts_per_tok > config.num_experts:
        problems.append(
            f"num_experts_per_tok={config.num_experts_per_tok} is more than num_experts={config.num_experts}"
        )
    layers, dense = config.num_hidden_layers, getattr(config, "mlp_only_layers", ())
    if beyond := [layer for layer in dense if not 0 <= layer < layers]:
        problems.append(f"mlp_only_layers={list(dense)} names {beyond[0]}, but layers count from 0 to {layers - 1}")
    for name in ("hidden_size", width):
        if getattr(config, name) % 8:
            problems.append(f"{name}={getattr(config, name)} is not a multiple of 8, which grouped products need")
    for name in ("router_aux_loss_coef", "router_z_loss_coef"):
        if not getattr(config, name) >= 0:
            problems.append(f"{name}={getattr(config, name)} is not a number of 0 or more")
    if problems:
        raise UserError(f"model: {'; '.join(problems)}")


def has_experts(config: Any, layer: int) -> bool:
    """Whether a layer, counted from 0, is a mixture of experts."""
    return layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0


def dense_block(config: Any, attention: nn.Module) -> PreNormBlock:
    """A layer without experts."""
    return PreNormBlock(mlp=SwiGLU(config.hidden_size, config.intermediate_size), **_around(config, attention))


def moe_block(config: Any, attention: nn.Module, experts: MoE) -> MoEBlock:
    """A layer with experts."""
    return MoEBlock(mlp=experts, **_around(config, attention))


def _around(config: Any, attention: nn.Module) -> dict[str, nn.Module]:
    norms = {name: RMSNorm(config.hidden_size, config.rms_norm_eps) for name in ("attention_norm", "mlp_norm")}
    return {"self_attn": attention} | norms


# The Hugging Face key_map.

_OF_ONE_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def stack_experts(hf: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stored tensors with those of single experts stacked: on disk `transformers` has one for each, in memory one.

    What is stacked already stays.

    Args:
        hf: tensors by name. Those of single experts are taken out, so that no more than a layer is held twice.

    Raises:
        UserError: a layer whose experts are not all there, not alike, or there in both ways.
    """
    layers: dict[str, dict[tuple[int, str], str]] = {}
    for name in hf:
        if found := _OF_ONE_EXPERT.fullmatch(name):
            layers.setdefault(found[1], {})[int(found[2]), found[3]] = name
    for prefix, names in layers.items():
        count = max(number for number, _ in names) + 1
        wanted = ((number, kind) for number in range(count) for kind in ("gate", "up", "down"))
        missing = list(
            islice((f"{number}.{kind}_proj.weight" for number, kind in wanted if (number, kind) not in names), 3)
        )
        if missing:
            raise UserError(f"{prefix}: {', '.join(missing)} missing among {count} experts. Save the folder again.")
        if f"{prefix}.gate_up_proj" in hf or f"{prefix}.down_proj" in hf:
            raise UserError(f"{prefix} is there twice, expert by expert and stacked. Delete one.")
        part = {key: hf.pop(name) for key, name in names.items()}
        for (number, kind), tensor in part.items():
            like = (0, "down" if kind == "down" else "gate")
            if tensor.shape != part[like].shape:
                shapes = f"{tuple(tensor.shape)}, and {names[like]} {tuple(part[like].shape)}"
                raise UserError(f"{names[number, kind]} has the shape {shapes}. Save the folder again.")
        gates_and_ups = [torch.cat((part[number, "gate"], part[number, "up"])) for number in range(count)]
        hf[f"{prefix}.gate_up_proj"] = torch.stack(gates_and_ups)
        hf[f"{prefix}.down_proj"] = torch.stack([part[number, "down"] for number in range(count)])
    return hf


def experts_key_map(layer: int, experts: int) -> KeyMap:
    """The key_map of a layer of experts: as `transformers` 5 holds it in memory, which it also reads from a file."""
    local, hf = f"blocks.{layer}.mlp", f"model.layers.{layer}.mlp"
    names = ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
    return {f"{local}.{name}": [(f"{hf}.{name}", experts)] for name in names}


def read_experts_keys(keys: dict) -> dict:
    """The keys of config.json under one name each, and lists as tuples."""
    keys = dict(keys)
    if "num_local_experts" in keys:  # as transformers 5 writes it
        keys["num_experts"] = keys.pop("num_local_experts")
    layers = keys.get("mlp_only_layers", ())
    if layers is None or isinstance(layers, list):
        keys["mlp_only_layers"] = tuple(layers or ())
    return keys
