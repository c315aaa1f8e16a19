"""QK-clip: scales queries and keys down where attention logits grow too large (Kimi K2, arXiv:2507.20534, section 2.1).

Where a head's largest logit, over all tokens of a step, is above tau, its query and key weights are multiplied by
`sqrt(tau / largest)` each, after the update: the same tokens then give a largest logit of tau. Heads below tau are not
changed. Muon with QK-clip is MuonClip.

In grouped-query attention, which Kimi K2 does not have, a key head serves several query heads. Here it takes the root
of the smallest factor among them, and each query head what its own factor lacks.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from torchrecipes.errors import UserError
from torchrecipes.optim.settings import out_of_range


class QKClip:
    """Scales queries and keys after an optimizer's steps; any optimizer's.

    A step that clips computes the scores of all its tokens once more, which costs less than attention's forward pass.
    Forward passes in evaluation mode do not count.

    Args:
        layers: `SelfAttention`s, on their device, sharded or not.
        tau: the largest logit that is not scaled down.
        every: steps between two clips.
    """

    def __init__(self, layers: list[nn.Module], tau: float, every: int = 1):
        self.layers, self.tau, self.every = layers, tau, every
        self.steps = 0

    @classmethod
    def for_model(cls, model: nn.Module, tau: float, every: int) -> tuple["QKClip", list[UserError]]:
        """For the attention layers of a model, which have an attribute `max_logits`; and what is wrong with it."""
        layers = {name: module for name, module in model.named_modules() if hasattr(module, "max_logits")}
        problems = [] if 0 < tau < math.inf else [out_of_range("qk_clip_tau", tau, "above 0, such as 100")]
        if every < 1:
            problems.append(out_of_range("qk_clip_every", every, "1 or more steps"))
        reason = None
        if normed := [name for name, layer in layers.items() if layer.qk_norm]:
            reason = f"{normed[0]} has a norm of queries and keys (qk_norm), which bounds the logits already"
        elif not layers:
            reason = "the model has no attention that records its logits (SelfAttention of torchrecipes.modules)"
        if reason:
            problems.append(UserError(reason, key="qk_clip_tau", hint="Leave it out.", code="no_logits_to_clip"))
        return cls(list(layers.values()), tau, every), problems

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Clips after every step of the optimizer from now on, and records logits in the forward passes before it.

        After `load_state_dict` it continues from the number of steps in AdamW's state.
        """
        if self.every > 1:
            optimizer.takes_found_inf = False  # the host has to know whether a step was skipped, to count it
        optimizer.register_step_post_hook(lambda optimizer, *_: self.after_step(getattr(optimizer, "found_inf", None)))
        optimizer.register_load_state_dict_post_hook(self._restore_steps)
        zero_grad = optimizer.zero_grad

        def forget(set_to_none: bool = True) -> None:  # logits are discarded with the gradients of the same passes
            zero_grad(set_to_none)
            self._watch()

        optimizer.zero_grad = forget
        self._watch()

    @torch.no_grad()
    def after_step(self, found_inf: Tensor | None = None) -> None:
        """Clips if this step is one that does. A collective: in a process group all ranks call it.

        Args:
            found_inf: `[]` fp32; 1 says that the step was skipped, and nothing is clipped.
        """
        self.steps += 1
        if self.steps % self.every == 0:
            largest = torch.cat([layer.max_logits for layer in self.layers])
            if dist.is_initialized():
                dist.all_reduce(largest, dist.ReduceOp.MAX)
            # Without a decision of the host, which would have to wait for the device: most factors are 1.
            clipped = largest > self.tau
            if found_inf is not None:
                clipped &= found_inf == 0
            factors = torch.where(clipped, self.tau / largest, 1.0)
            for layer, head_factors in zip(
                self.layers, factors.split([one.num_heads for one in self.layers]), strict=True
            ):
                _scale_heads(layer, head_factors)
        self._watch()

    def _watch(self) -> None:
        """Lets the next step's forward passes record their largest logits if that step clips."""
        clips = (self.steps + 1) % self.every == 0
        for layer in self.layers:
            layer.max_logits = None
            if clips:
                device = layer.qkv_proj.weight.device
                layer.max_logits = torch.full((layer.num_heads,), -math.inf, dtype=torch.float32, device=device)

    def _restore_steps(self, optimizer: torch.optim.Optimizer) -> None:
        self.steps = max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)
        self._watch()


def _scale_heads(layer: nn.Module, factors_N: Tensor) -> None:
    """Multiplies the logits of every query head by its factor, through the weights and biases of the projection."""
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
    """This rank's part of one number per row of a parameter, and its local rows."""
    if not isinstance(parameter, DTensor):
        return rows, parameter
    for dimension, placement in enumerate(parameter.placements):
        if placement == Shard(0):
            parts = rows.chunk(parameter.device_mesh.size(dimension))
            place = parameter.device_mesh.get_coordinate()[dimension]
            rows = parts[place] if place < len(parts) else rows[:0]
    return rows, parameter.to_local()
