"""AdamW whose state stays in the CPU's memory, where the weights are updated."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from torchrecipes.errors import UserError
from torchrecipes.estimation import kernel_device
from torchrecipes.optim.adamw_variants import adamw_groups, fused_adamw_, to_local


def adamw_cpu_offload(
    model: nn.Module,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> torch.optim.Optimizer:
    """AdamW on the CPU for a model on a GPU: its state, 8 bytes per parameter, takes no GPU memory.

    A step copies weights and gradients to the CPU and the weights back, 12 bytes per parameter, and waits for it. That
    pays where the state does not fit on the GPU, and a step has many micro-batches to spread the time over.

    Args:
        model: on a CUDA device, or on the meta device for a check.
        lr, betas, eps, weight_decay: see `adamw`.

    Raises:
        UserError: a parameter is not on a CUDA device, a value is out of range, or no parameter is trainable.
    """
    betas = tuple(betas)
    groups = adamw_groups(model, lr, betas, eps, weight_decay)
    devices = {p.device for group in groups for _, p in group["params"]}
    elsewhere = sorted(str(device) for device in devices if kernel_device(device) not in ("cuda", "meta"))
    if elsewhere:
        raise UserError(
            f"adamw_cpu_offload is for parameters on a CUDA device, and they are on {', '.join(elsewhere)}",
            hint="Use torchrecipes.optim.adamw there (on a GPU: build it after the model was moved).",
            code="not_on_cuda",
        )
    return OffloadedAdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


class OffloadedAdamW(torch.optim.Optimizer):
    """`torch.optim.AdamW`, fused, on copies of the weights in the CPU's memory, where its state stays.

    Weights and gradients are read in `step`, so clipping, accumulation and skipped steps work as with any optimizer,
    and a checkpoint may be loaded at any time. (torchao's CPUOffloadOptimizer copies gradients while they are computed,
    before they are clipped, and copies the weights once, when it is built.)

    Args:
        params: groups, on any one device; `DTensor`s, too.
        lr, betas, eps, weight_decay: defaults of the groups.
    """

    def __init__(self, params: ParamsT, lr: float, betas: tuple[float, float], eps: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """Updates the parameters that have a gradient. It waits for the gradients, not for the new weights."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not work:
            return loss
        device = work[0][1].device
        stream = None
        if device.type == "cuda":
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
        # All copies start at once: a parameter is updated while later ones are still being copied.
        copies = [_copy_to_host(p, stream) for _, p in work]
        for (group, p), (weight, gradient, arrived) in zip(work, copies, strict=True):
            if arrived is not None:
                arrived.synchronize()
            self._update(group, p, weight, gradient)
            with torch.cuda.stream(stream):
                to_local(p).copy_(weight, non_blocking=True)
        if stream is not None:
            torch.cuda.current_stream(device).wait_stream(stream)
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """As in `torch.optim`, but state goes to the CPU, not to the parameters' device."""
        super().load_state_dict(state_dict | {"state": {}})
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(numbers, parameters, strict=True):
            if number in state_dict["state"]:
                self.state[p] = {kind: value.to("cpu") for kind, value in state_dict["state"][number].items()}

    def _update(self, group: dict, p: Tensor, weight: Tensor, gradient: Tensor) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(p, device="cpu")
            state["exp_avg_sq"] = torch.zeros_like(p, device="cpu")
        fused_adamw_(group, [weight], [gradient], [state])


def _copy_to_host(p: Tensor, stream: torch.cuda.Stream | None) -> tuple[Tensor, Tensor, torch.cuda.Event | None]:
    """Copies a parameter and its gradient to (pinned) CPU memory; the event fires when they can be read."""
    with torch.cuda.stream(stream):
        weight, gradient = (to_local(x).to("cpu", non_blocking=True, copy=True) for x in (p, p.grad))
    return weight, gradient, stream.record_event() if stream is not None else None
