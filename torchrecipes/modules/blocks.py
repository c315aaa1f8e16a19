"""Finds the repeated blocks of a model: the units of activation checkpointing, compilation and sharding."""

from collections.abc import Sequence

from torch import nn


def transformer_blocks(model: nn.Module) -> Sequence[nn.Module]:
    """The repeated blocks of any model.

    Returns:
        `model.blocks` if there is one; else the largest `nn.ModuleList` (by parameters) whose modules are all of one
        class, such as `model.model.layers` in `transformers`; else the model itself, as the only block.
    """
    if isinstance(blocks := getattr(model, "blocks", None), nn.ModuleList | nn.Sequential):
        return blocks
    best, most = [model], 0
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1:
            size = sum(parameter.numel() for parameter in module.parameters())
            if size > most:
                best, most = module, size
    return best
