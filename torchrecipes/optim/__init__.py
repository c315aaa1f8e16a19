"""Optimizers with their parameter groups, and learning-rate schedules: each works alone, with any `nn.Module`."""

from torchrecipes.optim.adamw import adamw
from torchrecipes.optim.groups import decay_groups, group_table
from torchrecipes.optim.schedules import Schedule, constant, cosine, linear, warmup_stable_decay

__all__ = [
    "Schedule",
    "adamw",
    "constant",
    "cosine",
    "decay_groups",
    "group_table",
    "linear",
    "warmup_stable_decay",
]
