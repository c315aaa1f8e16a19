"""Parameter groups for weight decay and for layer-wise learning rates, and a table of an optimizer's groups."""

import re
from collections import Counter

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


def layer_lr_groups(model: nn.Module, lr: float, decay: float, weight_decay: float) -> list[dict]:
    """Splits the groups of `weight_decay_groups` by layer: the nearer to the input, the smaller the learning rate.

    What is neither embedding nor block, that is head and final norm, has `lr`; the last of L blocks `lr * decay`, the
    one before `lr * decay^2`, and the embeddings `lr * decay^(L + 1)`, as in BEiT (Bao et al. 2021, arXiv:2106.08254).
    ELECTRA (Clark et al. 2020, arXiv:2003.10555) has one power of `decay` more for all but the head.

    Args:
        model: any module with numbered blocks, such as `encoder.blocks.0`; sharded or not.
        lr: the peak learning rate of the head.
        decay: factor from one layer to the next, above 0 and at most 1.
        weight_decay: of matrices, see `weight_decay_groups`.

    Returns:
        Groups as `weight_decay_groups` makes them, those of the head first, each with its `lr` and a name, `kind`.
    """
    blocks = _block_prefix(model)
    numbers = {name: _block_number(name, blocks) for name, _ in model.named_parameters()}
    depth = 1 + max((number for number in numbers.values() if number is not None), default=-1)
    embeddings = set()
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) or "embed" in f"{path}/{type(module).__name__}".lower():
            embeddings |= {f"{path}.{name}" if path else name for name, _ in module.named_parameters()}

    def layer_of(name: str) -> tuple[int, str]:
        if numbers[name] is not None:
            return depth - numbers[name], f"block {numbers[name]}"
        in_embedding = name in embeddings or "embed" in name.rpartition(".")[2]
        return (depth + 1, "embedding") if in_embedding else (0, "head")

    groups: dict[tuple[int, float], dict] = {}
    for group in weight_decay_groups(model, weight_decay):
        for name, parameter in group["params"]:
            power, kind = layer_of(name)
            rest = {"kind": kind, "lr": lr * decay**power, "weight_decay": group["weight_decay"]}
            found = groups.setdefault((power, -group["weight_decay"]), {"params": []} | rest)
            found["params"].append((name, parameter))
    return [groups[key] for key in sorted(groups)]


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


def _block_prefix(model: nn.Module) -> str:
    """What the names of the blocks' parameters begin with, as `encoder.blocks.`: most parameters with a number do."""
    sizes = Counter()
    for name, parameter in model.named_parameters():
        if found := re.match(r"(.*?)(?<![^.])\d+\.", name):
            sizes[found[1]] += parameter.numel()
    return sizes.most_common(1)[0][0] if sizes else "\0"


def _block_number(name: str, prefix: str) -> int | None:
    number = name.removeprefix(prefix).partition(".")[0]
    return int(number) if name.startswith(prefix) and number.isdigit() else None


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
