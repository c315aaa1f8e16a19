"""The load of a mixture's experts: what it is, and how a bias evens it out without an auxiliary loss."""

import torch
from torch import Tensor, nn

from torchrecipes.distributed import collectives
from torchrecipes.modules import MoE, Routing


class ExpertBalance:
    """Counts the tokens of every expert over micro-batches and ranks, and moves the biases of routers that have one.

    In a loop, `add` comes after every forward pass and `step` after the optimizer's step. A model without experts has
    nothing to balance, and all of it does nothing.

    The bias of an expert that got more tokens than the mean in a step is lowered by `update_rate`, that of one that got
    less is raised (DeepSeek-V3, arXiv:2412.19437, section 2.1.2; Wang et al. 2024, arXiv:2408.15664). It decides which
    experts a token goes to, not how much they count, so there is no gradient that competes with the tokens' own loss;
    and since the tokens of all ranks and micro-batches are counted, it does not depend on how many those are. The mean
    of a layer's biases is kept at 0, which changes no choice.

    Args:
        model: has `routing` after a forward pass, if it has experts.
        update_rate: of the biases, per step; the paper's is 0.001.
    """

    def __init__(self, model: nn.Module, update_rate: float = 0.001):
        self.layers = [module for module in model.modules() if isinstance(module, MoE)]
        self.update_rate = update_rate
        self._step: Tensor | None = None  # [layers, E]: tokens of the step so far, of this rank
        self._counted: Tensor | None = None  # the same since the last report, of all ranks
        self._entropy: Tensor | None = None  # [layers]: summed over the forward passes since the last report
        self._passes = 0

    def add(self, model: nn.Module) -> None:
        """Counts the model's last forward pass. Nothing waits for the device."""
        routing: Routing | None = getattr(model, "routing", None)
        if routing is None:
            return
        counts = routing.tokens_per_expert.detach()
        self._step = counts.clone() if self._step is None else self._step + counts
        entropy = routing.entropy.detach()
        self._entropy = entropy.clone() if self._entropy is None else self._entropy + entropy
        self._passes += 1

    @torch.no_grad()
    def step(self, skipped: Tensor | None = None) -> None:
        """Ends a step: adds up over the ranks, and moves the biases.

        Args:
            skipped: `[]`, not 0 where the optimizer's step was skipped (`Guard.step`): then the biases stay, too.
        """
        if self._step is None:
            return
        counts, self._step = self._step, None
        collectives.all_reduce_sum_(counts)
        self._counted = counts if self._counted is None else self._counted + counts
        for layer, of_layer in zip(self.layers, counts, strict=True):
            bias = layer.gate.e_score_correction_bias
            if bias is not None:
                change = self.update_rate * (of_layer.mean() - of_layer).sign()
                change -= change.mean()
                bias += change if skipped is None else torch.where(skipped > 0, 0.0, change)

    def metrics(self) -> dict[str, float | list[float]]:
        """The load since the last call, for the log; an empty dict for a model without experts.

        Of every MoE layer l:

        - `moe/l/load`: every expert's share of the assignments, a list; 1 / E is even.
        - `moe/l/max_violation`: the tokens of the fullest expert above the mean, as a share of it; 0 is even (MaxVio of
          Wang et al.).
        - `moe/l/unused`: experts that got no token.
        - `moe/l/entropy`: of the router's distribution, mean over the tokens of this rank, in nats.

        Over the layers: `moe/max_violation`, the largest; `moe/unused`, the sum; `moe/entropy`, the mean.
        """
        if self._counted is None:
            return {}
        load = self._counted / self._counted.sum(1, keepdim=True)
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
    """The auxiliary loss of the routers in the model's last forward pass, a sum over tokens; 0 without experts."""
    return getattr(model, "router_loss", 0.0)
