"""An optimizer's state by parameter names: tensors for a safetensors file, and a description for a JSON file.

`torch.optim` numbers its parameters, and a number means another parameter once a group is split or a layer added. A
name does not, so state that belongs to no parameter is refused.
"""

from collections.abc import Collection, Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from torchrecipes.checkpoint.quantized_state import from_plain, to_plain
from torchrecipes.errors import UserError

SCHEDULED = {"lr", "momentum", "betas"}  # settings that torch's learning-rate schedulers change


def flatten_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> tuple[dict[str, Tensor], dict]:
    """Splits the optimizer's state into tensors and a JSON description.

    Returns:
        The tensors as `<kind>.<parameter>`, such as `exp_avg.head.bias`; a scalar gets one dimension. And a
        description: the optimizer's class; its groups, each with its settings and its parameters' shapes; values that
        are no tensors; the names of the scalars.

    Raises:
        ValueError: the optimizer has a parameter that is not the model's.
    """
    tensors, values, scalars = {}, {}, []
    for name, parameter in _named(optimizer, model):
        for kind, value in optimizer.state.get(parameter, {}).items():
            key = f"{kind}.{name}"
            if not isinstance(value, Tensor):
                values[key] = value
                continue
            if value.dim() == 0:
                scalars.append(key)
            tensors[key] = to_plain(value.detach()).reshape(value.shape or (1,)).contiguous()
    groups = [
        {key: _json_value(value) for key, value in group.items() if key != "params"}
        | {"parameters": {name: list(parameter.shape) for name, parameter in _named(optimizer, model, number)}}
        for number, group in enumerate(optimizer.param_groups)
    ]
    kind = type(optimizer).__name__
    return tensors, {"class": kind, "groups": groups, "values": values, "scalars": sorted(scalars)}


def check_same_optimizer(description: dict, optimizer: torch.optim.Optimizer, model: nn.Module, where: str) -> None:
    """Checks that a state belongs to this optimizer and these parameters.

    Args:
        description: from `flatten_optimizer`.
        optimizer, model: the ones that are to have it.
        where: names the source in errors.

    Raises:
        UserError: the state is of another class of optimizer, or of other parameters (code `other_optimizer`); names
            what differs.
    """
    parameters = dict(_named(optimizer, model))
    stored = {name: shape for group in description["groups"] for name, shape in group["parameters"].items()}
    problems = [f"{name} is trained now and is not in it" for name in parameters if name not in stored]
    problems += [f"{name} is in it and is not trained now" for name in stored if name not in parameters]
    problems += [
        f"{name} has the shape {shape} in it, and {list(parameters[name].shape)} now"
        for name, shape in stored.items()
        if name in parameters and list(parameters[name].shape) != shape
    ]
    if (current := type(optimizer).__name__) != description["class"]:
        problems = [f"it is of {description['class']}, and this run's optimizer is {current}"]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise UserError(
            f"{where}: its optimizer's state does not fit: {shown}",
            key="optimizer",
            hint=f"Use the settings it was trained with, or train its weights from step 1: init_from={where}.",
            code="other_optimizer",
        )


def like_stored(key: str, stored: TensorStorageMetadata, model: nn.Module, scalars: Collection[str] = ()) -> Tensor:
    """An empty tensor to read a stored one into, sharded like its parameter if it has the parameter's shape.

    Args:
        key: `<kind>.<parameter>`.
        stored: its shape and dtype.
        model: has the parameter.
        scalars: keys of tensors without dimensions, which are stored with one; they are never sharded.
    """
    parameter = model.get_parameter(key.partition(".")[2])
    if parameter.shape == stored.size and key not in scalars:
        return torch.empty_like(parameter, dtype=stored.properties.dtype, requires_grad=False)
    return torch.empty(stored.size, dtype=stored.properties.dtype)


def unflatten_optimizer(
    tensors: Iterable[tuple[str, Tensor]],
    description: dict,
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    where: str,
    scheduled: bool = True,
) -> None:
    """Sets the optimizer's state to a flattened one, bit for bit. Its settings, such as weight decay, stay its own.

    Args:
        tensors: the items of what `flatten_optimizer` returned. Each takes the optimizer's own form (quantized, or on
            the CPU) before the next one is asked for, so that a generator never has all of them in memory.
        description: the other part of it.
        optimizer, model: the optimizer to set, and the model that names its parameters.
        where: names the source in errors.
        scheduled: restores the settings that a scheduler changes (`SCHEDULED`), too.

    Raises:
        UserError: see `check_same_optimizer`.
    """
    check_same_optimizer(description, optimizer, model, where)
    parameters = dict(_named(optimizer, model))
    states: dict[str, dict] = {}
    scalars = set(description["scalars"])
    for key, value in chain(tensors, description["values"].items()):
        kind, _, name = key.partition(".")
        if isinstance(value, Tensor):
            value = value.view(()) if key in scalars else from_plain(optimizer, parameters[name], kind, value)
        states.setdefault(name, {})[kind] = value
    numbered = {number: states[name] for number, name in enumerate(parameters) if name in states}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": numbered, "param_groups": groups})
    stored = {name: group for group in description["groups"] for name in group["parameters"]}
    for number, group in enumerate(optimizer.param_groups):
        name, _ = next(_named(optimizer, model, number), (None, None))
        saved = stored[name] if scheduled and name else {}
        for key in group.keys() & SCHEDULED & saved.keys():
            value = saved[key]
            if isinstance(group[key], Tensor):
                group[key].fill_(value)
            else:
                group[key] = tuple(value) if isinstance(value, list) else value
    # load_state_dict has put tensors on their device, and cast floats to the parameter's dtype, which is undone here.
    for name, state in states.items():
        loaded = optimizer.state[parameters[name]]
        for kind, value in state.items():
            if isinstance(value, Tensor) and loaded[kind].dtype != value.dtype:
                loaded[kind] = value.to(loaded[kind].device)


def _named(
    optimizer: torch.optim.Optimizer, model: nn.Module, group: int | None = None
) -> Iterator[tuple[str, nn.Parameter]]:
    """(Name, parameter) of all groups or of one, in the order in which the optimizer's state_dict numbers them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for entry in optimizer.param_groups if group is None else [optimizer.param_groups[group]]:
        for parameter in entry["params"]:
            if id(parameter) not in names:
                raise ValueError(f"the optimizer has a parameter {list(parameter.shape)} that the model does not have")
            yield names[id(parameter)], parameter


def _json_value(value: object) -> object:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)
