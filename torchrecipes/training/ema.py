"""`EMA`: an exponential moving average of a model's weights.

Averaged weights often evaluate better than the last ones, most of all while the learning rate is high (Polyak and
Juditsky 1992; Tarvainen and Valpola 2017, 1703.01780).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from torchrecipes.errors import UserError


class EMA:
    """Averages the trainable parameters of a model: `average = decay * average + (1 - decay) * weight`.

    Averages are sharded as the weights are, and stay in fp32. One fused kernel updates all of them.

        ema = EMA(model, decay=0.999)
        ...                    # after every optimizer step
        ema.update()
        with ema.averaged():   # the model has the averaged weights inside
            evaluate(model)

    Args:
        model: on its device, with the weights that training begins with.
        decay: the share of the average that stays per update. 0.999 averages about the last 1,000 steps.
        warmup: the decay of update n is at most (1 + n) / (10 + n), so that early weights are forgotten quickly.
        export: every checkpoint gets a model folder `ema/` with the averaged weights.

    Raises:
        UserError: decay is not between 0 and 1 (code `out_of_range`).
    """

    def __init__(self, model: nn.Module, decay: float = 0.999, warmup: bool = True, export: bool = True):
        if not 0 <= decay < 1:
            raise UserError(
                f"{decay} is not at least 0 and below 1", key="decay", hint="Typical: 0.999.", code="out_of_range"
            )
        self.model, self.decay, self.warmup, self.export, self.updates = model, decay, warmup, export, 0
        self.parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.averages = {name: weight.detach().clone().float() for name, weight in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Moves the averages towards the weights; call it after every optimizer step. Does not wait for the device."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        weights = [_local(weight).float() for weight in self.parameters.values()]
        torch._foreach_lerp_([_local(average) for average in self.averages.values()], weights, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The model with the averaged weights; its own come back at the end, bit for bit, after an error too."""
        own = {name: weight.detach().clone() for name, weight in self.parameters.items()}
        self._copy_into_model(self.averages)
        try:
            yield self.model
        finally:
            self._copy_into_model(own)

    def exported_weights(self) -> dict[str, Tensor] | None:
        """The model's state with the averaged weights, to be written as a model folder; None: not asked for."""
        if not self.export:
            return None
        state = self.model.state_dict()  # FSDP registers its sharded parameters, which the averages are of
        averages = {id(weight): self.averages[name] for name, weight in self.parameters.items()}
        for name, weight in self.model.named_parameters(remove_duplicate=False):  # a tied weight has several names
            if id(weight) in averages:
                state[name] = averages[id(weight)].to(weight.dtype)
        return state

    def state_dict(self) -> dict:
        """The averages, by parameter name."""
        return {"updates": self.updates, "averages": dict(self.averages)}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` gave.

        Raises:
            UserError: it is of other parameters (code `other_model`).
        """
        differing = sorted(state["averages"].keys() ^ self.averages.keys())
        if differing:
            raise UserError(
                f"the averages in the checkpoint belong to other parameters: {', '.join(differing[:5])}",
                key="ema",
                hint="Freeze the parameters that were frozen when it was saved.",
                code="other_model",
            )
        self.updates = state["updates"]
        for name, average in self.averages.items():
            average.copy_(state["averages"][name])

    @torch.no_grad()
    def _copy_into_model(self, values: dict[str, Tensor]) -> None:
        weights = [_local(weight) for weight in self.parameters.values()]
        torch._foreach_copy_(weights, [_local(values[name]) for name in self.parameters])
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # the last forward may have left an unsharded copy of the weights before


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard, or the tensor itself: DTensor has no fused copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
