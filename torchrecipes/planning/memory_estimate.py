"""What a training step takes of a device's memory, found out by taking the step on tensors without data.

`FakeTensorMode` runs the model's own code, its loss, backward pass and optimizer on tensors that have shapes and no
memory. Counting the storages that live, and in which part of the step they were made, gives the peak and what it is
made of: for any model, with activation checkpointing, with any optimizer, in seconds and on any machine. How processes
share it is arithmetic.
"""

import importlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from torchrecipes.errors import UserError
from torchrecipes.modules import attention_backend, feed_forward, moe


@dataclass(frozen=True)
class Step:
    """A step of one process at its peak, in bytes, by what made them.

    Attributes:
        weights: the parameters.
        optimizer: its state.
        activations: the forward pass, for the backward pass; autocast's copies of weights among them.
        loss: logits of a chunk, and the gradients that the loss computes at once.
        gradients: the backward pass: gradients, and what it needs for a moment.
        gathered: weights that several processes compute with, beside those that they keep, and gradients for them.
        saved: what a checkpoint holds of the optimizer's state: fp32, whatever it is in memory. Not part of the peak.
        block: weights of the largest block.
        blocks: weights of all blocks.
    """

    weights: int
    optimizer: int
    activations: int
    loss: int
    gradients: int
    gathered: int
    saved: int
    block: int
    blocks: int

    @property
    def peak(self) -> int:
        """The bytes that live at the peak."""
        return self.weights + self.optimizer + self.activations + self.loss + self.gradients + self.gathered


def trace_step(
    build_model: Callable[[], nn.Module],
    build_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    forward: Callable[[nn.Module], Tensor],
    loss: Callable[[nn.Module, Tensor], Tensor],
    *,
    autocast: Callable[[], AbstractContextManager],
    device: str,
    micro_batches: int,
) -> Step:
    """Takes an optimizer step without data, when the optimizer has its state, and looks at its peak.

    Args:
        build_model: makes the model, with all that changes what its blocks keep.
        build_optimizer: makes its optimizer.
        forward: model -> final hidden states of a micro-batch.
        loss: model and hidden states -> the loss.
        autocast: makes the context to compute in; of the CPU, where the tensors would be.
        device: `cuda` or `cpu`: whose kernels, and sizes of chunks, are meant.
        micro_batches: in a step; two stand for more.
    """
    with suppress(UserError):  # torchao's optimizers make tables, once, which need data; others may want a real model
        warm_up = build_optimizer(nn.Linear(64, 64))
        for group in warm_up.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        warm_up.step()
    with FakeTensorMode(), _kernels_of(device), _Live() as live:
        model = build_model()
        in_blocks = [sum(p.nbytes for p in block.parameters()) for block in model.blocks]
        optimizer = build_optimizer(model)
        live.part = "optimizer"
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        optimizer.zero_grad()
        live.forget_peak()
        for _ in range(min(2, micro_batches)):
            with autocast():
                live.part = "activations"
                hidden = forward(model)
                live.part = "loss"
                value = loss(model, hidden)
            live.part = "gradients"
            value.backward()
            del hidden, value
        live.part = "optimizer"
        optimizer.step()
        parts = {name: live.at_peak[name] for name in ("weights", "optimizer", "activations", "loss", "gradients")}
        averages = [
            value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
        ]
        saved = 4 * sum(value.numel() for value in averages if value.ndim)
    return Step(**parts, gathered=0, saved=saved, block=max(in_blocks), blocks=sum(in_blocks))


def on_rank(step: Step, *, ranks: int, shards: int, half: bool, micro_batches: int) -> Step:
    """What one rank of several has of it.

    Args:
        step: of one process.
        ranks: processes in all.
        shards: ranks that weights, gradients and optimizer state are split over; 1: each has them whole.
        half: whether weights are gathered in bf16.
        micro_batches: with several, the gradients of the whole model wait on every rank for the last.
    """
    if ranks == 1 or (shards == 1 and half):  # autocast's copies stand for those that `fully_shard` computes with
        return step
    if shards == 1:
        return replace(step, gathered=step.weights)
    narrow = 2 if half else 1
    # Gathered are the root and two blocks, one of which computes while the next is on its way.
    gathered = (step.weights - step.blocks + 2 * step.block) // narrow
    copies = step.blocks // 2 if half else 0  # autocast's: the weights that are gathered are bf16 already
    waits = micro_batches > 1
    return replace(
        step,
        weights=step.weights // shards,
        optimizer=step.optimizer // shards,
        activations=max(0, step.activations - copies),
        gradients=step.gradients if waits else step.gradients // shards,
        gathered=gathered if waits else 2 * gathered,
    )


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages that live, by the part in which each was made."""

    def __init__(self) -> None:
        super().__init__()
        self.part = "weights"
        self.bytes: Counter[str] = Counter()
        self._storages: dict[int, tuple[str, int]] = {}
        self.forget_peak()

    def forget_peak(self) -> None:
        self.total = self.peak = self.bytes.total()
        self.at_peak = self.bytes.copy()

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
            weakref.finalize(storage, self._gone, key)
            self.bytes[self.part] += size
            self.total += size
            if self.total > self.peak:
                self.peak, self.at_peak = self.total, self.bytes.copy()
        return tensor

    def _gone(self, key: int) -> None:
        part, size = self._storages.pop(key)
        self.bytes[part] -= size
        self.total -= size


@contextmanager
def _kernels_of(device: str) -> Iterator[None]:
    """The tensors are the CPU's, whatever the device; what differs between the two is replaced here."""
    with ExitStack() as stack:
        # The CPU's own GELU keeps as much as PyTorch's, in many small steps.
        stack.enter_context(mock.patch.object(feed_forward, "gelu_tanh", partial(F.gelu, approximate="tanh")))
        # Experts' loads are data; they are taken to be even.
        stack.enter_context(mock.patch.object(moe, "_slots", lambda count_E, total: -(-total // len(count_E))))
        stack.enter_context(mock.patch.object(moe, "_tiles", lambda _x: [slice(None)]))
        if device != "cpu":
            # A GPU's attention keeps queries, keys, values and outputs, as the CPU's flash kernel does without a mask
            # and dropout, and never the scores.
            stack.enter_context(mock.patch.object(attention_backend, "AttentionBackend", _flash))
            for name in ("default_chunk_size", "_scratch_bytes"):
                chosen = _for_device(getattr(_LOSS, name), torch.device(device))
                stack.enter_context(mock.patch.object(_LOSS, name, chosen))
        yield


_LOSS = importlib.import_module("torchrecipes.losses.chunked_cross_entropy")  # the package has a function of this name


_PLAN = attention_backend.AttentionBackend


def _flash(_kernel: str, *, causal: bool = False, **_masks_and_dropout) -> attention_backend.AttentionBackend:
    return _PLAN("sdpa", causal=causal)


def _for_device(function: Callable, device: torch.device) -> Callable:
    return lambda *args: function(*args[:-1], device)  # the device is the last argument of both
