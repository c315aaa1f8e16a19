"""Muon: orthogonalized momentum for hidden matrices, AdamW for all other parameters.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon); with decoupled weight decay and a scale for AdamW's learning
rates, Liu et al. 2025, arXiv:2502.16982.

`torch.optim.Muon` takes matrices only, so a model needs two optimizers; it takes a fused matrix for one, orthogonalizes
matrices one at a time, and under `fully_shard` every rank repeats the work for the whole model. Here

- one optimizer, with one state dict, has groups of both kinds;
- fused matrices (queries, keys, values; gate and up) are orthogonalized part by part, stacked experts one by one;
- matrices of one shape are multiplied as one batch;
- the ranks of a run share the matrices and send each other the results (`torchrecipes.optim.distributed_muon`).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from torchrecipes.errors import UserError
from torchrecipes.optim.adamw_variants import fused_adamw_, to_local
from torchrecipes.optim.distributed_muon import MatrixShard, MatrixSharding
from torchrecipes.optim.groups import weight_decay_groups
from torchrecipes.optim.newton_schulz import COEFFICIENTS, DTYPES, fast_dtype, orthogonalize
from torchrecipes.optim.qk_clip import QKClip
from torchrecipes.optim.settings import bad_betas, negative, nothing_to_train, out_of_range, raise_all

SCALES = ("spectral", "match_rms_adamw")
# Modules whose matrices make scores of tokens or classes, or choose experts.
_NOT_HIDDEN = {"head", "document_head", "lm_head", "score", "classifier", "gate", "router"}


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
    qk_clip_tau: float | None = None,
    qk_clip_every: int = 1,
) -> "Muon":
    """Muon for a model's hidden matrices, AdamW for embeddings, output layer, norms, biases and routers.

    `muon_params` says which is which, and `describe_param_groups` shows it. With `qk_clip_tau` it is MuonClip: build it
    when the model is on its device.

    Args:
        model: its parameters with `requires_grad=True` are trained; sharded by `fully_shard` or not.
        lr: the peak learning rate of the matrices.
        momentum: decay rate of the average of gradients.
        nesterov: looks ahead by one step, as is usual.
        weight_decay: of the matrices; a step decays a weight by `lr * weight_decay`.
        ns_steps, ns_coefficients: of `orthogonalize`: `polar_express`, or `quintic`, Jordan's own.
        scale: `spectral`: `sqrt(max(1, rows / columns))`, so that outputs change alike whatever the shape (Jordan);
            the usual lr is 0.02. `match_rms_adamw`: `0.2 sqrt(max(rows, columns))`, which gives an update the size of
            AdamW's (Liu et al., section 2.2); lr is AdamW's, such as 1e-3.
        adamw_lr: the peak learning rate of all other parameters. None: 0.1 of `lr` with `spectral`, else `lr`.
        adamw_betas, adamw_eps: of AdamW.
        adamw_weight_decay: of matrices that AdamW trains, such as an untied output layer; embeddings, norms and biases
            are not decayed. None: `weight_decay`.
        adamw_param_patterns: more parameters for AdamW, as patterns of names such as `encoder.*.out.weight`.
        ns_dtype: dtype of the orthogonalization: `auto` (bf16 where the device has fast bf16 products, else fp32),
            `bf16` or `fp32`.
        qk_clip_tau: attention logits above it are scaled down after the step (`QKClip`); 100 in Kimi K2. None: off.
        qk_clip_every: steps between two clips; 1 in Kimi K2.

    Raises:
        UserError: a value is out of range, a pattern matches no parameter, no parameter is trainable, or a matrix is
            stored transposed (`Conv1D` of `transformers`); with `qk_clip_tau` also: the model has no attention that
            records its logits, or a norm of queries and keys, which bounds the logits already.
    """
    if adamw_lr is None:
        adamw_lr = 0.1 * lr if scale == "spectral" else lr
    if adamw_weight_decay is None:
        adamw_weight_decay = weight_decay
    betas, patterns = tuple(adamw_betas), tuple(adamw_param_patterns)
    problems = negative(
        lr=lr,
        weight_decay=weight_decay,
        adamw_lr=adamw_lr,
        adamw_eps=adamw_eps,
        adamw_weight_decay=adamw_weight_decay,
    )
    problems += bad_betas("adamw_betas", betas)
    if not 0 <= momentum < 1:
        problems.append(out_of_range("momentum", momentum, "from 0 up to, not including, 1, such as 0.95"))
    if ns_steps < 1:
        problems.append(out_of_range("ns_steps", ns_steps, "1 or more, such as 5"))
    choices = {
        "ns_coefficients": (ns_coefficients, COEFFICIENTS),
        "scale": (scale, SCALES),
        "ns_dtype": (ns_dtype, DTYPES),
    }
    for key, (value, known) in choices.items():
        if value not in known:
            problems.append(UserError(f"{value!r} is not one of {', '.join(known)}", key=key, code="unknown_name"))
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            problem = f"{pattern!r} matches no parameter; they have names such as {names[:1]}"
            problems.append(UserError(problem, key="adamw_param_patterns", code="matches_nothing"))
    matrices = [pair for pair in muon_params(model) if not any(fnmatchcase(pair[0], p) for p in patterns)]
    taken = {id(parameter) for _, parameter in matrices}
    if transposed := [name for name, p in _conv1d_weights(model) if id(p) in taken]:
        problem = (
            f"{transposed[0]} is stored as [inputs, outputs] (Conv1D of transformers), which Muon would scale wrongly"
        )
        hint = "Use torchrecipes.models.gpt2, or give these weights to AdamW with adamw_param_patterns."
        problems.append(UserError(problem, key="model", hint=hint, code="transposed_weights"))
    qk_clip = None
    if qk_clip_tau is not None:
        qk_clip, clip_problems = QKClip.for_model(model, qk_clip_tau, qk_clip_every)
        problems += clip_problems

    groups = []
    if matrices:
        group = {"kind": "muon", "params": matrices, "lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        group |= {"nesterov": nesterov, "ns_steps": ns_steps, "ns_coefficients": ns_coefficients}
        groups.append(group | {"scale": scale, "ns_dtype": ns_dtype})
    for group in weight_decay_groups(model, adamw_weight_decay):
        if rest := [pair for pair in group["params"] if id(pair[1]) not in taken]:
            settings = {"kind": "adamw", "lr": adamw_lr, "betas": betas, "eps": adamw_eps, "fused": True}
            groups.append(settings | {"params": rest, "weight_decay": group["weight_decay"]})
    raise_all(problems + ([] if groups else [nothing_to_train()]))
    optimizer = Muon(groups, row_splits(model))
    if qk_clip is not None:
        qk_clip.attach(optimizer)
    return optimizer


def muon_params(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(Name, parameter) of what Muon trains, in the model's order.

    These are the trainable parameters of two dimensions, or of three, which are stacks (of experts), except

    - embeddings and norms (`weight_decay_groups`), and convolutions of any number of dimensions;
    - those of a module named `head`, `document_head`, `lm_head`, `score`, `classifier`, `gate` or `router`;
    - those of `get_output_embeddings()`, as `transformers` has it.
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
    """The parameters that hold several matrices below each other -> the rows of each.

    A module declares them in an attribute `row_splits`, a dict from the name of its parameter to the rows.
    """
    return {
        module.get_parameter(name): rows
        for module in model.modules()
        for name, rows in getattr(module, "row_splits", {}).items()
    }


def _conv1d_weights(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    modules = [(name, m) for name, m in model.named_modules() if type(m).__name__ == "Conv1D" and hasattr(m, "nf")]
    return [(f"{name}.weight", module.weight) for name, module in modules]


class Muon(torch.optim.Optimizer):
    """The optimizer that `muon` makes.

    State: `momentum_buffer` of matrices, sharded as the parameter is; AdamW's of other parameters. Gradients are kept.

    Args:
        params: groups with `kind` `muon` or `adamw`.
        row_splits: parameters that hold several matrices below each other -> the rows of each.

    Attributes:
        takes_found_inf: whether a step changes nothing if the attribute `found_inf`, `[]` fp32 on the device, is 1, as
            in PyTorch's fused optimizers. The gradients of matrices are lost then.
    """

    takes_found_inf = True

    def __init__(self, params: Iterable[dict], row_splits: dict[nn.Parameter, tuple[int, ...]] | None = None):
        super().__init__(params, {})
        self._fused_rows = {id(parameter): tuple(rows) for parameter, rows in (row_splits or {}).items()}
        self._layouts: dict[tuple[int, ...], list[MatrixSharding]] = {}

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> float | None:
        """Updates the parameters that have a gradient. A collective: in a process group all ranks call it.

        Raises:
            UserError: a matrix is not sharded along its first dimension, as `fully_shard` does it.
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
        weights, gradients = [to_local(p) for p in params], [to_local(p.grad) for p in params]
        fused_adamw_(group, weights, gradients, [self.state[p] for p in params], found_inf)

    def _muon(self, group: dict, params: list[Tensor], found_inf: Tensor | None) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        key = tuple(map(id, params))
        if key not in self._layouts:
            self._layouts = {key: MatrixSharding.of(params, [self._fused_rows.get(id(p)) for p in params])}
        weights, gradients = [to_local(p) for p in params], [to_local(p.grad) for p in params]
        buffers = [to_local(self.state[p]["momentum_buffer"]) for p in params]
        momentum, rate = group["momentum"], group["lr"]
        kept, share = 1 - rate * group["weight_decay"], None
        if found_inf is not None:
            # A skipped step replaces gradients by the average, which so stays, decays nothing and adds an update of 0.
            skip = found_inf.bool()
            for gradient, average in zip(gradients, buffers, strict=True):
                torch.where(skip, average, gradient, out=gradient)
            kept, share = torch.where(skip, 1.0, kept), torch.where(skip, 0.0, 1.0)
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        torch._foreach_mul_(weights, kept)
        dtype = DTYPES[group["ns_dtype"]] or fast_dtype(weights[0].device)

        def read(pieces: list[MatrixShard]) -> Sequence[Tensor]:
            averages = [piece.of(buffers[piece.number]) for piece in pieces]
            if not group["nesterov"]:
                return averages
            return torch._foreach_lerp([piece.of(gradients[piece.number]) for piece in pieces], averages, momentum)

        def compute(stack: Tensor) -> Tensor:
            found = orthogonalize(stack, group["ns_steps"], group["ns_coefficients"], dtype)
            return found if share is None else found.mul_(share)

        for matrices in self._layouts[key]:
            for pieces, found in matrices.map(read, compute, dtype):
                if pieces:  # of one shape
                    factor = _factor(group["scale"], pieces[0].rows, pieces[0].columns)
                    rows = [piece.of(weights[piece.number]) for piece in pieces]
                    torch._foreach_add_(rows, found, alpha=-rate * factor)


def _factor(scale: str, rows: int, columns: int) -> float:
    if scale == "spectral":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))
