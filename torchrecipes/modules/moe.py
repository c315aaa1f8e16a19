"""A mixture of experts: a router sends every token through a few of many feed-forward layers.

Dropless: experts have no capacity, and no token is dropped (Gale et al. 2022, arXiv:2211.15841). Tokens are sorted by
expert, and each of the two layers is one product over all experts, without a loop over experts and without waiting for
the device: `grouped_swiglu`, and `expert_swiglu` on a CPU.

Letters, besides those of the package: E experts, k of them for a token, I inside one.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchrecipes.estimation import kernel_device
from torchrecipes.modules.cpu.expert_swiglu import expert_swiglu
from torchrecipes.modules.expert_dispatch import dispatch
from torchrecipes.modules.feed_forward import SwiGLU
from torchrecipes.modules.grouped_swiglu import grouped_swiglu

SCORES = ("softmax", "sigmoid")
ROUTERS = ("linear", "mlp")
MLP_WIDTH = 128  # hidden size of a router of kind `mlp`
MOST_ARGMAX = 8  # experts of a token up to which `argmax` finds them faster than `topk` on a GPU


class Routing(NamedTuple):
    """What a router did with T tokens.

    Attributes:
        aux_loss: `[]`, see `load_balancing_loss`.
        z_loss: `[]`, see `router_z_loss`.
        tokens_per_expert: `[E]` fp32, assignments; their sum is T k.
        entropy: `[]`, mean over the tokens of the entropy of the router's distribution, in nats; log E if uniform.
    """

    aux_loss: Tensor
    z_loss: Tensor
    tokens_per_expert: Tensor
    entropy: Tensor


def load_balancing_loss(probability_TE: Tensor, chosen_TE: Tensor) -> Tensor:
    """`E * sum over experts of (share of the tokens) * (mean probability)`: Switch Transformer's auxiliary loss.

    Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6, for k experts per token: the shares sum to k, and the loss is
    k where the load is even. Only the probabilities have a gradient: overloaded experts become less probable. It
    balances the given tokens; each micro-batch and rank is balanced by itself.

    Args:
        probability_TE: the router's distribution over the experts, for every token.
        chosen_TE: 1 for the experts of a token, else 0.
    """
    return probability_TE.shape[-1] * (_mean(chosen_TE) * _mean(probability_TE)).sum()


def router_z_loss(logits_TE: Tensor) -> Tensor:
    """The mean over tokens of `logsumexp(logits) ** 2`, which keeps logits small (ST-MoE, arXiv:2202.08906, eq. 5)."""
    return _mean(logits_TE.logsumexp(-1).square())


def _mean(x: Tensor) -> Tensor:
    """The mean over the tokens, the first dimension; 0 without tokens."""
    return x.mean(0) if len(x) else x.sum(0)


class Router(nn.Module):
    """Scores of every token for every expert, in fp32 even under autocast.

    On a GPU that is TF32 where `torch.set_float32_matmul_precision("high")` is set. A block that is compiled under
    autocast needs `torch._functorch.config.backward_pass_autocast = "off"` (recipes set it), or the gradients of these
    products are in autocast's dtype.

    Parameters: `weight` `[E, D]`, or `[E, 128]` after `proj` and SiLU. Buffer, with `bias`: `e_score_correction_bias`
    `[E]`, which is added for the choice of experts only, not for their weights.

    Args:
        hidden_size: D.
        num_experts: E.
        kind: `linear`, or `mlp` for a hidden layer of 128.
        bias: adds a bias for the choice of experts (DeepSeek-V3, arXiv:2412.19437, equation 16), which starts at 0.
    """

    def __init__(self, hidden_size: int, num_experts: int, *, kind: str = "linear", bias: bool = False):
        super().__init__()
        self.proj = nn.Linear(hidden_size, MLP_WIDTH, bias=False) if kind == "mlp" else None
        self.weight = nn.Parameter(torch.empty(num_experts, MLP_WIDTH if kind == "mlp" else hidden_size))
        nn.init.normal_(self.weight, std=0.02)
        self.register_buffer("e_score_correction_bias", torch.zeros(num_experts) if bias else None)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Args: x_TD. Returns: logits `[T, E]`, fp32 at least."""
        with torch.autocast(x_TD.device.type, enabled=False):
            x = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
            if self.proj is not None:
                x = F.silu(F.linear(x, self.proj.weight.to(x.dtype)))
            return F.linear(x, self.weight.to(x.dtype))


class Experts(nn.Module):
    """E SwiGLU layers, stacked as `transformers` 5 holds them.

    Parameters: `gate_up_proj` `[E, 2 I, D]` (rows: gate, then up) and `down_proj` `[E, D, I]`.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, num_experts: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.row_splits = {"gate_up_proj": (intermediate_size, intermediate_size)}  # two matrices, for Muon
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)
        # A number of slots that depends on the data is no graph. Not a decorator: that imports dynamo, 1.5 s of CPU.
        self._on_cpu = torch.compiler.disable(expert_swiglu)

    def forward(self, x_TD: Tensor, expert_Tk: Tensor, weight_Tk: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' outputs.

        Args:
            x_TD: hidden states of the tokens.
            expert_Tk: the experts of each token, int64.
            weight_Tk: their weights.

        Returns:
            `[T, D]` in the dtype of a linear layer's output.
        """
        device = x_TD.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_TD.dtype
        if not len(x_TD):
            return x_TD.to(dtype) + 0 * sum(parameter.sum() for parameter in self.parameters()).to(dtype)
        with torch.autocast(device, enabled=False):
            x_TD, weight_Tk = x_TD.to(dtype), weight_Tk.to(dtype)
            gate_up, down = self.gate_up_proj.to(dtype), self.down_proj.to(dtype)
            if kernel_device(x_TD.device) == "cpu":
                return self._on_cpu(x_TD, expert_Tk, weight_Tk, gate_up, down)
            return grouped_swiglu(x_TD, weight_Tk, gate_up, down, dispatch(expert_Tk, len(down)))


