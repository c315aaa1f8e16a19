"""Counts the load of a mixture's experts, and balances it with biases of the routers, without an auxiliary loss."""

import torch
from torch import Tensor, nn

from torchrecipes.distributed import collectives
from torchrecipes.models.transformer import Transformer
from torchrecipes.modules import MoE, Routing


class ExpertBalance:
    """Counts the tokens of every expert over micro-batches and ranks, and updates the biases of routers that have one.

    In a loop, call `add` after every forward pass and `step` after the optimizer's step. For a model without experts
    they do nothing.

    The bias of an expert that got more tokens than the mean in a step is lowered by `update_rate`, that of one that got
    fewer is raised (DeepSeek-V3, arXiv:2412.19437, section 2.1.2; Wang et al. 2024, arXiv:2408.15664). It decides which
    experts a token goes to, not their weights, so no gradient competes with that of the tokens' loss; and since the
    tokens of all ranks and micro-batches are counted, it does not depend on how they are split. The mean of a layer's
    biases is kept at 0, which changes no choice.

    Args:
        model: a `torchrecipes.models` Transformer, or any module without experts.
        update_rate: change of a bias per step; the paper's is 0.001.
    """

    def __init__(self, model: nn.Module, update_rate: float = 0.001):
        self.layers = [module for module in model.modules() if isinstance(module, MoE)]
        self.update_rate = update_rate
        self._step: Tensor | None = None  # [layers, E]: this rank's tokens in the step so far
        self._counted: Tensor | None = None  # the same over all ranks, since the last report
        self._entropy: Tensor | None = None  # [layers]: summed over the forward passes since the last report
        self._passes = 0

    def add(self, model: nn.Module) -> None:
        """Counts the model's last forward pass. Nothing waits for the device."""
        if not self.layers:
            return
        routing: Routing = model.routing
        counts = routing.tokens_per_expert.detach()
        self._step = counts.clone() if self._step is None else self._step + counts
        entropy = routing.entropy.detach()
        self._entropy = entropy.clone() if self._entropy is None else self._entropy + entropy
        self._passes += 1

    @torch.no_grad()
    def step(self, skipped: Tensor | None = None) -> None:
        """Ends a step: sums over the ranks and updates the biases.

        Args:
            skipped: `[]`, not 0 where the optimizer's step was skipped (`Guard.step`), which skips the update, too.
        """
        if self._step is None:
            return
        counts, self._step = self._step, None
        collectives.all_reduce_sum_(counts)
        self._counted = counts if self._counted is None else self._counted + counts
        for layer, load in zip(self.layers, counts, strict=True):
            bias = layer.gate.e_score_correction_bias
            if bias is not None:
                change = self.update_rate * (load.mean() - load).sign()
                change -= change.mean()
                bias += change if skipped is None else torch.where(skipped > 0, 0.0, change)

    def metrics(self) -> dict[str, float | list[float]]:
        """The load since the last call, for the log; an empty dict for a model without experts.

        For every MoE layer l:

        - `moe/l/load`: every expert's share of the assignments, a list; 1 / E is even.
        - `moe/l/max_violation`: the tokens of the fullest expert above the mean, as a share of it; 0 is even (MaxVio of
          Wang et al.).
        - `moe/l/unused`: experts that got no token.
        - `moe/l/entropy`: of the router's distribution, mean over the tokens of this rank, in nats.

        Over the layers: `moe/max_violation`, the largest; `moe/unused`, the sum; `moe/entropy`, the mean.
        """
        if self._counted is None:
            return {}
        load = self._counted / self._counted.sum(1, keepdim=True).clamp(min=1)
        violation, unused = load.amax(1) * load.shape[1] - 1, (self._counted == 0).sum(1)
        numbers = torch.stack([violation, unused, self._entropy / self._passes], dim=1)
        table = torch.cat([numbers, load], dim=1).tolist()  # one transfer
        self._counted, self._entropy, self._passes = None, None, 0
        violations, unused, entropies, *_ = zip(*table, strict=True)
        report = {"moe/max_violation": max(violations), "moe/unused": sum(unused)}
        report["moe/entropy"] = sum(entropies) / len(entropies)
        for layer, (violation, without, entropy, *loads) in enumerate(table):
            report |= {f"moe/{layer}/max_violation": violation, f"moe/{layer}/unused": without}
            report |= {f"moe/{layer}/entropy": entropy, f"moe/{layer}/load": loads}
        return report


def router_loss(model: nn.Module) -> Tensor | float:
    """The auxiliary loss of the routers in the model's last forward pass, a sum over tokens; 0 without experts.

    It balances the tokens of each micro-batch by itself, so it depends on `micro_batch_size`.
    """
    return model.router_loss if isinstance(model, Transformer) else 0.0
