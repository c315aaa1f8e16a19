"""Muon: momentum whose matrices are made orthogonal, for hidden matrices, with AdamW for everything else.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon); with decoupled weight decay and a scale that lets AdamW's
learning rates be kept, Liu et al. 2025, arXiv:2502.16982.

`torch.optim.Muon` takes matrices only, so a model needs two optimizers; it takes fused matrices for one, multiplies
one by one, and under `fully_shard` every rank repeats the work for the whole model. Here

- one optimizer, with one state dict, has groups of both kinds;
- what is fused (queries, keys, values; gate and up) is made orthogonal part by part, what is stacked expert by expert;
- matrices of one shape are multiplied as one batch;
- the ranks of a run share the matrices out and send each other the results.
"""

import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw as adamw_step

from torchrecipes.errors import UserError
from torchrecipes.optim.groups import decay_groups
from torchrecipes.optim.newton_schulz import COEFFICIENTS, fast_dtype, orthogonalize

SCALES = ("spectral", "match_rms_adamw")
_NOT_HIDDEN = ("head", "lm_head", "decoder", "score", "classifier", "gate", "router")  # modules: outputs and routers


def muon(
    model: nn.Module,
    lr: float = 0.02,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.01,
    ns_steps: int = 5,
    coefficients: str = "polar_express",
    scale: str = "spectral",
    adamw_lr: float | None = None,
    adamw_betas: tuple[float, float] = (0.9, 0.95),
    adamw_eps: float = 1e-8,
    adamw_weight_decay: float | None = None,
) -> "Muon":
    """Muon for the hidden matrices of a model, AdamW for its embeddings, output layer, norms, biases and routers.

    Hidden matrices are parameters of two dimensions, or of three, which are stacks (experts), that are no embedding and
    do not belong to a module named `head`, `lm_head`, `score`, `classifier`, `gate` or `router`. `group_table` shows
    what went where.

    Args:
        model: its parameters with `requires_grad=True` are trained; sharded by `fully_shard` or not.
        lr: the peak learning rate of the matrices.
        momentum: how slowly the average of gradients forgets.
        nesterov: looks ahead by one step, as is usual.
        weight_decay: of the matrices; a step takes `lr * weight_decay` of a weight.
        ns_steps, coefficients: of `orthogonalize`: `polar_express`, or `quintic`, Jordan's own.
        scale: `spectral`: `sqrt(max(1, rows / columns))`, so that outputs change alike whatever the shape (Jordan);
            the usual lr is 0.02. `match_rms_adamw`: `0.2 sqrt(max(rows, columns))`, which gives a weight's update the
            size that AdamW's has (Liu et al., section 2.2); lr is AdamW's, such as 1e-3.
        adamw_lr: the peak learning rate of everything else. None: 0.1 of `lr` with `spectral`, `lr` with the other.
        adamw_betas, adamw_eps: of AdamW.
        adamw_weight_decay: of matrices that AdamW trains, such as an output layer of its own; embeddings, norms and
            biases are not decayed. None: `weight_decay`.

    Raises:
        UserError: a value is out of range, or nothing in the model is trainable.
    """
    if adamw_lr is None:
        adamw_lr = 0.1 * lr if scale == "spectral" else lr
    if adamw_weight_decay is None:
        adamw_weight_decay = weight_decay
    problems = [
        f"{name}: {value} must be 0 or more"
        for name, value in (
            ("lr", lr),
            ("weight_decay", weight_decay),
            ("adamw_lr", adamw_lr),
            ("adamw_eps", adamw_eps),
            ("adamw_weight_decay", adamw_weight_decay),
        )
        if not 0 <= value < math.inf
    ]
    betas = tuple(adamw_betas)
    if not 0 <= momentum < 1:
        problems.append(f"momentum: {momentum} must be from 0 up to, not including, 1, such as 0.95")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        problems.append(f"adamw_betas: {list(betas)} must be two numbers from 0 up to, not including, 1")
    if ns_steps < 1:
        problems.append(f"ns_steps: {ns_steps} must be 1 or more, such as 5")
    for name, value, known in (("coefficients", coefficients, COEFFICIENTS), ("scale", scale, SCALES)):
        if value not in known:
            problems.append(f"{name}: {value!r} is not one of {', '.join(known)}")
    if problems:
        raise UserError("\n".join(f"optimizer {problem}." for problem in problems))

    hidden = {"kind": "muon", "lr": lr, "initial_lr": lr, "weight_decay": weight_decay, "momentum": momentum}
    hidden |= {"nesterov": nesterov, "ns_steps": ns_steps, "coefficients": coefficients, "scale": scale}
    others = {"kind": "adamw", "lr": adamw_lr, "initial_lr": adamw_lr, "betas": betas, "eps": adamw_eps}
    matrices = hidden_matrices(model)
    groups = [hidden | {"params": matrices}] if matrices else []
    taken = {id(parameter) for _, parameter in matrices}
    for group in decay_groups(model, adamw_weight_decay):
        rest = [pair for pair in group["params"] if id(pair[1]) not in taken]
        if rest:
            groups.append(others | {"params": rest, "weight_decay": group["weight_decay"]})
    if not groups:
        raise UserError("optimizer model: no parameter is trainable. Set requires_grad=True on what it shall change.")
    return Muon(groups, fused_rows(model))


