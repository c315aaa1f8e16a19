"""LoRA: trains low-rank updates of linear layers and nothing else (Hu et al. 2021, arXiv:2106.09685).

A layer computes `x W^T + scale * x A^T B^T` with a frozen `W [out, in]`, and `A [rank, in]` and `B [out, rank]` that
are trained; B is 0 at the start. Where a weight stacks several matrices, such as queries, keys and values, each has an
A and a B of its own, as in a model that does not stack them. The main product stays one.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchrecipes.errors import UserError
from torchrecipes.modules.blocks import transformer_blocks
from torchrecipes.modules.init import init_parameter


@dataclass
class LoRASettings:
    """How LoRA was applied to a model, as `model.lora`.

    Attributes:
        rank, alpha, dropout, rslora: see `apply_lora`.
        trained: names of the parameters that train in full beside A and B.
        base: the folder that the frozen weights were loaded from; None: not known.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    trained: tuple[str, ...] = ()
    base: str | None = None

    @property
    def scale(self) -> float:
        """The factor of the update."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def check(self) -> None:
        """Checks the values.

        Raises:
            UserError: `out_of_range`, with the key of the value.
        """
        if not isinstance(self.rank, int) or self.rank < 1:
            raise UserError(f"{self.rank} is not an integer of 1 or more", key="rank", code="out_of_range")
        if not self.alpha > 0:
            raise UserError(f"{self.alpha} is not above 0", key="alpha", code="out_of_range")
        if not 0 <= self.dropout < 1:
            raise UserError(f"{self.dropout} is not at least 0 and below 1", key="dropout", code="out_of_range")


class LoRALinear(nn.Linear):
    """A linear layer with LoRA. Weight and bias keep their names and are frozen.

    Parameters beside those of `nn.Linear`, in the weight's dtype: `lora_A` `[parts * rank, in]` and `lora_B`
    `[rows with LoRA, rank]`, both stacked in the order of the parts.

    Attributes:
        is_merged: whether the update is part of the weight (`merge`).

    Args:
        base: its parameters are taken over.
        rank, scale: r, and the factor of the update.
        rows: the first row and the number of rows of every part of the weight that gets LoRA, in order. None: the
            weight is one part.
        dropout: probability of dropping an element of what enters A, in training; the mask is shared by the parts.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        scale: float,
        rows: Sequence[tuple[int, int]] | None = None,
        dropout: float = 0.0,
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.training = base.weight, base.training
        self.register_parameter("bias", base.bias)
        self.rank, self.scale, self.dropout = rank, scale, dropout
        self.rows = tuple(rows or [(0, self.out_features)])
        like = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.lora_A = nn.Parameter(torch.empty(len(self.rows) * rank, self.in_features, **like))
        self.lora_B = nn.Parameter(torch.empty(sum(size for _, size in self.rows), rank, **like))
        self.is_merged = False
        self._blocks: list[tuple[bool, int]] = []  # of the weight's rows: whether they have LoRA, and how many
        end = 0
        for first, size in self.rows:
            self._blocks += [(False, first - end)] * (first > end) + [(True, size)]
            end = first + size
        if end < self.out_features:
            self._blocks.append((False, self.out_features - end))

    def extra_repr(self) -> str:
        """The sizes."""
        return f"{super().extra_repr()}, rank={self.rank}, scale={self.scale:g}, parts={len(self.rows)}"

    def forward(self, x: Tensor) -> Tensor:
        """Args: x `[..., in]`. Returns: `[..., out]`."""
        out = F.linear(x, self.weight, self.bias)
        if self.is_merged:
            return out
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        low = F.linear(x, self.lora_A) * self.scale
        # One product for all parts, which adds to `out` as it is stored.
        return torch.addmm(out.flatten(0, -2), low.flatten(0, -2), self._wide_B().t()).view(out.shape)

    def _wide_B(self) -> Tensor:
        """`[out, parts * rank]`: the parts' B on the diagonal, 0 elsewhere."""
        if len(self._blocks) == 1:
            return self.lora_B
        pieces = iter(self.lora_B.split([size for _, size in self.rows]))
        return torch.block_diag(*(next(pieces) if has else self.lora_B.new_zeros(n, 0) for has, n in self._blocks))

    @torch.no_grad()
    def merged(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor, sign: int = 1) -> Tensor:
        """The weight with the update of these A and B added to it, or taken away with `sign=-1`; in a new tensor."""
        weight = weight.clone()
        pieces = zip(self.rows, lora_A.split(self.rank), lora_B.split([n for _, n in self.rows]), strict=True)
        for (first, size), A, B in pieces:
            weight[first : first + size].addmm_(B, A, alpha=sign * self.scale)
        return weight

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the update to the weight, see `merge_lora`."""
        if not self.is_merged:
            self.weight.copy_(self.merged(self.weight, self.lora_A, self.lora_B))
        self.is_merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes the update out of the weight again."""
        if self.is_merged:
            self.weight.copy_(self.merged(self.weight, self.lora_A, self.lora_B, sign=-1))
        self.is_merged = False


