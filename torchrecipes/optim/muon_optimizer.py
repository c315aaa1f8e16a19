"""Muon: momentum whose matrices are made orthogonal, for hidden matrices, with AdamW for everything else.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon); with decoupled weight decay and a scale that lets AdamW's
learning rates be kept, Liu et al. 2025, arXiv:2502.16982.

`torch.optim.Muon` takes matrices only, so a model needs two optimizers; it takes fused matrices for one, multiplies
one by one, and under `fully_shard` every rank repeats the work for the whole model. Here

- one optimizer, with one state dict, has groups of both kinds;
- what is fused (queries, keys, values; gate and up) is made orthogonal part by part, what is stacked expert by expert;
- matrices of one shape are multiplied as one batch;
- the ranks of a run share the matrices out and send each other the results (`torchrecipes.optim.distributed_muon`).
"""

import math
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.conv import _ConvNd
from torch.optim.adamw import adamw as adamw_step

from torchrecipes.errors import UserError
from torchrecipes.optim.distributed_muon import MatrixShard, MatrixSharding
from torchrecipes.optim.groups import weight_decay_groups
from torchrecipes.optim.newton_schulz import COEFFICIENTS, DTYPES, fast_dtype, orthogonalize

SCALES = ("spectral", "match_rms_adamw")
# Modules whose matrices make scores of tokens or classes, or choose experts.
_NOT_HIDDEN = {"head", "lm_head", "score", "classifier", "gate", "router"}


def muon(
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
) -> "Muon":
    """Muon for the hidden matrices of a model, AdamW for its embeddings, output layer, norms, biases and routers.

    `muon_params` says which is which, and `describe_param_groups` shows what went where.

    Args:
        model: its parameters with `requires_grad=True` are trained; sharded by `fully_shard` or not.
        lr: the peak learning rate of the matrices.
        momentum: how slowly the average of gradients forgets.
        nesterov: looks ahead by one step, as is usual.
        weight_decay: of the matrices; a step takes `lr * weight_decay` of a weight.
        ns_steps, ns_coefficients: of `orthogonalize`: `polar_express`, or `quintic`, Jordan's own.
        scale: `spectral`: `sqrt(max(1, rows / columns))`, so that outputs change alike whatever the shape (Jordan);
            the usual lr is 0.02. `match_rms_adamw`: `0.2 sqrt(max(rows, columns))`, which gives a weight's update the
            size that AdamW's has (Liu et al., section 2.2); lr is AdamW's, such as 1e-3.
        adamw_lr: the peak learning rate of everything else. None: 0.1 of `lr` with `spectral`, `lr` with the other.
        adamw_betas, adamw_eps: of AdamW.
        adamw_weight_decay: of matrices that AdamW trains, such as an output layer of its own; embeddings, norms and
            biases are not decayed. None: `weight_decay`.
        adamw_param_patterns: more parameters for AdamW, as patterns of names such as `encoder.*.out.weight`.
        ns_dtype: what matrices are made orthogonal in: `auto` (bf16 where the device multiplies it in hardware, else
            fp32), `bf16` or `fp32`.

    Raises:
        UserError: a value is out of range, a pattern fits no parameter, or nothing in the model is trainable.
    """
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
    )
    return Muon(groups, row_splits(model))


def muon_groups(
    model: nn.Module,
    *,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    ns_steps: int,
    ns_coefficients: str,
    scale: str,
    adamw_lr: float | None,
    adamw_betas: tuple[float, float],
    adamw_eps: float,
    adamw_weight_decay: float | None,
    adamw_param_patterns: Iterable[str],
    ns_dtype: str,
    problems: Iterable[str] = (),
) -> list[dict]:
    """Groups for `Muon`, each with its `kind` and its settings.

    Args:
        problems: what is wrong with other settings, to be told together with what is wrong with these.
        model, lr and so on: see `muon`.

    Raises:
        UserError: see `muon`.
    """
    if adamw_lr is None:
        adamw_lr = 0.1 * lr if scale == "spectral" else lr
    if adamw_weight_decay is None:
        adamw_weight_decay = weight_decay
    betas, patterns = tuple(adamw_betas), tuple(adamw_param_patterns)
    numbers = {
        "lr": lr,
        "weight_decay": weight_decay,
        "adamw_lr": adamw_lr,
        "adamw_eps": adamw_eps,
        "adamw_weight_decay": adamw_weight_decay,
    }
    problems = [
        *problems,
        *(f"{name}: {value} must be 0 or more" for name, value in numbers.items() if not 0 <= value < math.inf),
    ]
    if not 0 <= momentum < 1:
        problems.append(f"momentum: {momentum} must be from 0 up to, not including, 1, such as 0.95")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        problems.append(f"adamw_betas: {list(betas)} must be two numbers from 0 up to, not including, 1")
    if ns_steps < 1:
        problems.append(f"ns_steps: {ns_steps} must be 1 or more, such as 5")
    choices = {
        "ns_coefficients": (ns_coefficients, COEFFICIENTS),
        "scale": (scale, SCALES),
        "ns_dtype": (ns_dtype, DTYPES),
    }
    for name, (value, known) in choices.items():
        if value not in known:
            problems.append(f"{name}: {value!r} is not one of {', '.join(known)}")
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            problems.append(f"adamw_param_patterns: {pattern!r} fits no parameter; they have names such as {names[:1]}")
    matrices = [pair for pair in muon_params(model) if not any(fnmatchcase(pair[0], p) for p in patterns)]
    taken = {id(parameter) for _, parameter in matrices}
    hidden = {"kind": "muon", "lr": lr, "weight_decay": weight_decay, "momentum": momentum}
    hidden |= {"nesterov": nesterov, "ns_steps": ns_steps, "ns_coefficients": ns_coefficients, "scale": scale}
    hidden |= {"ns_dtype": ns_dtype}
    others = {"kind": "adamw", "lr": adamw_lr, "betas": betas, "eps": adamw_eps, "fused": True}
    groups = [hidden | {"params": matrices}] if matrices else []
    for group in weight_decay_groups(model, adamw_weight_decay):
        rest = [pair for pair in group["params"] if id(pair[1]) not in taken]
        if rest:
            groups.append(others | {"params": rest, "weight_decay": group["weight_decay"]})
    if not groups:
        problems.append("model: no parameter is trainable. Set requires_grad=True on what the optimizer shall change")
    if problems:
        raise UserError("\n".join(f"optimizer {problem}." for problem in problems))
    return groups


