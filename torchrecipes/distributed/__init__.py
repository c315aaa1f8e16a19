"""Several processes: starting them, what they exchange, and how a model is sharded over them.

collectives   numbers and objects exchanged by the ranks on the host
gather        rows of all ranks, with gradients
fsdp          `parallelize`: ddp, fsdp and hsdp over `fully_shard`
launch        starts the processes of a run on this node and watches them
"""

from torchrecipes.distributed.collectives import all_reduce_max, all_reduce_min, all_reduce_sum, all_reduce_sum_
from torchrecipes.distributed.fsdp import clip_grad_norm, parallelize, set_grad_sync
from torchrecipes.distributed.gather import all_gather_rows

__all__ = [
    "all_gather_rows",
    "all_reduce_max",
    "all_reduce_min",
    "all_reduce_sum",
    "all_reduce_sum_",
    "clip_grad_norm",
    "parallelize",
    "set_grad_sync",
]
