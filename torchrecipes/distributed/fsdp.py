"""How a model is spread over the processes of a run: PyTorch's `fully_shard` (FSDP2) in three forms.

| strategy | weights, gradients, optimizer state | when                                               |
|----------|-------------------------------------|----------------------------------------------------|
| `none`   | whole                               | one process                                        |
| `ddp`    | whole on every rank                 | they fit beside the activations: least traffic     |
| `fsdp`   | split over all ranks                | they do not (Zhao et al. 2023, 2304.11277)         |
| `hsdp`   | split within a node, a copy on each | several nodes whose network is slower than a node's |

Parameters keep their names, and a model keeps its class' attributes: a loop reads the same with any of them. `ddp` is
`fully_shard` over a mesh whose second dimension is 1, so that there is one kind of gradient, norm and checkpoint.
"""

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from torchrecipes.errors import UserError
from torchrecipes.modules import Router

if TYPE_CHECKING:
    from torchrecipes.training.run import Run

STRATEGIES = ("auto", "none", "ddp", "fsdp", "hsdp")
BYTES_PER_PARAMETER = 16  # weight, gradient and two averages of AdamW in fp32
SHARE_FOR_DDP = 0.25  # of the device's memory: with more, activations have too little left, and `auto` shards


def parallelize(model: nn.Module, strategy: str, run: "Run", dtype: torch.dtype) -> str:
    """Spreads the model over the run's processes, in place, and says how.

    Call it after activation checkpointing and `compile`.

    Every block is a unit of its own; embedding, last norm and head belong to the root, which stays gathered between
    forward and backward, so that the head may be used outside of `forward`.

    Args:
        model: has `blocks`; on the meta device, or the same on every rank.
        strategy: `auto`, `none`, `ddp`, `fsdp` or `hsdp`. `auto` is `none` on one process, `ddp` where weights,
            gradients and AdamW's state take less than a quarter of a device, else `fsdp`, or `hsdp` on several nodes.
        run: says how many processes there are.
        dtype: that forward and backward compute in. Weights stay in fp32 and gradients are added up in it.

    Returns:
        The strategy that it came to.

    Raises:
        UserError: the strategy does not go with the number of processes.
    """
    if strategy not in STRATEGIES:
        raise UserError(f"parallel.strategy: {strategy!r} is not known. Use {', '.join(STRATEGIES)}.")
    if strategy == "none" and run.world_size > 1:
        raise UserError(
            f"parallel.strategy=none, and there are {run.world_size} processes: each would train a model of its own. "
            "Use auto, ddp, fsdp or hsdp, or start one process."
        )
    nodes = run.world_size // run.local_world_size
    if strategy == "hsdp" and nodes == 1:
        raise UserError(
            "parallel.strategy=hsdp shards within each node and copies across nodes, and there is one node only. Use "
            "fsdp to shard, or ddp to copy."
        )
    if strategy == "hsdp" and run.local_world_size == 1:
        raise UserError("parallel.strategy=hsdp needs several processes on every node. Use fsdp or ddp.")
    if run.world_size == 1:
        return "none"
    if strategy == "auto":
        strategy = _choose(model, run, nodes)
    numbers = str(dtype).removeprefix("torch.")
    where = f"{run.world_size} processes" + (f" on {nodes} nodes" if nodes > 1 else "")
    print(f"{where}, {run.device.type}: {strategy}, {numbers}", flush=True)
    shape = {
        "ddp": (run.world_size, 1),
        "fsdp": (run.world_size,),
        "hsdp": (nodes, run.local_world_size),
    }[strategy]
    names = ("replicate", "shard")[-len(shape) :]
    mesh = init_device_mesh(run.device.type, shape, mesh_dim_names=names)
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # masks and rotary tables have the dtype that they should have
    )
    in_fp32 = replace(policy, param_dtype=None)
    for block in model.blocks:
        for part in block.modules():
            if isinstance(part, Router):  # rounded to bf16, it would send a token in a hundred to another expert
                fully_shard(part, mesh=mesh, mp_policy=in_fp32, reshard_after_forward=strategy != "ddp")
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=strategy != "ddp")
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    return strategy


def init_on_device(model: nn.Module, device: torch.device, seed: int) -> None:
    """Moves the model to the device; what is on the meta device begins there with its initial weights.

    A rank draws its own part of weights that are a function of (seed, name): the same as on one process.

    Args:
        model: has `init_weights(seed)`; all of it on the meta device, or nothing.
        device: of this process.
        seed: of the initial weights.
    """
    on_meta = [parameter.is_meta for parameter in model.parameters()]
    if any(on_meta) and not all(on_meta):
        raise UserError(
            f"the model has {sum(on_meta)} of its {len(on_meta)} parameters on the meta device. Initialization would "
            "write over the others: build all of it there, and set weights in init_weights(seed)."
        )
    if any(on_meta):
        model.to_empty(device=device)
        model.init_weights(seed)
    else:
        model.to(device)


def set_grad_sync(model: nn.Module, last: bool) -> None:
    """Says whether the next backward pass is the step's last: ranks exchange their gradients only then."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)


def clip_grad_norm(model: nn.Module, max_norm: float) -> Tensor:
    """Scales all gradients down so that their norm, over the whole model, is `max_norm` at most.

    Returns:
        The norm before, a scalar on the device, the same on all ranks.
    """
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _choose(model: nn.Module, run: "Run", nodes: int) -> str:
    if run.device.type == "cuda":
        memory = torch.cuda.get_device_properties(run.device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / run.local_world_size
    if BYTES_PER_PARAMETER * sum(parameter.numel() for parameter in model.parameters()) < SHARE_FOR_DDP * memory:
        return "ddp"
    return "hsdp" if nodes > 1 and run.local_world_size > 1 else "fsdp"