def apply_lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    targets: Literal["attention", "all_linear"] | list[str] = "attention",
    dropout: float = 0.0,
    rslora: bool = False,
    modules_to_save: list[str] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Adds LoRA to linear layers of a model, in place, and freezes everything else.

    Any model takes it: ours on the meta device or loaded, and modules of your own. Call it before anything that wraps
    or shards the model: in a recipe, in `build_model`. Optimizers take the parameters that train by `requires_grad`.

        model = apply_lora(load_hf("folder"), rank=16, targets="all_linear")

    Args:
        model: changed in place.
        rank: r; more is more capacity.
        alpha: the update is scaled by `alpha / rank`.
        targets: `attention`: the projections of attention layers; `all_linear`: all linear layers of the blocks
            (Dettmers et al. 2023, arXiv:2305.14314: it takes all to match full fine-tuning); or names of layers, with
            `*` for any characters: ours (`blocks.0.*.qkv_proj`), or Hugging Face's, whose last parts are enough
            (`query`, `v_proj`), as in peft's `target_modules`.
        dropout: probability of dropping an element of what enters A, in training.
        rslora: scales by `alpha / sqrt(rank)`, so that a larger rank does not slow down training (Kalajdzievski 2023,
            arXiv:2312.03732).
        modules_to_save: patterns of parameters or modules that train in full, such as a new head, and are stored with
            A and B. None: everything beside `model.encoder`, where a model has one: a classifier, a projection.
        seed: of A, for a model that has its weights; on the meta device A is initialized with the model.

    Returns:
        The model, with `model.lora`, a `LoRASettings`.

    Raises:
        UserError: a value is out of range; no layer or parameter matches (`no_such_layer`, `no_such_parameter`); the
            model has LoRA already (`has_lora`).
    """
    settings = LoRASettings(rank, alpha, dropout, rslora)
    settings.check()
    if lora_layers(model):
        raise UserError("the model has LoRA already", key="lora", code="has_lora")
    chosen = _chosen_parts(model, targets)
    settings.trained = tuple(_also_trained(model, modules_to_save))
    add_lora_layers(model, chosen, settings)
    init_lora(model, seed)
    return model


def add_lora_layers(model: nn.Module, rows: Mapping[str, Sequence[tuple[int, int]]], settings: LoRASettings) -> None:
    """Replaces linear layers by `LoRALinear`s whose A and B are not initialized, and freezes everything else.

    Args:
        model: changed in place; it gets `settings` as `model.lora`.
        rows: name of a layer -> the rows of its weight that get LoRA, see `LoRALinear`.
        settings: see `LoRASettings`.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in settings.trained)
    for name, parts in rows.items():
        layer = LoRALinear(model.get_submodule(name), settings.rank, settings.scale, parts, settings.dropout)
        model.set_submodule(name, layer)
    model.lora = settings


def layer_parts(model: nn.Module, name: str) -> list[tuple[str, int, int]]:
    """The matrices that the weight of a linear layer stacks: Hugging Face's name of each, first row, number of rows.

    Args:
        model: with an `hf_adapter`, or any.
        name: of the layer.
    """
    adapter = getattr(model, "hf_adapter", None)
    weight = f"{name}.weight"
    parts = adapter.parts(weight) if adapter else [(weight, 0)]
    if len(parts) == 1:
        return [(parts[0][0].removesuffix(".weight"), 0, model.get_submodule(name).out_features)]
    found, first = [], 0
    for hf_name, rows in parts:
        found.append((hf_name.removesuffix(".weight"), first, rows))
        first += rows
    return found


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers with LoRA, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def init_lora(model: nn.Module, seed: int) -> None:
    """Sets every A to its initial value, a function of (seed, name), and every B to 0 (`init_tensor`)."""
    for name, layer in lora_layers(model).items():
        if not layer.weight.is_meta:
            init_parameter(layer.lora_A, f"{name}.lora_A", seed=seed, std=0.0)
            init_parameter(layer.lora_B, f"{name}.lora_B", seed=seed, std=0.0)


def merge_lora(model: nn.Module) -> None:
    """Adds all updates to their weights, so that the model computes as fast as without LoRA, until `unmerge_lora`.

    Not for training, and not for a sharded model. Saving needs no merge: a saved folder has merged weights.
    """
    for layer in lora_layers(model).values():
        layer.merge()


def unmerge_lora(model: nn.Module) -> None:
    """Takes all updates out of their weights again, which restores them up to rounding."""
    for layer in lora_layers(model).values():
        layer.unmerge()


