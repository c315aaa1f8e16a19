"""A mixture of experts: a router sends every token through a few of many feed-forward layers.

Dropless: experts have no capacity, and no token is dropped (Gale et al. 2022, arXiv:2211.15841). Tokens are sorted by
expert, and each of the two layers is one `grouped_mm` over all experts, without a loop over experts and without waiting
for the device. PyTorch has a kernel of it for bf16 on GPUs from Hopper on; elsewhere `grouped_mm` multiplies one expert
after the other.

Letters, besides those of the package: E experts, k of them for a token, I inside one, M = T k assignments of a token to
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
MLP_WIDTH = 128  # hidden size of a router of kind `mlp`
TILE = 1 << 17  # elements per elementwise operation on a CPU
MOST_SLOTS = 1.6  # times the assignments; with more, products of empty slots cost more than batching saves


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
        self._dispatch_on_cpu = torch.compiler.disable(_dispatch_in_slots)

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
    """Sorts assignments by expert.

    Returns:
        token_M: the token of each; place_Tk: the indices of a token's assignments among them; ends_E int32: the end of
        each expert's assignments.
    """
    sorted_M, order_M = expert_Tk.flatten().sort(stable=True)
    ends_E = torch.searchsorted(sorted_M, _numbers(num_experts, expert_Tk), right=True, out_int32=True)
    place_M = torch.empty_like(order_M)
    place_M[order_M] = _numbers(len(order_M), expert_Tk)
    return order_M // expert_Tk.shape[1], place_M.view(expert_Tk.shape), ends_E


def _dispatch_in_slots(expert_Tk: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sorts assignments by expert and pads every expert to as many slots as the fullest one, for batched products.

    On a CPU a batched product takes half the time of one product after the other. Where the load is so uneven that
    empty slots cost more than that saves, the assignments stay unpadded.

    Returns:
        As `_dispatch_sorted`, with M slots, E times as many as the fullest expert needs, and None for the ends. Empty
        slots hold token 0, with a weight of 0.
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
    """Slots per expert: as many as the fullest needs. Reading it costs nothing on a CPU."""
    if is_estimating():
        return -(-total // len(count_E))
    return max(1, int(count_E.max()))


def _numbers(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device)


class _GroupedSwiGLU(torch.autograd.Function):
    """`sum over k of weight * down(silu(gate(x)) * up(x))`, each token with its own k experts.

    The backward pass is written by hand: it needs neither the experts' outputs (the gradient of a weight is the product
    of its expert's inner activation and the gradient of that), nor sums whose order depends on threads.
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
    """The same, the gradient of `gate_up_M2I`, and the gradient of the weights, `[M]` in fp32 or wider."""
    inner_MI, grad_M2I = torch.empty_like(grad_MI), torch.empty_like(gate_up_M2I)
    wide = torch.promote_types(grad_MI.dtype, torch.float32)
    grad_weight_M = torch.empty(len(grad_MI), dtype=wide, device=grad_MI.device)
    for rows in _tiles(inner_MI):
        gate, up = gate_up_M2I[rows].chunk(2, dim=-1)
        grad_gate, grad_up = grad_M2I[rows].chunk(2, dim=-1)
        grad, weight = grad_MI[rows], weight_M1[rows]
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        inner = torch.mul(silu, up, out=inner_MI[rows])
        torch.sum(grad * inner, -1, dtype=wide, out=grad_weight_M[rows])
        inner.mul_(weight)
        grad = grad * weight
        grad_up.copy_(silu * grad) if torch.compiler.is_compiling() else torch.mul(silu, grad, out=grad_up)
        # silu'(g) = sigmoid(g) + silu(g) (1 - sigmoid(g))
        slope = silu.addcmul_(silu, sigmoid, value=-1).add_(sigmoid)
        slope.mul_(up)
        grad_gate.copy_(slope * grad) if torch.compiler.is_compiling() else torch.mul(slope, grad, out=grad_gate)
    return inner_MI, grad_M2I, grad_weight_M


def _tiles(x: Tensor) -> list[slice]:
    """Slices of rows: on a CPU as many as stay in its cache through several operations."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or is_estimating():
        return [slice(None)]
    rows = max(1, TILE // x.shape[1])
    return [slice(start, start + rows) for start in range(0, len(x), rows)]


def _product(a_MR: Tensor, b_ERC: Tensor, ends_E: Tensor | None) -> Tensor:
    """Multiplies every expert's rows by its matrix: `[M, C]`."""
    if ends_E is None:
        return torch.bmm(a_MR.unflatten(0, (len(b_ERC), -1)), b_ERC).flatten(0, 1)
    return _grouped_mm(a_MR, b_ERC, ends_E)


def _grouped_mm(a: Tensor, b: Tensor, ends_E: Tensor) -> Tensor:
    """`F.grouped_mm`, which has no float64; compiled in fp32 as a custom operation, since torch traces bf16 only."""
    if a.dtype == torch.float64:
        ends = ends_E.tolist()
        spans = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        if b.dim() == 3:
            return torch.cat([a[span] @ matrix for span, matrix in zip(spans, b, strict=True)])
        return torch.stack([a[:, span] @ b[span] for span in spans])
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
    """`a.T @ b` for every expert's rows: `[E, R, C]`."""
    if ends_E is None:
        return torch.bmm(a_MR.unflatten(0, (num_experts, -1)).mT, b_MC.unflatten(0, (num_experts, -1)))
    return _grouped_mm(a_MR.t(), b_MC, ends_E)


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
            entropy = -_mean(torch.xlogy(distribution_TE, distribution_TE).sum(-1))
        routing = Routing(
            aux_loss=load_balancing_loss(distribution_TE, chosen_TE),
            z_loss=router_z_loss(logits_TE),
            tokens_per_expert=chosen_TE.sum(0),
            entropy=entropy,
        )
        return out, routing
