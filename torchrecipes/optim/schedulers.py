"""Learning-rate schedules as torch's `LambdaLR`: linear warm-up, then constant, or a decay to a share of the peak.

The learning rate of optimizer step n (from 1 to `max_steps`) is each group's own peak times `multiplier(n)`, with w
warm-up steps and d decay steps at the end:

    n <= w                    n / w                     the first step has lr / w, step w the full lr
    w < n <= max_steps - d    1
    then                      m + (1 - m) * f(p)        p = (n - (max_steps - d)) / d, m = min_lr_ratio

f falls from f(0) = 1 to f(1) = 0, so the last step has exactly `min_lr_ratio` times the full lr (with a ratio of 0 the
last step changes nothing). Without warm-up, a cosine or linear decay begins with the first step.

Call `scheduler.step()` after each `optimizer.step()`.
"""

import math
from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from torchrecipes.errors import UserError

_DECAYS = {
    "linear": lambda p: 1 - p,
    "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2,
    # Hägele et al., 2024, arXiv:2405.18392, section 3: a lower loss than a linear decay of the same length.
    "sqrt": lambda p: 1 - math.sqrt(p),
}


class Schedule(LambdaLR):
    """`LambdaLR` whose state is the number of steps alone: a resumed run may have another `max_steps` or peak.

    Args:
        optimizer: each of its groups keeps its own learning rate as the peak.
        multiplier: from the step, counted from 1, to the share of the peak that it has.
    """

    def __init__(self, optimizer: Optimizer, multiplier: Callable[[int], float]):
        super().__init__(optimizer, lambda epoch: multiplier(epoch + 1))

    def state_dict(self) -> dict[str, int]:
        """`last_epoch`, the number of steps done."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continues after that many steps; sets the learning rates of the optimizer's groups, too."""
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = self.last_epoch + 1
        for group, share, peak in zip(self.optimizer.param_groups, self.lr_lambdas, self.base_lrs, strict=True):
            value = peak * share(self.last_epoch)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(value)
            else:
                group["lr"] = value
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self._last_lr = [lr.clone() if isinstance(lr, Tensor) else lr for lr in rates]


def multiplier(
    step: int,
    *,
    max_steps: int,
    warmup_steps: int,
    decay_steps: int = 0,
    decay: str = "linear",
    min_lr_ratio: float = 1.0,
) -> float:
    """The share of the full learning rate that an optimizer step has; the formula is above.

    Args:
        step: counted from 1; beyond `max_steps` the multiplier stays as it was there.
        max_steps: optimizer steps of the whole run.
        warmup_steps: optimizer steps until the full learning rate.
        decay_steps: optimizer steps at the end in which the learning rate falls.
        decay: its shape: `linear`, `cosine` or `sqrt` (1 - sqrt(progress)).
        min_lr_ratio: where it ends, as a share of the full learning rate.
    """
    if step <= warmup_steps:
        return step / warmup_steps
    into_decay = min(step, max_steps) - (max_steps - decay_steps)
    if into_decay <= 0:
        return 1.0
    if into_decay == decay_steps:
        return float(min_lr_ratio)
    return min_lr_ratio + (1 - min_lr_ratio) * _DECAYS[decay](into_decay / decay_steps)


def cosine(
    optimizer: Optimizer,
    max_steps: int,
    warmup_steps: int | None = None,
    warmup_ratio: float | None = None,
    min_lr_ratio: float = 0.1,
) -> Schedule:
    """Linear warm-up, then half a cosine down to `min_lr_ratio` (Loshchilov and Hutter, 2016, arXiv:1608.03983).

    Args:
        optimizer: each of its groups keeps its own learning rate as the peak.
        max_steps: optimizer steps of the whole run.
        warmup_steps: optimizer steps until the full learning rate; or
        warmup_ratio: the same as a share of `max_steps`. With neither it is 0.05 of `max_steps`; 0 is none.
        min_lr_ratio: the last step's learning rate, as a share of the full one.

    Raises:
        UserError: a value is out of range, or `warmup_steps` and `warmup_ratio` are both given.
    """
    warmup = _num_steps("warmup", warmup_steps, warmup_ratio, 0.05, max_steps)
    return _schedule(optimizer, max_steps, warmup, max_steps - round(warmup), "cosine", min_lr_ratio)


def linear(
    optimizer: Optimizer,
    max_steps: int,
    warmup_steps: int | None = None,
    warmup_ratio: float | None = None,
    min_lr_ratio: float = 0.1,
) -> Schedule:
    """Linear warm-up, then a straight line down to `min_lr_ratio`. Arguments and errors are those of `cosine`."""
    warmup = _num_steps("warmup", warmup_steps, warmup_ratio, 0.05, max_steps)
    return _schedule(optimizer, max_steps, warmup, max_steps - round(warmup), "linear", min_lr_ratio)


