"""A mixture of experts: every token goes through the few feed-forward layers that a router chooses for it.

Dropless: no expert has a capacity, and no token is left out (Gale et al. 2022, arXiv:2211.15841). One sort brings the
tokens of an expert together, and each of the two layers is one `grouped_mm` over all experts: there is no loop over
experts here, and no wait for the device. PyTorch's own kernel for it is for bf16 on GPUs from Hopper on; elsewhere
`grouped_mm` itself multiplies expert after expert.

Letters, beside those of the package: E experts, k of them for a token, I inside one, M = T k assignments of a token to
an expert, sorted by expert.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from torchrecipes.estimation import is_estimating, kernel_device
from torchrecipes.modules.feed_forward import SwiGLU

SCORES = ("softmax", "sigmoid")
ROUTERS = ("linear", "mlp")
MLP_WIDTH = 128  # of a router that is a small network
TILE = 1 << 17  # elements that are computed with at once on a CPU
MOST_SLOTS = 1.6  # times the assignments: with more, what is computed for empty slots costs more than batches save


class Routing(NamedTuple):
    """What a router did with T tokens.

    Attributes:
        aux_loss: `[]`, see `load_balancing_loss`.
        z_loss: `[]`, see `router_z_loss`.
        tokens_per_expert: `[E]` fp32, assignments; their sum is T k.
        entropy: `[]`, mean over the tokens of the entropy of the router's distribution, in nats; log E where it knows
            nothing.
    """

    aux_loss: Tensor
    z_loss: Tensor
    tokens_per_expert: Tensor
    entropy: Tensor


def load_balancing_loss(probability_TE: Tensor, chosen_TE: Tensor) -> Tensor:
    """`E * sum over experts of (share of the tokens) * (mean probability)`: Switch Transformer's auxiliary loss.

    Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6, for k experts per token: the shares add up to k, and the loss
    is k where the load is even. Only the probabilities have a gradient: what an expert has too much of becomes less
    probable. It is that of the tokens given; those of other micro-batches and ranks are balanced by themselves.

    Args:
        probability_TE: the router's distribution over the experts, for every token.
        chosen_TE: 1 for the experts of a token, else 0.
    """
    return probability_TE.shape[-1] * (chosen_TE.mean(0) * probability_TE.mean(0)).sum()


def router_z_loss(logits_TE: Tensor) -> Tensor:
    """The mean over the tokens of `logsumexp(logits) ** 2`: logits stay small (ST-MoE, arXiv:2202.08906, eq. 5)."""
    return logits_TE.logsumexp(-1).square().mean()


class Router(nn.Module):
    """Scores of every token for every expert, in fp32 whatever autocast says.

    Parameters: `weight` `[E, D]`, or `[E, 128]` behind `proj` and SiLU. Buffer, where balance is by bias:
    `e_score_correction_bias` `[E]`, which is added for the choice of experts only, not for their weights.

    Args:
        hidden_size: D.
        num_experts: E.
        kind: `linear` or `mlp`, a layer of 128 before it.
        bias: whether there is one for the choice (DeepSeek-V3, arXiv:2412.19437, equation 16). It starts at 0.
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
        self._dispatch_on_cpu = torch.compiler.disable(_dispatch_in_slots)

    def forward(self, x_TD: Tensor, expert_Tk: Tensor, weight_Tk: Tensor) -> Tensor:
        """The sum of the chosen experts' outputs, by their weights.

        Args:
            x_TD: tokens.
            expert_Tk: the experts of each, int64.
            weight_Tk: how much each counts.

        Returns:
            `[T, D]` in the dtype of a linear layer's output.
        """
        device = x_TD.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_TD.dtype
        with torch.autocast(device, enabled=False):
            dispatch = self._dispatch_on_cpu if kernel_device(x_TD.device) == "cpu" else _dispatch_sorted
            token_M, place_Tk, ends_E = dispatch(expert_Tk, len(self.down_proj))
            return _GroupedSwiGLU.apply(
                x_TD.to(dtype),
                weight_Tk.to(dtype),
                self.gate_up_proj.to(dtype),
                self.down_proj.to(dtype),
                token_M,
                place_Tk,
                ends_E,
            )