def without_lora(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's state without the A and B of its layers: what a folder of the model holds."""
    extra = {f"{name}.{kind}" for name in lora_layers(model) for kind in ("lora_A", "lora_B")}
    return {name: tensor for name, tensor in state.items() if name not in extra}


def merged_tensors(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `without_lora`, one at a time, in full if they are sharded, and with the updates in the weights.

    Args:
        model: gives the layers; its values are not read.
        state: all tensors of the model, by name; the same on all ranks.
    """
    layers = {f"{name}.weight": (name, layer) for name, layer in lora_layers(model).items() if not layer.is_merged}
    for name, tensor in without_lora(model, state).items():
        tensor = full_tensor(tensor)
        if name in layers:
            prefix, layer = layers[name]
            tensor = layer.merged(tensor, *(full_tensor(state[f"{prefix}.{kind}"]) for kind in ("lora_A", "lora_B")))
        yield name, tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor, detached, gathered if it is sharded."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class LoRAState:
    """What a checkpoint has beside the merged weights, to resume exactly: frozen weights of the layers, A and B.

    Args:
        model: with LoRA.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def state_dict(self) -> dict:
        """Settings, and tensors by name, as they are sharded.

        Raises:
            RuntimeError: the updates are merged into the weights (`merge_lora`).
        """
        if any(layer.is_merged for layer in lora_layers(self.model).values()):
            raise RuntimeError("call unmerge_lora(model) before saving it")
        state = self.model.state_dict()
        kinds = ("weight", "lora_A", "lora_B")
        tensors = {f"{name}.{kind}": state[f"{name}.{kind}"] for name in lora_layers(self.model) for kind in kinds}
        return {"settings": asdict(self.model.lora), "tensors": tensors}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` gave.

        Raises:
            UserError: it is of other layers or settings (code `other_model`).
        """
        current = self.state_dict()
        stored, settings = state["tensors"], state["settings"]
        same = stored.keys() == current["tensors"].keys() and all(
            settings[key] == current["settings"][key] for key in ("rank", "alpha", "rslora")
        )
        if not same:
            raise UserError(
                "the checkpoint has LoRA with other layers, rank or scale",
                key="lora",
                hint=f"Use the settings that it was saved with: rank {settings['rank']}, alpha {settings['alpha']}.",
                code="other_model",
            )
        self.model.lora.base = settings["base"]
        for name, tensor in current["tensors"].items():
            tensor.copy_(stored[name])


def _chosen_parts(model: nn.Module, targets: str | Sequence[str]) -> dict[str, list[tuple[int, int]]]:
    """Layer -> the rows of each of its parts that is to have LoRA."""
    # Subclasses compute something else: `nn.MultiheadAttention`, for one, never calls its output layer.
    linear = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    parts = {name: layer_parts(model, name) for name in linear}
    if isinstance(targets, str):
        in_blocks = {id(module) for block in transformer_blocks(model) for module in block.modules()}
        chosen = [name for name, module in linear.items() if id(module) in in_blocks]
        if targets == "attention":
            chosen = [name for name in chosen if "attn" in name or "attention" in name]
        matching = {targets: {name: parts[name] for name in chosen}}
    else:
        matching = {
            pattern: {
                name: found
                for name in linear
                if (found := [part for part in parts[name] if _matches(pattern, name) or _matches(pattern, part[0])])
            }
            for pattern in targets
        }
    for pattern, found in matching.items():
        if not found:
            names = [part[0] for name in linear for part in parts[name]]
            raise UserError(
                f"no linear layer of the model matches {pattern!r}",
                key="lora.targets",
                hint=f"Its layers are named like these: {', '.join(names[:3])}, ..." if names else "It has none.",
                code="no_such_layer",
            )
    return {
        name: [part[1:] for part in parts[name] if any(part in found.get(name, ()) for found in matching.values())]
        for name in linear
        if any(name in found for found in matching.values())
    }


def _matches(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or name.endswith(f".{pattern}")


def _also_trained(model: nn.Module, patterns: Sequence[str] | None) -> list[str]:
    names = [name for name, _ in model.named_parameters()]
    if patterns is None:
        has_encoder = isinstance(getattr(model, "encoder", None), nn.Module)
        return [name for name in names if has_encoder and not name.startswith("encoder.")]
    found = {
        pattern: [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")]
        for pattern in patterns
    }
    for pattern, matching in found.items():
        if not matching:
            raise UserError(
                f"no parameter matches {pattern!r}",
                key="lora.modules_to_save",
                hint=f"Parameters are named like these: {', '.join(names[:3])}, ...",
                code="no_such_parameter",
            )
    return [name for name in names if any(name in matching for matching in found.values())]
