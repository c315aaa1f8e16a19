"""Peak memory of a training step, measured by taking the step on tensors without data.

`FakeTensorMode` runs the model's own code, its loss, backward pass and optimizer on tensors that have shapes and no
memory. Counting the storages that are alive, and the part of the step in which each was made, gives the peak and its
composition: for any model and optimizer, with activation checkpointing, on any machine. How ranks share it is
arithmetic.
"""

import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from torchrecipes.config import build
from torchrecipes.distributed.fsdp import reduces_every_micro_batch
from torchrecipes.errors import UserError
from torchrecipes.modules.blocks import transformer_blocks
from torchrecipes.optim.cpu_offload_adamw import OffloadedAdamW
from torchrecipes.planning.fake_model import fake_tensors, give_storage, meta_model
from torchrecipes.training.activation_checkpointing import apply_activation_checkpointing
from torchrecipes.training.precision import autocast, set_residual_dtype
from torchrecipes.training.setup import freeze

GIB = 2**30
# Torch and its libraries, before the first tensor; on mps not measured.
PROCESS = {"cuda": GIB, "cpu": int(0.35 * GIB), "mps": GIB // 2}
# On a CPU: what the C library's heap takes on top of what a step allocates and frees, as a share of it: freed pieces
# that do not fit the next tensor. Measured with glibc 2.36, to within a fifth.
ALLOCATOR_OVERHEAD = {"none": 0.7, "selective": 0.7, "full": 1.8}


@dataclass(frozen=True)
class Step:
    """Bytes of one process at the peak of a step, by the part that made them.

    Attributes:
        weights: the parameters.
        optimizer: its state, and temporary tensors where the peak is in its step.
        activations: what the forward pass keeps for the backward pass, autocast's copies of weights included.
        loss: what `compute_loss` makes outside of the model's forward pass.
        gradients: gradients, and temporary tensors of the backward pass.
    """

    weights: int
    optimizer: int
    activations: int = 0
    loss: int = 0
    gradients: int = 0

    @property
    def peak(self) -> int:
        """The sum of all parts."""
        return sum(asdict(self).values())


class StepEstimate:
    """The memory of a recipe's optimizer steps, for any number of rows per micro-batch.

    Args:
        config: a recipe's config.
        tokenizer: the tokenizer, or a stand-in.
        build_model, build_collator, compute_loss: the recipe's functions.
        device_type: `cuda`, `mps` or `cpu`.
        dtype: of the forward and backward pass.

    Attributes:
        config, device_type, dtype: as given.
        model: without data.
        parameters: their number.
        block, blocks: bytes of the largest block of the model, and of all blocks.
        saved_bytes: the optimizer's averages in a checkpoint: in fp32, whatever they are in memory.
    """

    def __init__(
        self,
        config: Any,
        tokenizer: Any,
        build_model: Callable,
        build_collator: Callable,
        compute_loss: Callable,
        *,
        device_type: str,
        dtype: torch.dtype,
    ):
        self.config, self.device_type, self.dtype = config, device_type, dtype
        self._collator, self._compute_loss = build_collator(config, tokenizer), compute_loss
        self.model = meta_model(config, tokenizer, build_model)
        set_residual_dtype(self.model, config.compute.residual, dtype)
        freeze(self.model, config.freeze)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        blocks = transformer_blocks(self.model)
        sizes = [sum(parameter.nbytes for parameter in block.parameters()) for block in blocks]
        self.block, self.blocks = max(sizes), sum(sizes)
        apply_activation_checkpointing(self.model, config.compute.activation_checkpointing)
        self._live = _Live()
        self._steps: dict[tuple[int, bool], Step] = {}
        _prepare_optimizer(config)
        with fake_tensors(device_type), self._live:
            give_storage(self.model)
        self._weights = self._live.bytes["weights"]
        self._optimizer_step = self._trace_optimizer()
        self.model.register_forward_pre_hook(lambda *_: self._live.begin("activations"))
        self.model.register_forward_hook(lambda *_: self._live.begin("loss"))

    def step(self, rows: int, *, accumulate: bool) -> Step:
        """The peak of a step with micro-batches of so many rows, on one process.

        Args:
            rows: of a micro-batch.
            accumulate: whether there are several, so that gradients of the ones before are there.
        """
        if (rows, accumulate) not in self._steps:
            passes = self._trace_passes(rows, accumulate)
            self._steps[rows, accumulate] = max(passes, self._optimizer_step, key=lambda step: step.peak)
        return self._steps[rows, accumulate]

    def _trace_passes(self, rows: int, accumulate: bool) -> Step:
        batch = self._collator.example_batch(rows, self.config.seq_len)
        with fake_tensors(self.device_type, first_chunk_only=True), self._live as live:
            if accumulate:
                self._make_gradients()
            live.forget_peak()
            with autocast(torch.device("cpu"), self.dtype):
                live.begin("loss")
                loss, _ = self._compute_loss(self.model, batch, self.config)
            live.begin("gradients")
            loss.backward()
            del loss, _
            self.model.zero_grad()
        parts = {name: live.at_peak[name] for name in ("activations", "loss", "gradients")}
        return Step(weights=self._weights, optimizer=self._state_bytes, **parts)

    def _trace_optimizer(self) -> Step:
        self._state_bytes = self.saved_bytes = 0
        with fake_tensors(self.device_type), self._live as live:
            live.begin("optimizer")
            optimizer = build_optimizer(self.config, self.model)
            self._make_gradients()
            live.begin("optimizer")
            live.forget_peak()
            if isinstance(optimizer, OffloadedAdamW):  # its state is in the memory of the host
                self.saved_bytes = 2 * self._weights
            else:
                optimizer.step()
            parts = {name: live.at_peak[name] for name in ("optimizer", "gradients")}
            optimizer.zero_grad()
            self._state_bytes = live.bytes["optimizer"]
            averages = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
            self.saved_bytes += 4 * sum(x.numel() for x in averages if x.ndim)
        self._optimizer = optimizer  # keeps its state alive
        return Step(weights=self._weights, **parts)

    def _make_gradients(self) -> None:
        self._live.begin("gradients")
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None


def build_optimizer(config: Any, model: nn.Module) -> torch.optim.Optimizer:
    """The config's optimizer for a model, as the recipes build it."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return build(config.optimizer, model=model, params=trainable)


def _prepare_optimizer(config: Any) -> None:
    # torchao's optimizers make their tables in the first step, and need data for it; others may want a real model.
    with suppress(UserError), torch.random.fork_rng(devices=[]):
        optimizer = build_optimizer(config, nn.Linear(64, 64))
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()


def rank_memory(
    trace: StepEstimate, rows: int, *, strategy: str, world_size: int, local_world_size: int
) -> dict[str, int]:
    """Bytes of a rank at the peak of a step, by part: those of `Step`, what sharding adds, and what the process needs.

    Args:
        trace: of the run's config.
        rows: of a micro-batch.
        strategy: how the model is spread over `world_size` processes, `local_world_size` of them on each machine.
    """
    config, on_cpu, half = trace.config, trace.device_type == "cpu", trace.dtype.itemsize == 2
    accumulate = config.global_batch_size // world_size > rows
    waits = accumulate and not reduces_every_micro_batch(strategy, config.compute.reduce_gradients)
    parts = asdict(trace.step(rows, accumulate=accumulate))
    shards = {"none": 1, "ddp": 1, "fsdp": world_size, "hsdp": local_world_size}[strategy]
    root = parts["weights"] - trace.blocks  # embedding, last norm and head: on a CPU they are unsharded in fp32
    unsharded = 0
    if shards > 1:
        # The root and two blocks are unsharded: one block computes while the next is gathered.
        unsharded = root // (2 if half and not on_cpu else 1) + 2 * trace.block // (2 if half else 1)
        parts["weights"] //= shards
        parts["optimizer"] //= shards
        if half:  # autocast makes no copies: unsharded blocks are in bf16 already
            parts["activations"] = max(0, parts["activations"] - trace.blocks // 2)
        if accumulate and not waits:  # the passes' temporary tensors are not sharded, gradients are
            whole = parts["weights"] * shards
            parts["gradients"] = max(0, parts["gradients"] - whole) + parts["weights"]
            unsharded *= 2
        elif not accumulate:
            parts["gradients"] //= shards
            unsharded *= 2
    elif world_size > 1:  # in bf16 autocast's copies stand for those that `fully_shard` computes with
        unsharded = (root if on_cpu or not half else 0) + (0 if half else trace.blocks)
    if unsharded:
        parts["unsharded_parameters"] = unsharded
    if trace.device_type != "cuda" or not half:  # no kernel takes documents: a mask separates them
        parts["activations"] += rows * config.seq_len**2 * trace.dtype.itemsize
    if on_cpu:
        kept = parts["weights"] if accumulate else 0  # gradients of the micro-batches before
        freed = parts["gradients"] + parts["activations"] + parts["loss"] - kept
        overhead = ALLOCATOR_OVERHEAD[config.compute.activation_checkpointing]
        parts["allocator_overhead"] = int(overhead * max(0, freed))
        if config.checkpoint.async_save:
            parts["async_save_buffer"] = parts["weights"] + parts["optimizer"]
    return parts | {"process": PROCESS[trace.device_type]}


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, by the part of the step in which each was made."""

    def __init__(self) -> None:
        super().__init__()
        self.part = "weights"
        self.bytes: Counter[str] = Counter()
        self._storages: dict[int, tuple[str, int]] = {}
        self.total = 0
        self.forget_peak()

    def begin(self, part: str) -> None:
        self.part = part

    def forget_peak(self) -> None:
        self.peak, self.at_peak = self.total, self.bytes.copy()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tree_map_only(FakeTensor, self._see, out)
        return out

    def _see(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            size = storage.nbytes()
            self._storages[key] = self.part, size
            weakref.finalize(storage, self._free, key)
            self.bytes[self.part] += size
            self.total += size
            if self.total > self.peak:
                self.peak, self.at_peak = self.total, self.bytes.copy()
        return tensor

    def _free(self, key: int) -> None:
        part, size = self._storages.pop(key)
        self.bytes[part] -= size
        self.total -= size
