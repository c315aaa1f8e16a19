"""Optimizers and learning-rate schedules, for any `nn.Module`.

- adamw_variants: AdamW with weight decay on matrices only
- low_bit: AdamW with state of 8 or 4 bits
- cpu_offload_adamw: AdamW with state in the CPU's memory
- muon_optimizer, newton_schulz, distributed_muon: Muon, on one rank or on sharded matrices
- qk_clip: limits attention logits (MuonClip)
- schedulers: warm-up and decay, as torch's `LambdaLR`
- groups: which parameters are decayed, learning rates by layer; a table of an optimizer's groups
- settings: range checks
"""

from torchrecipes.optim.adamw_variants import adamw
from torchrecipes.optim.cpu_offload_adamw import adamw_cpu_offload
from torchrecipes.optim.groups import describe_param_groups, layer_lr_groups, weight_decay_groups
from torchrecipes.optim.low_bit import adamw_4bit, adamw_8bit
from torchrecipes.optim.muon_optimizer import Muon, muon
from torchrecipes.optim.qk_clip import QKClip
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
    "layer_lr_groups",
    "linear",
    "muon",
    "warmup_stable_decay",
    "weight_decay_groups",
]