def muon_params(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(Name, parameter) of what Muon trains, in the model's order.

    These are the trainable parameters of two dimensions, or of three, which are stacks (of experts), that are no
    embedding and no norm's (`weight_decay_groups`), do not belong to a module named `head`, `lm_head`, `score`,
    `classifier`,
    `gate` or `router`, are not what `get_output_embeddings()` of `transformers` gives, and do not belong to a
    convolution. What has more dimensions is left to AdamW, as are convolutions of any.
    """
    not_hidden = {id(p) for m in model.modules() if isinstance(m, _ConvNd) for p in m.parameters(recurse=False)}
    if hasattr(model, "get_output_embeddings") and (head := model.get_output_embeddings()) is not None:
        not_hidden |= {id(p) for p in head.parameters()}
    decayed = next((group["params"] for group in weight_decay_groups(model, 1.0) if group["weight_decay"]), [])
    return [
        (name, parameter)
        for name, parameter in decayed
        if parameter.ndim in (2, 3) and id(parameter) not in not_hidden and not _NOT_HIDDEN & set(name.split(".")[:-1])
    ]


def row_splits(model: nn.Module) -> dict[nn.Parameter, tuple[int, ...]]:
    """The rows of the parts of parameters that hold several matrices, as modules say it in an attribute `row_splits`:
    a dict from the parameter's name in the module to the rows of each part, from the first row on.
    """
    return {
        module.get_parameter(name): rows
        for module in model.modules()
        for name, rows in getattr(module, "row_splits", {}).items()
    }


class Muon(torch.optim.Optimizer):
    """See `muon`, which makes the groups.

    State: of matrices `momentum_buffer`, sharded as the parameter is; of others what AdamW has. Gradients stay.

    Args:
        params: groups with `kind` `muon` or `adamw`.
        row_splits: parameters that hold several matrices below each other -> the rows of each.

    Attributes:
        takes_found_inf: whether a step changes nothing if an attribute `found_inf`, `[]` fp32 on the device, is 1, as
            in PyTorch's fused optimizers; the gradients of matrices are lost then.
    """

    takes_found_inf = True

    def __init__(self, params: Iterable[dict], row_splits: dict[nn.Parameter, tuple[int, ...]] | None = None):
        super().__init__(params, {})
        self._fused_rows = {id(parameter): tuple(rows) for parameter, rows in (row_splits or {}).items()}
        self._layouts: dict[tuple[int, ...], list[MatrixSharding]] = {}

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """Updates the parameters that have a gradient. In a process group all ranks call it together.

        Raises:
            UserError: a matrix is sharded in another way than by `fully_shard`, along its first dimension.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            with_gradient = [p for p in group["params"] if p.grad is not None]
            if with_gradient and group["kind"] == "adamw":
                self._adamw(group, with_gradient, found_inf)
            elif with_gradient:
                self._muon(group, with_gradient, found_inf)
        return loss

    def _adamw(self, group: dict, params: list[Tensor], found_inf: Tensor | None) -> None:
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
            found_inf=found_inf,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _muon(self, group: dict, params: list[Tensor], found_inf: Tensor | None) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        key = tuple(map(id, params))
        if key not in self._layouts:
            self._layouts = {key: MatrixSharding.of(params, [self._fused_rows.get(id(p)) for p in params])}
        weights, gradients = [_local(p) for p in params], [_local(p.grad) for p in params]
        buffers = [_local(self.state[p]["momentum_buffer"]) for p in params]
        momentum, rate = group["momentum"], group["lr"]
        kept, share = 1 - rate * group["weight_decay"], None
        if found_inf is not None:  # then gradients become the average, which so stays, weights are not decayed
            skip = found_inf.bool()
            for gradient, average in zip(gradients, buffers, strict=True):
                torch.where(skip, average, gradient, out=gradient)
            kept, share = torch.where(skip, 1.0, kept), torch.where(skip, 0.0, 1.0)  # and of the update remains 0
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        torch._foreach_mul_(weights, kept)
        dtype = DTYPES[group["ns_dtype"]] or fast_dtype(weights[0].device)

        def read(piece: MatrixShard) -> Tensor:
            average = piece.of(buffers[piece.number])
            return piece.of(gradients[piece.number]).lerp(average, momentum) if group["nesterov"] else average

        def compute(stack: Tensor) -> Tensor:
            found = orthogonalize(stack, group["ns_steps"], group["ns_coefficients"], dtype)
            return found if share is None else found.mul_(share)

        for matrices in self._layouts[key]:
            for piece, found in matrices.map(read, compute, dtype):
                factor = _factor(group["scale"], piece.rows, piece.columns)
                piece.of(weights[piece.number]).add_(found, alpha=-rate * factor)


def _factor(scale: str, rows: int, columns: int) -> float:
    if scale == "spectral":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x
