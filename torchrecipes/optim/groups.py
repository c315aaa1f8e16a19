"""Parameter groups for weight decay, and a table of an optimizer's groups."""

import re

import torch
from torch import nn


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Splits the trainable parameters of `model` into one group with weight decay and one without.

    Matrices, that is parameters of two or more dimensions, are decayed; embeddings, norms and biases are not. An
    embedding is a parameter of an `nn.Embedding`, an `nn.EmbeddingBag` or a module with Embedding in its class name,
    and one whose own name says so (`position_embedding`). A parameter that several modules share is exempt if it is for
    any of them: a tied output layer is an embedding, an untied one is a matrix.

    Args:
        model: any module, sharded or not.
        weight_decay: of the first group; that of the second is 0.

    Returns:
        One or two groups for a `torch.optim` optimizer (an empty one is left out): each has `weight_decay` and
        `params`, (name, parameter) pairs in the model's order, so that the optimizer keeps the names as `param_names`.
    """
    exempt = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if _is_exempt(module, name, parameter):
                exempt.add(id(parameter))
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [pair for pair in trainable if id(pair[1]) not in exempt]
    others = [pair for pair in trainable if id(pair[1]) in exempt]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def describe_param_groups(optimizer: torch.optim.Optimizer) -> str:
    """The groups of `optimizer` as text: learning rate, weight decay and size of each, and its parameters.

    Parameters whose names differ in numbers only (the layers of a model) share a line:

        group 1: lr 0.001, weight_decay 0.01, 36 tensors, 9,437,184 parameters
            blocks.*.attention.qkv_proj.weight   [768, 256]    6 x 196,608

    The learning rate is the peak (`initial_lr`) if there is a scheduler. Names are shown if the optimizer was given
    named parameters.
    """
    lines = []
    for number, group in enumerate(optimizer.param_groups, start=1):
        parameters = group["params"]
        rate = float(group.get("initial_lr", group["lr"]))
        total = sum(p.numel() for p in parameters)
        decay = group.get("weight_decay", 0)
        kind = f"{group['kind']}, " if "kind" in group else ""
        size = f"{len(parameters)} tensors, {total:,} parameters"
        lines.append(f"group {number}: {kind}lr {rate:g}, weight_decay {decay:g}, {size}")
        names = group.get("param_names") or ["(no name)"] * len(parameters)
        counts: dict[tuple[str, tuple], int] = {}
        for name, parameter in zip(names, parameters, strict=True):
            key = re.sub(r"(?<![^.])\d+(?![^.])", "*", name), tuple(parameter.shape)
            counts[key] = counts.get(key, 0) + 1
        name_width = max((len(name) for name, _ in counts), default=0)
        shape_width = max((len(str(list(shape))) for _, shape in counts), default=0)
        for (name, shape), count in counts.items():
            size = f"{count:>3} x {torch.Size(shape).numel():,}"
            lines.append(f"    {name:<{name_width}}  {list(shape)!s:<{shape_width}}  {size}")
    return "\n".join(lines)


def _is_exempt(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    kind = type(module).__name__.lower()
    return (
        parameter.ndim < 2
        or name == "bias"
        or name.endswith("_bias")
        or kind.endswith("norm")
        or isinstance(module, nn.Embedding | nn.EmbeddingBag)
        or "embedding" in kind
        or "embed" in name
    )
