"""Shards a model over the processes of a run with PyTorch's `fully_shard` (FSDP2).

| strategy | weights, gradients, optimizer state    | when                                               |
|----------|----------------------------------------|----------------------------------------------------|
| `none`   | not sharded                            | one process                                        |
| `ddp`    | replicated on every rank               | they fit beside the activations: least traffic     |
| `fsdp`   | sharded over all ranks                 | they do not (Zhao et al. 2023, 2304.11277)         |
| `hsdp`   | sharded in a node, replicated on nodes | several nodes whose network is slower than a node's |

Parameters keep their names and the model its class, so a loop reads the same with any of them. `ddp` is `fully_shard`
over a mesh whose shard dimension has size 1, so there is one kind of gradient, norm and checkpoint.
"""

import os
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from torchrecipes.distributed.collectives import dist_env
from torchrecipes.errors import UserError
from torchrecipes.modules import Router
from torchrecipes.modules.blocks import transformer_blocks

STRATEGIES = ("auto", "none", "ddp", "fsdp", "hsdp")
BYTES_PER_PARAMETER = 16  # weight, gradient and two averages of AdamW in fp32
SHARE_FOR_DDP = 0.25  # of the device; with more, too little is left for activations, and `auto` shards


def parallelize(model: nn.Module, strategy: str, device: torch.device, dtype: torch.dtype) -> str:
    """Shards or replicates the model over the run's processes, in place. Call it after activation checkpointing and
    `compile`.

    Every block (`transformer_blocks`) is a unit of its own. Embedding, last norm and head belong to the root, which
    stays unsharded between forward and backward, so that a loss may use the head outside of `forward`.

    Args:
        model: any module, on the meta device or with the same weights on every rank.
        strategy: `auto`, `none`, `ddp`, `fsdp` or `hsdp`. `auto` is `none` on one process, `ddp` where weights,
            gradients and AdamW's state take less than a quarter of a device, else `fsdp`, or `hsdp` on several nodes.
        device: this process' device.
        dtype: what blocks compute in. Weights stay in fp32, and gradients are reduced in fp32.

    Returns:
        The strategy that was applied.

    Raises:
        UserError: the strategy does not suit the number of processes.
    """
    _, _, world_size, local_world_size = dist_env()
    memory = device_memory(device, local_world_size)
    strategy = choose_strategy(model, strategy, memory, world_size, local_world_size)
    if strategy == "none":
        return strategy
    nodes = world_size // local_world_size
    where = f"{world_size} processes" + (f" on {nodes} nodes" if nodes > 1 else "")
    print(f"{where}, {device.type}: {strategy}, {str(dtype).removeprefix('torch.')}", flush=True)
    shapes = {"ddp": (world_size, 1), "fsdp": (world_size,), "hsdp": (nodes, local_world_size)}
    shape = shapes[strategy]
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # masks and rotary tables keep their dtypes
    )
    in_fp32 = replace(policy, param_dtype=None)
    reshard = strategy != "ddp"
    for block in transformer_blocks(model):
        if block is model:
            continue
        for module in block.modules():
            if isinstance(module, Router):  # rounded to bf16, it would send a token in a hundred to another expert
                fully_shard(module, mesh=mesh, mp_policy=in_fp32, reshard_after_forward=reshard)
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    # The CPU's backward pass of an embedding adds up tokens in the weight's dtype: in bf16 the sum of a frequent
    # token's gradients stops growing. Autocast still computes the head's products in bf16.
    root_policy = in_fp32 if device.type == "cpu" else policy
    fully_shard(model, mesh=mesh, mp_policy=root_policy, reshard_after_forward=False)
    return strategy


def choose_strategy(model: nn.Module, strategy: str, memory: int, world_size: int, local_world_size: int) -> str:
    """The strategy for so many processes, with `memory` bytes each: see `parallelize` for arguments and errors."""
    if strategy not in STRATEGIES:
        raise UserError(
            f"{strategy!r} is not one of {', '.join(STRATEGIES)}", key="compute.strategy", code="unknown_name"
        )

    def refused(problem: str, hint: str) -> UserError:
        return UserError(problem, key="compute.strategy", hint=hint, code="strategy_needs_other_processes")

    if strategy == "none" and world_size > 1:
        raise refused(
            f"none would train a separate model in each of the {world_size} processes",
            "Use auto, ddp, fsdp or hsdp, or start one process.",
        )
    nodes = world_size // local_world_size
    if strategy == "hsdp" and nodes == 1:
        raise refused(
            "hsdp shards within each node and replicates across nodes, and there is one node only",
            "Use fsdp to shard, or ddp to replicate.",
        )
    if strategy == "hsdp" and local_world_size == 1:
        raise refused("hsdp needs several processes on every node", "Use fsdp or ddp.")
    if world_size == 1:
        return "none"
    scalar = next((name for name, parameter in model.named_parameters() if parameter.dim() == 0), None)
    if scalar:
        raise UserError(
            f"{scalar} is a parameter without dimensions, which several processes cannot share",
            key="model",
            hint="Give it the shape [1].",
            code="scalar_parameter",
        )
    if strategy != "auto":
        return strategy
    if BYTES_PER_PARAMETER * sum(p.numel() for p in model.parameters()) < SHARE_FOR_DDP * memory:
        return "ddp"
    return "hsdp" if nodes > 1 and local_world_size > 1 else "fsdp"


def device_memory(device: torch.device, local_world_size: int) -> int:
    """Bytes of a GPU, or a process' part of this machine's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local_world_size


def init_on_device(model: nn.Module, device: torch.device, seed: int) -> None:
    """Moves the model to the device; a model on the meta device gets its initial weights there.

    Initial weights are a function of (seed, name), of which each rank draws its own shard: the same as on one process.

    Args:
        model: on the meta device as a whole (then it has `init_weights(seed)`), or not at all.
        device: this process' device.
        seed: chooses the initial weights.

    Raises:
        UserError: some of the parameters are on the meta device, or all and there is no `init_weights`.
    """
    on_meta = [parameter.is_meta for parameter in model.parameters()]
    if any(on_meta) and not all(on_meta):
        raise UserError(
            f"{sum(on_meta)} of the model's {len(on_meta)} parameters are on the meta device, and initialization would "
            "overwrite the others",
            key="model",
            hint="Build all of it there, and set weights in init_weights(seed).",
            code="partly_on_meta",
        )
    if any(on_meta):
        if not hasattr(model, "init_weights"):
            raise UserError(
                f"{type(model).__name__} is on the meta device and has no init_weights(seed)",
                key="model",
                hint="Add that method, or build the model on the CPU.",
                code="no_init_weights",
            )
        model.to_empty(device=device)
        model.init_weights(seed)
    else:
        model.to(device)


def set_grad_sync(model: nn.Module, last: bool) -> None:
    """Sets whether the next backward pass is the step's last; FSDP reduces gradients in that one only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)


def clip_grad_norm(model: nn.Module, max_norm: float) -> Tensor:
    """Scales all gradients so that their total norm, over all ranks, is at most `max_norm`.

    Returns:
        The norm before scaling, a scalar on the device, the same on all ranks.
    """
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