def constant(
    optimizer: Optimizer, max_steps: int, warmup_steps: int | None = None, warmup_ratio: float | None = None
) -> Schedule:
    """Linear warm-up, then the full learning rate to the end. Arguments and errors are those of `cosine`."""
    warmup = _num_steps("warmup", warmup_steps, warmup_ratio, 0.05, max_steps)
    return _schedule(optimizer, max_steps, warmup, 0, "linear", 1.0)


def warmup_stable_decay(
    optimizer: Optimizer,
    max_steps: int,
    warmup_steps: int | None = None,
    warmup_ratio: float | None = None,
    decay_steps: int | None = None,
    decay_ratio: float | None = None,
    decay: str = "sqrt",
    min_lr_ratio: float = 0.1,
) -> Schedule:
    """Linear warm-up, the full learning rate for most of the run, then a decay (Hu et al., 2024, arXiv:2404.06395).

    A run can be stopped or extended at any step before the decay, because nothing until there depends on `max_steps`.

    Args:
        optimizer: each of its groups keeps its own learning rate as the peak.
        max_steps: optimizer steps of the whole run.
        warmup_steps: optimizer steps until the full learning rate; or
        warmup_ratio: the same as a share of `max_steps`. With neither it is 0.05 of `max_steps`; 0 is none.
        decay_steps: optimizer steps of the decay at the end; or
        decay_ratio: the same as a share of `max_steps`. With neither it is 0.1 of `max_steps`.
        decay: `sqrt` (1 - sqrt(progress)), `linear` or `cosine`.
        min_lr_ratio: the last step's learning rate, as a share of the full one.

    Raises:
        UserError: a value is out of range, a length is given twice, or warm-up and decay are longer than the run.
    """
    if decay not in _DECAYS:
        raise UserError(f"{decay!r} is not one of {', '.join(sorted(_DECAYS))}", key="decay", code="unknown_name")
    warmup = _num_steps("warmup", warmup_steps, warmup_ratio, 0.05, max_steps)
    decay_length = _num_steps("decay", decay_steps, decay_ratio, 0.1, max_steps)
    if warmup + decay_length > max_steps * (1 + 1e-9):  # ratios that sum to 1 do so but for rounding
        raise UserError(
            f"{warmup:g} steps of warm-up and {decay_length:g} of decay are more than max_steps = {max_steps}",
            key="decay_steps" if decay_ratio is None else "decay_ratio",
            hint="Lower warmup_steps or decay_steps (or the ratios), or raise max_steps.",
            code="schedule_too_long",
        )
    decay_length = min(round(decay_length), max_steps - round(warmup))
    return _schedule(optimizer, max_steps, warmup, decay_length, decay, min_lr_ratio)


def _schedule(optimizer, max_steps, warmup, decay_steps, decay, min_lr_ratio):
    if not 0 <= min_lr_ratio <= 1:
        raise UserError(
            f"{min_lr_ratio} is not between 0 and 1",
            key="min_lr_ratio",
            hint="Give the last learning rate as a share of the full one, such as 0.1.",
            code="out_of_range",
        )
    at = partial(
        multiplier,
        max_steps=max_steps,
        warmup_steps=round(warmup),
        decay_steps=decay_steps,
        decay=decay,
        min_lr_ratio=min_lr_ratio,
    )
    return Schedule(optimizer, at)


def _num_steps(phase, steps, ratio, default_ratio, max_steps) -> float:
    """The length of a phase in optimizer steps, from `<phase>_steps` or `<phase>_ratio`; a ratio's is not rounded."""
    if max_steps < 1:
        raise UserError(
            f"{max_steps} is not 1 or more; a schedule needs the number of optimizer steps",
            key="max_steps",
            code="out_of_range",
        )
    if steps is not None and ratio is not None:
        raise UserError(
            f"{phase}_steps = {steps} and {phase}_ratio = {ratio} are both given",
            key=f"{phase}_steps",
            hint="Remove one of them (in a config, set it to null).",
            code="conflicting_keys",
        )
    if steps is None:
        ratio = default_ratio if ratio is None else ratio
        if not 0 <= ratio <= 1:
            raise UserError(
                f"{ratio} is not between 0 and 1",
                key=f"{phase}_ratio",
                hint=f"It is a share of max_steps; for a number of steps use {phase}_steps.",
                code="out_of_range",
            )
        return ratio * max_steps
    if not 0 <= steps <= max_steps:
        raise UserError(
            f"{steps} is not between 0 and max_steps = {max_steps}",
            key=f"{phase}_steps",
            hint=f"Use a number in that range, or {phase}_ratio, a share of max_steps.",
            code="out_of_range",
        )
    return steps
