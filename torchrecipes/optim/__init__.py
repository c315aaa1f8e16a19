"""Optimizers with their parameter groups, and learning-rate schedules: each works alone, with any `nn.Module`."""

from torchrecipes.optim.adamw import adamw
from torchrecipes.optim.groups import decay_groups, group_table
from torchrecipes.optim.low_bit import adamw_4bit, adamw_8bit
from torchrecipes.optim.muon import Muon, muon
from torchrecipes.optim.muon_clip import QKClip, muon_clip
from torchrecipes.optim.offload import adamw_cpu_offload
from torchrecipes.optim.schedules import Schedule, constant, cosine, linear, warmup_stable_decay

__all__ = [
    "Muon",
    "QKClip",
    "Schedule",
    "adamw",
    "adamw_4bit",
    "adamw_8bit",
    "adamw_cpu_offload",
    "constant",
    "cosine",
    "decay_groups",
    "group_table",
    "linear",
    "muon",
    "muon_clip",
    "warmup_stable_decay",
]
