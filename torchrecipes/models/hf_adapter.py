"""What a family says about its Hugging Face key_map: all that `torchrecipes.models.hub` needs to read and write it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# For every parameter of local the tensors of the Hugging Face key_map that it stacks: (name, rows) in order.
KeyMap = dict[str, list[tuple[str, int]]]


@dataclass(frozen=True)
class HFAdapter:
    """The two-way map of one family: it renames, stacks, splits and transposes, and nothing else.

    Attributes:
        architecture: the class of `transformers` that the folder is for.
        config_class: our config, a dataclass whose fields are the keys of config.json that we follow.
        network: config -> our model.
        key_map: config -> for every parameter of local the tensors that it stacks, (Hugging Face name, rows) in order.
        normalize_name: a stored tensor's name as `key_map` spells it, whatever class saved it; None: not used here.
        tied: (name, source): where the key_map is without `name`, its head is tied, and `name` is a copy of `source`.
        read_keys: config.json as a flat dict whose keys can be checked one by one.
        write_keys: config -> the keys of config.json that describe the network.
        fixed: keys that we have no setting for -> the values that mean what our network does.
        ignored: keys that say nothing about the network.
        transposed: Hugging Face name -> whether that tensor is stored with its two dimensions exchanged.
        head: what the head is called in messages.
        stack: stored tensors by name -> the same, with those put together that `key_map` has as one.
    """

    architecture: str
    config_class: type
    network: Callable[[Any], nn.Module]
    key_map: Callable[[Any], KeyMap]
    normalize_name: Callable[[str], str | None]
    tied: tuple[str, str]
    read_keys: Callable[[dict], dict]
    write_keys: Callable[[Any], dict]
    fixed: dict[str, tuple]
    ignored: frozenset[str]
    transposed: Callable[[str], bool] = lambda _name: False
    head: str = "masked-LM head"
    stack: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda hf: hf

    def split(self, tensor: Tensor, parts: Sequence[tuple[str, int]]) -> dict[str, Tensor]:
        """A tensor of local as the stored tensors that `key_map` makes of it: views of it."""
        pieces = tensor.split([rows for _, rows in parts])
        return {
            name: piece.t() if self.transposed(name) else piece for (name, _), piece in zip(parts, pieces, strict=True)
        }

    def join(self, parts: Sequence[tuple[str, int]], read: Callable[[str], Tensor]) -> Tensor:
        """The inverse of `split`; `read` gives a stored tensor by its name."""
        pieces = [read(name).t() if self.transposed(name) else read(name) for name, _ in parts]
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0].contiguous()

    def stored_shape(self, part: tuple[str, int], shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in which a part of a tensor of local of this shape is stored."""
        name, rows = part
        return (*shape[1:], rows) if self.transposed(name) else (rows, *shape[1:])
