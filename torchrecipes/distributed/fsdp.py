"""Shards a model over the processes of a run with PyTorch's `fully_shard` (FSDP2).

| strategy | weights, gradients, optimizer state    | when                                               |
|----------|----------------------------------------|----------------------------------------------------|
| `none`   | not sharded                            | one process                                        |
| `ddp`    | replicated on every rank               | they fit beside the activations: least traffic     |
| `fsdp`   | sharded over all ranks                 | they do not (Zhao et al. 2023, 2304.11277)         |
| `hsdp`   | sharded in a node, replicated on nodes | several nodes whose network is slower than a node's |

Parameters keep their names and the model its class, so a loop reads the same with any of them. `ddp` is `fully_shard`
over a mesh whose shard dimension has size 1, so there is one kind of gradient, norm and checkpoint.

Where a step has several micro-batches, gradients of shards are reduced either after each, so that they stay sharded, or
after the last only: less communication, but until then every rank holds fp32 gradients of the whole model.
"""

import os
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from torchrecipes.distributed.collectives import dist_env
from torchrecipes.errors import UserError
from torchrecipes.modules import LMHead, Router, init_lora
from torchrecipes.modules.blocks import transformer_blocks

STRATEGIES = ("auto", "none", "ddp", "fsdp", "hsdp")
REDUCE_GRADIENTS = ("auto", "every_micro_batch", "last_micro_batch")
BYTES_PER_PARAMETER = 16  # weight, gradient and two averages of AdamW in fp32
SHARE_FOR_DDP = 0.25  # of the device; with more, too little is left for activations, and `auto` shards


def parallelize(
    model: nn.Module, strategy: str, device: torch.device, dtype: torch.dtype, reduce_gradients: str = "auto"
) -> str:
    """Shards or replicates the model over the run's processes, in place. Call it after activation checkpointing and
    `compile`.

    Every block (`transformer_blocks`) is a unit of its own, and so is a head that is not tied to the embedding, as in
    torchtitan's `apply_fsdp`. All else belongs to the root. Head and root stay unsharded between forward and backward,
    so that a loss may use the head outside of `forward`.

    A block's weights are gathered while the block before computes, the head's while the last block does, and a block's
    gradients are reduced during the backward pass of the one before. The root's gather is waited for at the start of
    a forward pass, and the reduction of root and head at the end of a backward pass.

    Args:
        model: any module, on the meta device or with the same weights on every rank.
        strategy: `auto`, `none`, `ddp`, `fsdp` or `hsdp`. `auto` is `none` on one process, `ddp` where weights,
            gradients and AdamW's state take less than a quarter of a device, else `fsdp`, or `hsdp` on several nodes.
        device: this process' device.
        dtype: what blocks compute in. Weights stay in fp32, and gradients are reduced in fp32.
        reduce_gradients: see `reduces_every_micro_batch`; `set_grad_sync` follows it.

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
    if reshard:
        _shard_head(model, mesh, root_policy)
    fully_shard(model, mesh=mesh, mp_policy=root_policy, reshard_after_forward=False)
    model._reduces_every_micro_batch = reduces_every_micro_batch(strategy, reduce_gradients)
    model._replicates_weights = strategy == "ddp"
    return strategy


def _shard_head(model: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    head, blocks = getattr(model, "head", None), transformer_blocks(model)
    if not isinstance(head, LMHead) or head.decoder is None or blocks[-1] is model:
        return
    fully_shard(head, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    blocks[-1].set_modules_to_forward_prefetch([head])
    model.register_forward_hook(lambda *_: head.unshard())  # waits for it, on the device


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


def reduces_every_micro_batch(strategy: str, choice: str) -> bool:
    """Whether shards' gradients are reduced after each micro-batch of a step, instead of after its last.

    Args:
        strategy: as `parallelize` returns it.
        choice: `every_micro_batch`, `last_micro_batch`, or `auto`: every where weights are sharded, so that gradients
            are, too. Replicas (`ddp`, `hsdp`) add up their gradients after the last one with any choice.

    Raises:
        UserError: the choice is none of these.
    """
    if choice not in REDUCE_GRADIENTS:
        problem = f"{choice!r} is not one of {', '.join(REDUCE_GRADIENTS)}"
        raise UserError(problem, key="compute.reduce_gradients", code="unknown_name")
    return choice == "every_micro_batch" or (choice == "auto" and strategy in ("fsdp", "hsdp"))


def device_memory(device: torch.device, local_world_size: int) -> int:
    """Bytes of a GPU (an Apple GPU: what Metal recommends to use), or a process' part of this machine's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
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
        init_lora(model, seed)  # which a module's own init_weights does not know
    else:
        model.to(device)


def set_grad_sync(model: nn.Module, last: bool) -> None:
    """Prepares a model of `parallelize` for the forward and backward pass of a micro-batch.

    Gradients are reduced as `reduces_every_micro_batch` says. Replicas keep the copies of weights that they compute
    with from one micro-batch to the next.

    Args:
        model: any; without shards nothing happens.
        last: whether the micro-batch is the last one before the optimizer's step.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or model._reduces_every_micro_batch)
        model.set_requires_all_reduce(last)
        if model._replicates_weights:
            model.set_reshard_after_backward(last)


def clip_grad_norm(model: nn.Module, max_norm: float, loss_scale: float | Tensor = 1.0) -> Tensor:
    """Divides all gradients by `loss_scale`, and scales them so that their total norm, over all ranks, is at most
    `max_norm`: in one pass.

    Args:
        model: its gradients are changed in place.
        max_norm: infinity: they are not clipped.
        loss_scale: what the loss was multiplied by, such as `Guard.loss_scale`: a number, or `[]` on any device.

    Returns:
        The norm before clipping, of gradients divided by `loss_scale`: a scalar on the device, the same on all ranks.
        Infinite or NaN if a gradient overflowed on any of them.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm) / loss_scale
    if gradients:
        coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0) / loss_scale  # 1e-6 as in `nn.utils.clip_grad_norm_`
        torch._foreach_mul_([g.to_local() if isinstance(g, DTensor) else g for g in gradients], coefficient)
    return norm
