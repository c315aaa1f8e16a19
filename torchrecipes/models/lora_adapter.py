"""LoRA to and from peft's folders: `adapter_model.safetensors` and `adapter_config.json`."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from torchrecipes.atomic_write import write_atomically
from torchrecipes.errors import UserError
from torchrecipes.model_folder import resolve_model_folder
from torchrecipes.models.config_json import read_json
from torchrecipes.models.hf_adapter import adapter_of
from torchrecipes.models.hub import write_tensors
from torchrecipes.modules.init import copy_full
from torchrecipes.modules.lora import LoRASettings, add_lora_layers, full_tensor, layer_parts, lora_layers

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."  # peft's, before every name
_MATRIX = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
_TASKS = {"ForSequenceClassification": "SEQ_CLS", "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM"}
_TASKS |= {"Model": "FEATURE_EXTRACTION"}


def save_lora(model: nn.Module, path: str | Path) -> None:
    """Writes the A and B of a model, and what else was trained, as a folder for `peft.PeftModel.from_pretrained`.

    It goes with the model that LoRA was applied to, not with the merged one that `save_hf` and checkpoints write.

    Args:
        model: with LoRA, not sharded.
        path: the folder; created if missing.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / CONFIG, [peft_config(model).encode()])
    write_tensors(peft_tensors(model, model.state_dict()), folder / TENSORS)


