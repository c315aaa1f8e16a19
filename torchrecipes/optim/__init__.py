"""Optimizers with their parameter groups, and learning-rate schedules: each works alone, with any `nn.Module`."""

from torchrecipes.optim.adamw_variants import adamw
from torchrecipes.optim.cpu_offload_adamw import adamw_cpu_offload
from torchrecipes.optim.groups import describe_param_groups, weight_decay_groups
from torchrecipes.optim.low_bit import adamw_4bit, adamw_8bit
from torchrecipes.optim.muon_optimizer import Muon, muon
from torchrecipes.optim.qk_clip import QKClip, muon_clip
from torchrecipes.optim.schedulers import Schedule, constant, cosine, linear, warmup_stable_decay

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
    "describe_param_groups",
    "linear",
    "muon",
    "muon_clip",
    "warmup_stable_decay",
    "weight_decay_groups",
]
