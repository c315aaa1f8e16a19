"""Counts the parameters of a model that compute for one token."""

from torch import nn

from torchrecipes.modules import MoE


def active_parameters(module: nn.Module) -> int:
    """Parameters without those of the experts that a token does not go through; all of them in a dense model.

    Embeddings count in full, as is usual. Sharded and meta parameters count as whole ones.

    Args:
        module: a model, or a part of one such as `model.blocks`.
    """
    idle = 0
    for part in module.modules():
        if isinstance(part, MoE):
            stacked = sum(parameter.numel() for parameter in part.experts.parameters())
            idle += stacked * (part.num_experts - part.num_experts_per_tok) // part.num_experts
    return sum(parameter.numel() for parameter in module.parameters()) - idle
