"""Shared parts of the families with mixtures of experts: checks, and the Hugging Face layout of stacked experts."""

import re
from itertools import islice
from typing import Any, ClassVar

import torch

from torchrecipes.errors import UserError
from torchrecipes.models.decoder import DecoderAdapter, complete_attention_keys
from torchrecipes.models.hf_adapter import KeyMap
from torchrecipes.models.stored_tensors import StoredTensor


def complete_experts_keys(config: Any, width: str = "moe_intermediate_size") -> None:
    """`complete_attention_keys`, and the sizes of a family's experts; `width` is the key of what is inside one.

    Raises:
        UserError: they do not fit each other, or `grouped_mm` cannot take them.
    """
    if hasattr(config, "mlp_only_layers"):
        object.__setattr__(config, "mlp_only_layers", tuple(config.mlp_only_layers))
    complete_attention_keys(config)
    problems = []
    if config.num_experts_per_tok > config.num_experts:
        problem = f"{config.num_experts_per_tok} is more than num_experts ({config.num_experts})"
        problems.append(UserError(problem, key="num_experts_per_tok"))
    layers, dense = config.num_hidden_layers, getattr(config, "mlp_only_layers", ())
    if beyond := [layer for layer in dense if not 0 <= layer < layers]:
        problem = f"{list(dense)} has {beyond[0]}, but layers count from 0 to {layers - 1}"
        problems.append(UserError(problem, key="mlp_only_layers"))
    for name in ("hidden_size", width):
        if getattr(config, name) % 8:
            problem = f"{getattr(config, name)} is not a multiple of 8, which grouped products need"
            problems.append(UserError(problem, key=name))
    for name in ("router_aux_loss_coef", "router_z_loss_coef"):
        if not getattr(config, name) >= 0:
            problems.append(UserError(f"{getattr(config, name)} is not a number of 0 or more", key=name))
    if problems:
        text = "; ".join(str(problem) for problem in problems)
        raise UserError(text, code="bad_size", problems=problems)


def has_experts(config: Any, layer: int) -> bool:
    """Whether a layer, counted from 0, is a mixture of experts."""
    return layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0


_SINGLE_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


class ExpertsAdapter(DecoderAdapter):
    """The layout of a decoder whose layers may be mixtures of experts."""

    ignored: ClassVar[frozenset[str]] = frozenset({"output_router_logits", "max_window_layers"})

    @staticmethod
    def read_keys(raw: dict) -> dict:
        """The keys under one name each, and lists as tuples."""
        keys = DecoderAdapter.read_keys(raw)
        if "num_local_experts" in keys:  # as transformers 5 writes it
            keys["num_experts"] = keys.pop("num_local_experts")
        layers = keys.get("mlp_only_layers", ())
        if "mlp_only_layers" in keys and (layers is None or isinstance(layers, list)):
            keys["mlp_only_layers"] = tuple(layers or ())
        return keys

    def mlp_key_map(self, layer: int) -> KeyMap:
        """Experts as `transformers` 5 holds them in memory, which it also reads from a file."""
        if hasattr(self.config, "mlp_only_layers") and not has_experts(self.config, layer):
            return super().mlp_key_map(layer)
        ours, hf = f"blocks.{layer}.mlp", f"model.layers.{layer}.mlp"
        names = ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
        return {f"{ours}.{name}": [(f"{hf}.{name}", self.config.num_experts)] for name in names}

    def prepare(self, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        """Stacks experts that are stored one by one."""
        return stack_single_experts(stored)


def stack_single_experts(stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Stacks the tensors of single experts, which `transformers` writes: one layer is read at a time.

    Raises:
        UserError: `weights_mismatch`: experts of a layer that are missing, not alike, or there in both forms.
    """
    stored, layers = dict(stored), {}
    for name in list(stored):
        if found := _SINGLE_EXPERT.fullmatch(name):
            layers.setdefault(found[1], {})[int(found[2]), found[3]] = stored.pop(name)
    for prefix, experts in layers.items():
        count = max(number for number, _ in experts) + 1
        wanted = ((number, kind) for number in range(count) for kind in ("gate", "up", "down"))
        missing = [
            f"{number}.{kind}_proj.weight" for number, kind in islice((one for one in wanted if one not in experts), 3)
        ]
        if missing:
            raise UserError(f"{prefix}: {', '.join(missing)} missing among {count} experts")
        if f"{prefix}.gate_up_proj" in stored or f"{prefix}.down_proj" in stored:
            raise UserError(f"{prefix} is stored twice, expert by expert and stacked. Delete one")
        for (number, kind), tensor in experts.items():
            first = experts[0, "down" if kind == "down" else "gate"]
            if (tensor.shape, tensor.dtype) != (first.shape, first.dtype):
                found = f"{tensor.shape} {tensor.dtype}, and expert 0 has {first.shape} {first.dtype}"
                raise UserError(f"{prefix}.{number}.{kind}_proj.weight has {found}")
        stored[f"{prefix}.gate_up_proj"] = _stacked(experts, count, "gate", "up")
        stored[f"{prefix}.down_proj"] = _stacked(experts, count, "down")
    return stored


def _stacked(experts: dict[tuple[int, str], StoredTensor], count: int, *kinds: str) -> StoredTensor:
    first = experts[0, kinds[0]]
    shape = (count, first.shape[0] * len(kinds), *first.shape[1:])

    def read() -> torch.Tensor:
        return torch.stack([torch.cat([experts[number, kind].read() for kind in kinds]) for number in range(count)])

    return StoredTensor(shape, first.dtype, read)