class MoE(nn.Module):
    """A router, its experts, and optionally a shared expert for all tokens.

    Args:
        hidden_size: D, a multiple of 8.
        moe_intermediate_size: I, inside an expert, a multiple of 8.
        num_experts: E.
        num_experts_per_tok: k, experts of a token.
        norm_topk_prob: divides the weights of a token's experts by their sum.
        scoring_func: `softmax` over the experts, or `sigmoid` of each.
        router: `linear` or `mlp`.
        router_bias: adds a bias to the choice, with which `torchrecipes.training.ExpertBalance` balances the load.
        shared_intermediate_size: inside the shared expert. None: there is none.

    Raises:
        ValueError: the numbers do not suit each other.
    """

    def __init__(
        self,
        hidden_size: int,
        moe_intermediate_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        *,
        norm_topk_prob: bool = True,
        scoring_func: str = "softmax",
        router: str = "linear",
        router_bias: bool = False,
        shared_intermediate_size: int | None = None,
    ):
        super().__init__()
        problems = []
        if not 1 <= num_experts_per_tok <= num_experts:
            problems.append(f"num_experts_per_tok={num_experts_per_tok} is not between 1 and {num_experts} experts")
        if hidden_size % 8 or moe_intermediate_size % 8:
            sizes = f"hidden_size={hidden_size} and moe_intermediate_size={moe_intermediate_size}"
            problems.append(f"{sizes} must be multiples of 8, as grouped_mm needs them")
        if scoring_func not in SCORES:
            problems.append(f"scoring_func={scoring_func!r} is not one of {', '.join(SCORES)}")
        if router not in ROUTERS:
            problems.append(f"router={router!r} is not one of {', '.join(ROUTERS)}")
        if problems:
            raise ValueError("; ".join(problems))
        self.num_experts, self.num_experts_per_tok = num_experts, num_experts_per_tok
        self.norm_topk_prob, self.scoring_func = norm_topk_prob, scoring_func
        self.gate = Router(hidden_size, num_experts, kind=router, bias=router_bias)
        self.experts = Experts(hidden_size, moe_intermediate_size, num_experts)
        shared = shared_intermediate_size
        self.shared_expert = SwiGLU(hidden_size, shared) if shared else None

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """Args: x `[..., D]`. Returns: `[..., D]`, and the routing."""
        x_TD = x.reshape(-1, x.shape[-1])
        logits_TE = self.gate(x_TD)
        softmax_TE = logits_TE.softmax(-1)
        scores_TE = softmax_TE if self.scoring_func == "softmax" else logits_TE.sigmoid()
        bias = self.gate.e_score_correction_bias
        with torch.no_grad():
            choice_TE = scores_TE if bias is None else scores_TE + bias
            expert_Tk = _largest(choice_TE, self.num_experts_per_tok)
        weight_Tk = scores_TE.gather(1, expert_Tk)
        if self.norm_topk_prob:
            weight_Tk = weight_Tk / (weight_Tk.sum(-1, keepdim=True) + 1e-20)
        out = self.experts(x_TD, expert_Tk, weight_Tk).view(x.shape)
        if self.shared_expert is not None:
            out = out + self.shared_expert(x)
        distribution_TE = softmax_TE if self.scoring_func == "softmax" else scores_TE / scores_TE.sum(-1, keepdim=True)
        chosen_TE = torch.zeros_like(distribution_TE).scatter_(1, expert_Tk, 1.0)
        with torch.no_grad():
            entropy = -_mean(torch.xlogy(distribution_TE, distribution_TE).sum(-1))
        routing = Routing(
            aux_loss=load_balancing_loss(distribution_TE, chosen_TE),
            z_loss=router_z_loss(logits_TE),
            tokens_per_expert=chosen_TE.sum(0),
            entropy=entropy,
        )
        return out, routing


def _largest(score_TE: Tensor, k: int) -> Tensor:
    """The experts with the k highest scores, `[T, k]`, the highest first."""
    if kernel_device(score_TE.device) == "cpu" or k > MOST_ARGMAX:
        return score_TE.topk(k, dim=-1).indices
    # A GPU's `topk` takes a block of threads and 16 passes for every token; argmax is fused with the softmax before it.
    number_E, found = torch.arange(score_TE.shape[-1], device=score_TE.device), []
    for _ in range(k):
        found.append(score_TE.argmax(-1, keepdim=True))
        score_TE = score_TE.masked_fill(number_E == found[-1], -torch.inf)
    return torch.cat(found, dim=-1)
