"""MuonClip: Muon, and queries and keys that are scaled down where attention logits grow too large.

QK-clip (Kimi K2, arXiv:2507.20534, section 2.1): where a head's largest logit, over all tokens of a step, passes tau,
its query and key weights are multiplied by `sqrt(tau / largest)` each, after the update: the same tokens then give a
largest logit of tau. Training is not changed otherwise, and heads below tau not at all.

A difference: in grouped-query attention a key head serves several query heads, which Kimi K2 does not have. Here it
takes the root of the smallest factor among them, and each query head what is missing to its own factor.
"""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from torchrecipes.optim.muon_optimizer import Muon, muon_groups, row_splits


def muon_clip(
    model: nn.Module,
    lr: float = 0.02,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.01,
    ns_steps: int = 5,
    ns_coefficients: str = "polar_express",
    scale: str = "spectral",
    adamw_lr: float | None = None,
    adamw_betas: tuple[float, float] = (0.9, 0.95),
    adamw_eps: float = 1e-8,
    adamw_weight_decay: float | None = None,
    adamw_param_patterns: Iterable[str] = (),
    ns_dtype: str = "auto",
    qk_clip_tau: float = 100.0,
    qk_clip_every: int = 1,
) -> Muon:
    """`muon` with QK-clip, for models whose attention is `SelfAttention` without `qk_norm`.

    A step that clips looks at the scores of all its tokens, which costs less than the forward pass of attention once
    more. Forward passes in evaluation mode do not count. Build it when the model is on its device.

    Args:
        model and so on: see `muon`.
        qk_clip_tau: the largest logit that is let be; 100 in Kimi K2.
        qk_clip_every: clips in every so manieth step only; 1 in Kimi K2.

    Raises:
        UserError: as `muon`; or the model has no such attention, or a norm of queries and keys, which has the logits
            bounded already.
    """
    problems = []
    if not 0 < qk_clip_tau < math.inf:
        problems.append(f"qk_clip_tau: {qk_clip_tau} must be above 0, such as 100")
    if qk_clip_every < 1:
        problems.append(f"qk_clip_every: {qk_clip_every} must be 1 or more steps")
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "max_logits")}
    normed = [name for name, layer in layers.items() if layer.qk_norm]
    if normed:
        problems.append(
            f"qk_clip_tau: {normed[0]} has a norm of queries and keys (qk_norm), which bounds the logits already. Use "
            "torchrecipes.optim.muon"
        )
    elif not layers:
        problems.append(
            "qk_clip_tau: the model has no attention that tells its largest logits (SelfAttention of "
            "torchrecipes.modules). Use torchrecipes.optim.muon"
        )
    groups = muon_groups(
        model,
        lr=lr,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        ns_steps=ns_steps,
        ns_coefficients=ns_coefficients,
        scale=scale,
        adamw_lr=adamw_lr,
        adamw_betas=adamw_betas,
        adamw_eps=adamw_eps,
        adamw_weight_decay=adamw_weight_decay,
        adamw_param_patterns=adamw_param_patterns,
        ns_dtype=ns_dtype,
        problems=problems,
    )
    optimizer = Muon(groups, row_splits(model))
    QKClip(list(layers.values()), qk_clip_tau, qk_clip_every).attach(optimizer)
    return optimizer


class QKClip:
    """Scales queries and keys after an optimizer's steps, any optimizer's.

    Args:
        layers: `SelfAttention`s, on their device, sharded or not.
        tau: the largest logit that is let be.
        every: steps.
    """

    def __init__(self, layers: list[nn.Module], tau: float, every: int):
        self.layers, self.tau, self.every = layers, tau, every
        self.steps = 0

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """From now on every step is followed by this, and the next steps' forward passes tell what it needs.

        After `load_state_dict` it goes on from the number of steps that AdamW's state says.
        """
        optimizer.takes_found_inf = False  # a step that is skipped is none of those that are counted here
        optimizer.register_step_post_hook(lambda *_: self.after_step())
        optimizer.register_load_state_dict_post_hook(self._go_to_step_of)
        zero_grad = optimizer.zero_grad

        def forget(set_to_none: bool = True) -> None:  # what was seen goes with the gradients it was seen with
            zero_grad(set_to_none)
            self._watch()

        optimizer.zero_grad = forget
        self._watch()

    @torch.no_grad()
    def after_step(self) -> None:
        """Clips if this step is one that does. In a process group all ranks call it together."""
        self.steps += 1
        if self.steps % self.every == 0:
            largest = torch.cat([layer.max_logits for layer in self.layers])
            if dist.is_initialized():
                dist.all_reduce(largest, dist.ReduceOp.MAX)
            # No decision of the host, which would have to wait for the device: most factors are 1.
            factors = torch.where(largest > self.tau, self.tau / largest, 1.0)
            for layer, of_heads in zip(self.layers, factors.split([one.num_heads for one in self.layers]), strict=True):
                _scale_heads(layer, of_heads)
        self._watch()

    def _watch(self) -> None:
        """Has the next step's forward passes tell their largest logits if that step clips."""
        clips = (self.steps + 1) % self.every == 0
        for layer in self.layers:
            layer.max_logits = None
            if clips:
                device = layer.qkv_proj.weight.device
                layer.max_logits = torch.full((layer.num_heads,), -math.inf, dtype=torch.float32, device=device)

    def _go_to_step_of(self, optimizer: torch.optim.Optimizer) -> None:
        self.steps = max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)
        self._watch()


def _scale_heads(layer: nn.Module, factors_N: Tensor) -> None:
    """Multiplies the logits of every query head by its factor, by way of the weights and biases that make them."""
    by_key_KG = factors_N.view(layer.num_kv_heads, -1)
    keys_K = by_key_KG.amin(1).sqrt()
    queries_N = (by_key_KG / keys_K[:, None]).flatten()
    heads = torch.cat((queries_N, keys_K, torch.ones_like(keys_K)))
    rows = heads.repeat_interleave(layer.head_dim)
    for parameter in (layer.qkv_proj.weight, layer.qkv_proj.bias):
        if parameter is not None:
            mine, local = _my_rows(rows, parameter)
            local.mul_(mine.view(-1, *[1] * (local.ndim - 1)))


def _my_rows(rows: Tensor, parameter: Tensor) -> tuple[Tensor, Tensor]:
    """Of a number for each row of a parameter those of this rank, and the rows that it holds."""
    if not isinstance(parameter, DTensor):
        return rows, parameter
    for dimension, placement in enumerate(parameter.placements):
        if placement == Shard(0):
            parts = rows.chunk(parameter.device_mesh.size(dimension))
            place = parameter.device_mesh.get_coordinate()[dimension]
            rows = parts[place] if place < len(parts) else rows[:0]
    return rows, parameter.to_local()