def _dispatch_sorted(expert_Tk: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Assignments sorted by expert.

    Returns:
        token_M: the token of each; place_Tk: where a token's assignments are among them; ends_E int32: where each
        expert's end.
    """
    sorted_M, order_M = expert_Tk.flatten().sort(stable=True)
    ends_E = torch.searchsorted(sorted_M, _numbers(num_experts, expert_Tk), right=True, out_int32=True)
    place_M = torch.empty_like(order_M)
    place_M[order_M] = _numbers(len(order_M), expert_Tk)
    return order_M // expert_Tk.shape[1], place_M.view(expert_Tk.shape), ends_E


def _dispatch_in_slots(expert_Tk: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Assignments sorted by expert, each with as many slots as the fullest has, so that products are plain batches.

    On a CPU a batched product takes half the time of one after the other. Where the load is so uneven that more is
    computed for empty slots than that saves, the assignments stay sorted.

    Returns:
        As `_dispatch_sorted`, with M slots, E times as many as the fullest expert needs, and None for the ends. Slots
        that are empty show token 0, and no place leads there: their weight is 0.
    """
    token_M, place_Tk, ends_E = _dispatch_sorted(expert_Tk, num_experts)
    count_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    slots = _slots(count_E, len(token_M))
    if slots * num_experts > MOST_SLOTS * len(token_M):
        return token_M, place_Tk, ends_E
    shift_E = _numbers(num_experts, expert_Tk) * slots - (ends_E - count_E)  # from a place to its slot
    slot_Tk = place_Tk + shift_E[expert_Tk]
    token_of_slot = token_M.new_zeros(slots * num_experts)
    token_of_slot[slot_Tk.flatten()] = _numbers(len(expert_Tk), expert_Tk).repeat_interleave(expert_Tk.shape[1])
    return token_of_slot, slot_Tk, None


def _slots(count_E: Tensor, total: int) -> int:
    """Slots of each expert: as many as the fullest needs. The host reads it, which costs nothing on a CPU."""
    if is_estimating():
        return -(-total // len(count_E))
    return max(1, int(count_E.max()))


def _numbers(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device)


class _GroupedSwiGLU(torch.autograd.Function):
    """`sum over k of weight * down(silu(gate(x)) * up(x))`, each token with its own k experts.

    The backward pass is written out: it needs neither the experts' outputs (the gradient of a weight is that of its
    expert's inner activation times the activation), nor sums in an order that depends on threads.
    """

    @staticmethod
    def forward(ctx, x_TD, weight_Tk, gate_up, down, token_M, place_Tk, ends_E):
        place_M = place_Tk.flatten()
        weight_M1 = weight_Tk.new_zeros(len(token_M), 1)
        weight_M1[place_M, 0] = weight_Tk.flatten()
        gate_up_M2I = _product(x_TD.index_select(0, token_M), gate_up.mT, ends_E)
        inner_MI = _inner(gate_up_M2I, weight_M1)
        out_MD = _product(inner_MI, down.mT, ends_E)
        ctx.save_for_backward(x_TD, weight_M1, gate_up, down, token_M, place_M, ends_E, gate_up_M2I)
        return out_MD.index_select(0, place_M).view(*weight_Tk.shape, -1).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD):
        x_TD, weight_M1, gate_up, down, token_M, place_M, ends_E, gate_up_M2I = ctx.saved_tensors
        shape_Tk = (len(x_TD), len(place_M) // max(1, len(x_TD)))
        grad_MD = grad_TD.contiguous().index_select(0, token_M)
        grad_inner_MI = _product(grad_MD, down, ends_E)
        inner_MI, grad_M2I, grad_weight_M = _inner_backward(gate_up_M2I, weight_M1, grad_inner_MI)
        grad_down = _outer(grad_MD, inner_MI, ends_E, len(down))
        grad_gate_up = _outer(grad_M2I, x_TD.index_select(0, token_M), ends_E, len(down))
        grad_x_MD = _product(grad_M2I, gate_up, ends_E)
        grad_x_TD = grad_x_MD.index_select(0, place_M).view(*shape_Tk, -1).sum(1)
        grad_weight_Tk = grad_weight_M[place_M].view(shape_Tk).to(weight_M1.dtype)
        return grad_x_TD, grad_weight_Tk, grad_gate_up, grad_down, None, None, None


def _inner(gate_up_M2I: Tensor, weight_M1: Tensor) -> Tensor:
    """`weight * silu(gate) * up`, `[M, I]`."""
    inner_MI = gate_up_M2I.new_empty(len(gate_up_M2I), gate_up_M2I.shape[1] // 2)
    for rows in _tiles(inner_MI):
        gate, up = gate_up_M2I[rows].chunk(2, dim=-1)
        torch.mul(F.silu(gate).mul_(weight_M1[rows]), up, out=inner_MI[rows])
    return inner_MI


def _inner_backward(gate_up_M2I: Tensor, weight_M1: Tensor, grad_MI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same again, the gradient of `gate_up_M2I`, and that of the weights, `[M]` fp32."""
    inner_MI, grad_M2I = torch.empty_like(grad_MI), torch.empty_like(gate_up_M2I)
    grad_weight_M = torch.empty(len(grad_MI), dtype=torch.float32, device=grad_MI.device)
    for rows in _tiles(inner_MI):
        gate, up = gate_up_M2I[rows].chunk(2, dim=-1)
        grad_gate, grad_up = grad_M2I[rows].chunk(2, dim=-1)
        grad, weight = grad_MI[rows], weight_M1[rows]
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        inner = torch.mul(silu, up, out=inner_MI[rows])
        torch.sum(grad * inner, -1, dtype=torch.float32, out=grad_weight_M[rows])
        inner.mul_(weight)
        grad = grad * weight
        grad_up.copy_(silu * grad) if torch.compiler.is_compiling() else torch.mul(silu, grad, out=grad_up)
        # silu'(g) = sigmoid(g) + silu(g) (1 - sigmoid(g))
        slope = silu.addcmul_(silu, sigmoid, value=-1).add_(sigmoid)
        slope.mul_(up)
        grad_gate.copy_(slope * grad) if torch.compiler.is_compiling() else torch.mul(slope, grad, out=grad_gate)
    return inner_MI, grad_M2I, grad_weight_M


def _tiles(x: Tensor) -> list[slice]:
    """Rows at once: on a CPU as many as stay in its cache through several operations."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or is_estimating():
        return [slice(None)]
    rows = max(1, TILE // x.shape[1])
    return [slice(start, start + rows) for start in range(0, len(x), rows)]


def _product(a_MR: Tensor, b_ERC: Tensor, ends_E: Tensor | None) -> Tensor:
    """Every expert's rows times its matrix: `[M, C]`."""
    if ends_E is None:
        return torch.bmm(a_MR.unflatten(0, (len(b_ERC), -1)), b_ERC).flatten(0, 1)
    return _grouped_mm(a_MR, b_ERC, ends_E)


def _grouped_mm(a: Tensor, b: Tensor, ends_E: Tensor) -> Tensor:
    """`F.grouped_mm`; compiled in fp32 as an operation of our own, since torch traces its own in bf16 only."""
    if a.dtype == torch.float32 and torch.compiler.is_compiling():
        return _grouped_mm_fp32(a, b, ends_E)
    return F.grouped_mm(a, b, offs=ends_E)


@torch.library.custom_op("torchrecipes::grouped_mm_fp32", mutates_args=())
def _grouped_mm_fp32(a: Tensor, b: Tensor, ends_E: Tensor) -> Tensor:
    return F.grouped_mm(a, b, offs=ends_E)


@_grouped_mm_fp32.register_fake
def _(a: Tensor, b: Tensor, ends_E: Tensor) -> Tensor:
    groups = () if b.dim() == 3 else (len(ends_E),)
    return a.new_empty(*groups, a.shape[0], b.shape[-1])


def _outer(a_MR: Tensor, b_MC: Tensor, ends_E: Tensor | None, num_experts: int) -> Tensor:
    """`a.T @ b` of every expert's rows: `[E, R, C]`."""
    if ends_E is None:
        return torch.bmm(a_MR.unflatten(0, (num_experts, -1)).mT, b_MC.unflatten(0, (num_experts, -1)))
    return _grouped_mm(a_MR.t(), b_MC, ends_E)


class MoE(nn.Module):
    """A router, its experts, and an expert for all tokens if there is one.

    Args:
        hidden_size: D, a multiple of 8.
        moe_intermediate_size: I, inside an expert, a multiple of 8.
        num_experts: E.
        num_experts_per_tok: k, experts of a token.
        norm_topk_prob: whether the weights of a token's experts are divided by their sum.
        scoring_func: `softmax` over the experts, or `sigmoid` of each.
        router: `linear` or `mlp`.
        router_bias: whether the choice has a bias, by which `training.experts.ExpertBalance` balances the load.
        shared_intermediate_size: inside the expert that every token goes through; None: there is none.

    Raises:
        ValueError: numbers that do not fit.
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
        """Args: x `[..., D]`. Returns: `[..., D]`, and what the router did."""
        x_TD = x.reshape(-1, x.shape[-1])
        logits_TE = self.gate(x_TD)
        softmax_TE = logits_TE.softmax(-1)
        scores_TE = softmax_TE if self.scoring_func == "softmax" else logits_TE.sigmoid()
        bias = self.gate.e_score_correction_bias
        with torch.no_grad():
            choice_TE = scores_TE if bias is None else scores_TE + bias
            expert_Tk = choice_TE.topk(self.num_experts_per_tok, dim=-1).indices
        weight_Tk = scores_TE.gather(1, expert_Tk)
        if self.norm_topk_prob:
            weight_Tk = weight_Tk / (weight_Tk.sum(-1, keepdim=True) + 1e-20)
        out = self.experts(x_TD, expert_Tk, weight_Tk).view(x.shape)
        if self.shared_expert is not None:
            out = out + self.shared_expert(x)
        distribution_TE = softmax_TE if self.scoring_func == "softmax" else scores_TE / scores_TE.sum(-1, keepdim=True)
        chosen_TE = torch.zeros_like(distribution_TE).scatter_(1, expert_Tk, 1.0)
        with torch.no_grad():
            entropy = -torch.xlogy(distribution_TE, distribution_TE).sum(-1).mean()
        routing = Routing(
            aux_loss=load_balancing_loss(distribution_TE, chosen_TE),
            z_loss=router_z_loss(logits_TE),
            tokens_per_expert=chosen_TE.sum(0),
            entropy=entropy,
        )
        return out, routing
