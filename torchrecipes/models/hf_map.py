"""What a family says about its Hugging Face layout: all that `torchrecipes.models.hub` needs to read and write it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class HFMap:
    """The two-way map of one family: it renames, stacks and splits, and nothing else.

    Attributes:
        architecture: the class of `transformers` that the folder is for.
        config_class: our config, a dataclass whose fields are the keys of config.json that we follow.
        model_class: our model, built from the config alone.
        layout: config -> for every parameter of ours the tensors that it stacks, (Hugging Face name, rows) in order.
        normalize_name: a stored tensor's name as `layout` spells it, whatever class saved it; None: not used here.
        tied: (name, source): where the layout is without `name`, its head is tied, and `name` is a copy of `source`.
        read_keys: config.json as a flat dict whose keys can be checked one by one.
        write_keys: config -> the keys of config.json that describe the network.
        fixed: keys that we have no setting for -> the values that mean what our network does.
        ignored: keys that say nothing about the network.
    """

    architecture: str
    config_class: type
    model_class: type[nn.Module]
    layout: Callable[[Any], dict[str, list[tuple[str, int]]]]
    normalize_name: Callable[[str], str | None]
    tied: tuple[str, str]
    read_keys: Callable[[dict], dict]
    write_keys: Callable[[Any], dict]
    fixed: dict[str, tuple]
    ignored: frozenset[str]