def peft_tensors(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `adapter_model.safetensors` holds, in full if it is sharded.

    Args:
        model: with LoRA; its values are not read.
        state: all tensors of the model, by name; the same on all ranks.
    """
    adapter, tensors = adapter_of(model), {}
    for name, layer in lora_layers(model).items():
        A = full_tensor(state[f"{name}.lora_A"]).split(layer.rank)
        B = full_tensor(state[f"{name}.lora_B"]).split([size for _, size in layer.rows])
        for part, A_part, B_part in zip(_trained_parts(model, name), A, B, strict=True):
            tensors[f"{_PREFIX}{part}.lora_A.weight"] = A_part
            tensors[f"{_PREFIX}{part}.lora_B.weight"] = B_part
    for name in _saved_in_full(model):
        tensors |= {f"{_PREFIX}{key}": value for key, value in adapter.split(name, full_tensor(state[name])).items()}
    return tensors


def peft_config(model: nn.Module) -> str:
    """The contents of `adapter_config.json`."""
    adapter, settings = adapter_of(model), model.lora
    targets = [part for name in lora_layers(model) for part in _trained_parts(model, name)]
    saved = {hf_name.rpartition(".")[0] for name in _saved_in_full(model) for hf_name, _ in adapter.parts(name)}
    config = {
        "peft_type": "LORA",
        "task_type": next((task for end, task in _TASKS.items() if adapter.architecture.endswith(end)), None),
        "base_model_name_or_path": settings.base,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "target_modules": _shortest(targets, model),
        "modules_to_save": sorted(saved) or None,
        "fan_in_fan_out": any(adapter.transposed(f"{name}.weight") for name in targets),
        "bias": "none",
        "inference_mode": True,
    }
    return json.dumps(config, indent=2) + "\n"


def load_lora(model: nn.Module, path: str | Path) -> nn.Module:
    """Loads A and B that peft or a checkpoint saved, and what else was trained. A model without LoRA gets it.

    Args:
        model: with the weights that the adapter was trained on; in fp32, on its device, sharded only if it has LoRA.
        path: a folder with `adapter_model.safetensors`, or a checkpoint or a run with an `adapter` folder.

    Returns:
        The model.

    Raises:
        UserError: no such folder (`not_found`); a kind of LoRA that is not supported (`unsupported_adapter`); tensors
            that do not fit the model (`weights_mismatch`, with `problems`).
    """
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        folder = resolve_model_folder(path) / "adapter"
    if not (folder / CONFIG).is_file() or not (folder / TENSORS).is_file():
        raise UserError(
            f"{path} has no {CONFIG} and {TENSORS}",
            hint="Give a folder that peft's save_pretrained() or a run with LoRA wrote",
            code="not_found",
        )
    settings = _read_settings(folder / CONFIG)
    matrices, others = _read_tensors(folder / TENSORS, model)
    parts = {name: layer_parts(model, name) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    chosen = {
        name: [(first, size) for part, first, size in found if part in matrices]
        for name, found in parts.items()
        if any(part in matrices for part, _, _ in found)
    }
    adapter, problems = adapter_of(model), []
    known = {part for found in parts.values() for part, _, _ in found}
    problems += [UserError("is not a linear layer of the model", key=part) for part in matrices if part not in known]
    for name, found in parts.items():
        width = model.get_submodule(name).in_features
        for part, _, rows in found:
            shapes = {kind: tuple(tensor.shape) for kind, tensor in matrices.get(part, {}).items()}
            expected = {"A": (settings.rank, width), "B": (rows, settings.rank)}
            if shapes and shapes != expected:
                problems.append(UserError(f"has A and B of {shapes}, the model needs {expected}", key=part))
    full = {name: adapter.parts(name) for name in model.state_dict() if f".{name.rpartition('.')[2]}" not in _OWN}
    trained = [name for name, stored in full.items() if all(hf_name in others for hf_name, _ in stored)]
    used = {hf_name for name in trained for hf_name, _ in full[name]}
    problems += [UserError("is not a tensor of the model", key=name) for name in others if name not in used]
    if not matrices:
        problems.append(UserError("no A and B in it", key=TENSORS))
    if problems:
        raise UserError(
            f"{folder}: the adapter does not fit the model:\n"
            + "\n".join(f"  {problem}" for problem in sorted(problems, key=str)),
            hint="Load the model that it was trained on",
            code="weights_mismatch",
            problems=problems,
        )
    settings.trained = tuple(trained)
    layers = lora_layers(model)
    if not layers:
        add_lora_layers(model, chosen, settings)
    elif {name: list(layer.rows) for name, layer in layers.items()} != chosen or model.lora.rank != settings.rank:
        raise UserError("the model has LoRA of other layers or another rank", key="lora", code="weights_mismatch")
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            found = [matrices[part] for part in _trained_parts(model, name)]
            copy_full(layer.lora_A, torch.cat([pair["A"] for pair in found]))
            copy_full(layer.lora_B, torch.cat([pair["B"] for pair in found]))
        parameters = model.state_dict()
        for name in trained:
            copy_full(parameters[name], adapter.join(full[name], others.__getitem__))
    return model


_OWN = (".lora_A", ".lora_B")


def _saved_in_full(model: nn.Module) -> list[str]:
    """The parameters that were trained in full and belong to the model that peft wraps, not to a folder beside it."""
    parts = adapter_of(model).parts
    return [name for name in model.lora.trained if all("/" not in hf_name for hf_name, _ in parts(name))]


def _trained_parts(model: nn.Module, name: str) -> list[str]:
    """Hugging Face's names of the parts of a layer that have LoRA."""
    rows = model.get_submodule(name).rows
    return [part for part, first, size in layer_parts(model, name) if (first, size) in rows]


def _shortest(targets: list[str], model: nn.Module) -> list[str]:
    """The targets without what comes before a layer's number, if they mean the same layers then."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    short = sorted({re.sub(r"^.*\.\d+\.", "", target) for target in targets})
    meant = {
        part
        for name in linear
        for part, _, _ in layer_parts(model, name)
        if any(part == end or part.endswith(f".{end}") for end in short)
    }
    return short if meant == set(targets) else targets


def _read_settings(file: Path) -> LoRASettings:
    config: dict[str, Any] = read_json(file)
    plain = {"use_dora": (False, None), "bias": ("none", None), "rank_pattern": ({}, None), "alpha_pattern": ({}, None)}
    plain |= {"peft_type": ("LORA",), "lora_bias": (False, None)}
    for key, values in plain.items():
        if config.get(key) not in values:
            raise UserError(
                f"{file}: {key} is {config.get(key)!r}, which is not supported",
                hint="Merge it into its model with peft: model.merge_and_unload().save_pretrained(folder)",
                code="unsupported_adapter",
            )
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    settings = LoRASettings(rank, alpha, config.get("lora_dropout") or 0.0, bool(config.get("use_rslora")))
    settings.check()
    settings.base = config.get("base_model_name_or_path")
    return settings


def _read_tensors(file: Path, model: nn.Module) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """(Layer -> its A and B, tensor -> its value), under the names that the model's adapter has for them."""
    normalize = adapter_of(model).normalize_name
    matrices, others = {}, {}
    with safe_open(file, framework="pt") as stored:
        for key in stored.keys():  # noqa: SIM118, it is no dict
            name = key.removeprefix(_PREFIX)
            if found := _MATRIX.fullmatch(name):
                layer = normalize(f"{found[1]}.weight") or f"{found[1]}.weight"
                matrices.setdefault(layer.removesuffix(".weight"), {})[found[2]] = stored.get_tensor(key).float()
            else:
                others[normalize(name) or name] = stored.get_tensor(key)
    return matrices, others