def hidden_matrices(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(Name, parameter) of what Muon trains, in the model's order."""
    decayed = next((group["params"] for group in decay_groups(model, 1.0) if group["weight_decay"]), [])
    return [
        (name, parameter)
        for name, parameter in decayed
        if parameter.ndim in (2, 3) and not set(name.split(".")[:-1]) & set(_NOT_HIDDEN)
    ]


def fused_rows(model: nn.Module) -> dict[nn.Parameter, tuple[int, ...]]:
    """The rows of the parts of parameters that hold several matrices, as their modules say it: `fused_rows`."""
    return {
        module.get_parameter(name): rows
        for module in model.modules()
        for name, rows in getattr(module, "fused_rows", {}).items()
    }


class Muon(torch.optim.Optimizer):
    """See `muon`, which makes the groups.

    State: of matrices `momentum_buffer`, sharded as the parameter is; of others what AdamW has. Gradients stay.

    Args:
        params: groups with `kind` `muon` or `adamw`.
        fused_rows: parameters that hold several matrices below each other -> the rows of each.
    """

    def __init__(self, params: Iterable[dict], fused_rows: dict[nn.Parameter, tuple[int, ...]] | None = None):
        super().__init__(params, {})
        self._fused_rows = {id(parameter): rows for parameter, rows in (fused_rows or {}).items()}

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """Updates the parameters that have a gradient. In a process group all ranks call it together."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            with_gradient = [p for p in group["params"] if p.grad is not None]
            if with_gradient and group["kind"] == "adamw":
                self._adamw(group, with_gradient)
            elif with_gradient:
                self._muon(group, with_gradient)
        return loss

    def _adamw(self, group: dict, params: list[Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        states = [self.state[p] for p in params]
        beta1, beta2 = group["betas"]
        adamw_step(
            [_local(p) for p in params],
            [_local(p.grad) for p in params],
            [_local(state["exp_avg"]) for state in states],
            [_local(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _muon(self, group: dict, params: list[Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        gradients = [_local(p.grad) for p in params]
        buffers = [_local(self.state[p]["momentum_buffer"]) for p in params]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, buffers, group["momentum"]) if group["nesterov"] else buffers

        weights = [_local(p) for p in params]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        alike: dict[tuple, list[int]] = {}
        for i, p in enumerate(params):
            alike.setdefault((tuple(p.shape), self._rows(p), _whole_experts(p)), []).append(i)
        for (shape, rows, whole_experts), members in alike.items():
            chosen = [updates[i] for i in members]
            if not whole_experts:
                dtype = fast_dtype(chosen[0].device)
                chosen = [_gather(update.to(dtype), params[i]) for update, i in zip(chosen, members, strict=True)]
            done = _orthogonal_parts(chosen, rows, group, share=not whole_experts)
            factors = [_factor(group["scale"], count, shape[-1]) for count in rows]
            for i, parts in zip(members, done, strict=True):
                scaled = [part.mul_(factor) for part, factor in zip(parts, factors, strict=True)]
                update = torch.cat(scaled, dim=-2) if len(scaled) > 1 else scaled[0]
                if not whole_experts:
                    update = _my_part(update, params[i])
                weights[i].add_(update.to(weights[i].dtype), alpha=-group["lr"])

    def _rows(self, p: Tensor) -> tuple[int, ...]:
        return tuple(self._fused_rows.get(id(p), (p.shape[-2],)))


def _orthogonal_parts(updates: list[Tensor], rows: tuple[int, ...], group: dict, share: bool) -> list[list[Tensor]]:
    """Of every update (alike in shape) its parts, each made orthogonal; `share`: the ranks share the work."""
    by_part = [torch.stack(parts) for parts in zip(*(update.split(rows, dim=-2) for update in updates), strict=True)]
    done = []
    for stack in by_part:
        matrices = stack.flatten(0, -3)
        if share:
            matrices = _shared(matrices, group)
        else:
            matrices = orthogonalize(matrices, group["ns_steps"], group["coefficients"])
        done.append(matrices.view(stack.shape).unbind())
    return [list(parts) for parts in zip(*done, strict=True)]


def _shared(matrices: Tensor, group: dict) -> Tensor:
    """`orthogonalize` of `[n, R, C]`, the same on every rank, of which each does n / ranks."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ranks == 1:
        return orthogonalize(matrices, group["ns_steps"], group["coefficients"])
    each = -(-len(matrices) // ranks)
    first = dist.get_rank() * each
    mine = orthogonalize(matrices[first : first + each], group["ns_steps"], group["coefficients"])
    padded = mine.new_zeros(each, *matrices.shape[1:])
    padded[: len(mine)] = mine
    found = mine.new_empty(ranks * each, *matrices.shape[1:])
    dist.all_gather_into_tensor(found, padded)
    return found[: len(matrices)]


def _factor(scale: str, rows: int, columns: int) -> float:
    if scale == "spectral":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))


def _whole_experts(p: Tensor) -> bool:
    """Whether a rank has some matrices of a stack, and those whole: then nothing has to be sent."""
    return p.ndim == 3 and isinstance(p, DTensor) and p.to_local().shape != p.shape


def _gather(local: Tensor, like: Tensor) -> Tensor:
    """The whole of a tensor of which this rank has the part `local`, split as the parameter `like` is."""
    if not isinstance(like, DTensor):
        return local
    whole = DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return whole.full_tensor()


def _my_part(whole: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_gather`."""
    if not isinstance(like, DTensor):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x
