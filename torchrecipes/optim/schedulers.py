"""Learning-rate schedules: a multiplier for every optimizer step, a function of the step's number and nothing else.

The multiplier of step n (from 1 to `max_steps`), with w steps of warm-up and d steps of decay at the end:

    n <= w                    n / w                     the first step has lr / w, step w the full lr
    w < n <= max_steps - d    1
    then                      m + (1 - m) * f(p)        p = (n - (max_steps - d)) / d, m = min_lr_ratio

f falls from f(0) = 1 to f(1) = 0, so the last step has exactly `min_lr_ratio` times the full lr (with a ratio of 0 the
last step changes nothing). Without warm-up a cosine or linear schedule begins its decay with the first step.
"""

import math
from dataclasses import dataclass

import torch

from torchrecipes.errors import UserError

_DECAYS = {
    "linear": lambda p: 1 - p,
    "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2,
    # Hägele et al., 2024, arXiv:2405.18392, section 3: a lower loss than a linear decay of the same length.
    "sqrt": lambda p: 1 - math.sqrt(p),
}


@dataclass(frozen=True)
class Schedule:
    """Made by `cosine`, `linear`, `constant` or `warmup_stable_decay`, which check what they are given.

    It has no state: a resumed run asks for the next step's multiplier and gets it.

    Attributes:
        max_steps: optimizer steps of the whole run.
        warmup_steps: optimizer steps until the full learning rate.
        decay_steps: optimizer steps at the end in which the learning rate falls.
        decay: its shape: `linear`, `cosine` or `sqrt` (1 - sqrt(progress)).
        min_lr_ratio: where it ends, as a share of the full learning rate.
    """

    max_steps: int
    warmup_steps: int
    decay_steps: int
    decay: str
    min_lr_ratio: float

    def at(self, step: int) -> float:
        """The multiplier of optimizer step `step`, counted from 1. Beyond `max_steps` it stays as it was there.

        Raises:
            ValueError: `step` is less than 1.
        """
        if step < 1:
            raise ValueError(f"optimizer steps are counted from 1, not {step}")
        if step <= self.warmup_steps:
            return step / self.warmup_steps
        into_decay = min(step, self.max_steps) - (self.max_steps - self.decay_steps)
        if into_decay <= 0:
            return 1.0
        if into_decay == self.decay_steps:
            return float(self.min_lr_ratio)
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * _DECAYS[self.decay](into_decay / self.decay_steps)

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Sets every group's `lr` to its own `initial_lr` times `at(step)`; call it before `optimizer.step()`.

        A group without `initial_lr` (an optimizer made elsewhere) gets it from the `lr` that it has now. An `lr` that
        is a tensor, as `torch.compile` and CUDA graphs want, is written in place without waiting for the device.
        """
        multiplier = self.at(step)
        for group in optimizer.param_groups:
            lr = group["lr"]
            is_tensor = isinstance(lr, torch.Tensor)
            if "initial_lr" not in group:
                group["initial_lr"] = lr.clone() if is_tensor else lr
            if is_tensor:
                lr.fill_(group["initial_lr"] * multiplier)
            else:
                group["lr"] = group["initial_lr"] * multiplier


def cosine(
    max_steps: int,
    warmup_steps: int | None = None,
    warmup_ratio: float | None = None,
    min_lr_ratio: float = 0.1,
) -> Schedule:
    """Linear warm-up, then half a cosine down to `min_lr_ratio` (Loshchilov and Hutter, 2016, arXiv:1608.03983).

    Args:
        max_steps: optimizer steps of the whole run.
        warmup_steps: optimizer steps until the full learning rate; or
        warmup_ratio: the same as a share of `max_steps`. With neither it is 0.05 of `max_steps`; 0 is none.
        min_lr_ratio: the last step's learning rate, as a share of the full one.

    Raises:
        UserError: a value is out of range, or two say the same thing.
    """
    warmup = _steps("warmup", warmup_steps, warmup_ratio, 0.05, max_steps)
    return _schedule(max_steps, warmup, max_steps - warmup, "cosine", min_lr_ratio)


def linear(
    max_steps: int,
    warmup_steps: int | None = None,
    warmup_ratio: float | None = None,
    min_lr_ratio: float = 0.1,
) -> Schedule:
    """Linear warm-up, then a straight line down to `min_lr_ratio`. Arguments and errors are those of `cosine`."""
    warmup = _steps("warmup", warmup_steps, warmup_ratio, 0.05, max_steps)
    return _schedule(max_steps, warmup, max_steps - warmup, "linear", min_lr_ratio)


def constant(max_steps: int, warmup_steps: int | None = None, warmup_ratio: float | None = None) -> Schedule:
    """Linear warm-up, then the full learning rate to the end. Arguments and errors are those of `cosine`."""
    return _schedule(max_steps, _steps("warmup", warmup_steps, warmup_ratio, 0.05, max_steps), 0, "linear", 1.0)


def warmup_stable_decay(
    max_steps: int,
    warmup_steps: int | None = None,
    warmup_ratio: float | None = None,
    decay_steps: int | None = None,
    decay_ratio: float | None = None,
    decay: str = "sqrt",
    min_lr_ratio: float = 0.1,
) -> Schedule:
    """Linear warm-up, the full learning rate for most of the run, then a decay (Hu et al., 2024, arXiv:2404.06395).

    A run can be stopped or prolonged at any step before the decay, because nothing until there depends on `max_steps`.

    Args:
        max_steps: optimizer steps of the whole run.
        warmup_steps: optimizer steps until the full learning rate; or
        warmup_ratio: the same as a share of `max_steps`. With neither it is 0.05 of `max_steps`; 0 is none.
        decay_steps: optimizer steps of the decay at the end; or
        decay_ratio: the same as a share of `max_steps`. With neither it is 0.1 of `max_steps`.
        decay: `sqrt` (1 - sqrt(progress)), `linear` or `cosine`.
        min_lr_ratio: the last step's learning rate, as a share of the full one.

    Raises:
        UserError: a value is out of range, two say the same thing, or warm-up and decay are longer than the run.
    """
    if decay not in _DECAYS:
        raise UserError(f"lr_scheduler.decay: {decay!r} is not known. Use {', '.join(sorted(_DECAYS))}.")
    warmup = _steps("warmup", warmup_steps, warmup_ratio, 0.05, max_steps)
    decay_length = _steps("decay", decay_steps, decay_ratio, 0.1, max_steps)
    if warmup + decay_length > max_steps:
        raise UserError(
            f"lr_scheduler: {warmup} steps of warm-up and {decay_length} of decay are more than max_steps = "
            f"{max_steps}. "
            "Lower warmup_steps or decay_steps (or the ratios), or raise max_steps."
        )
    return _schedule(max_steps, warmup, decay_length, decay, min_lr_ratio)


def _schedule(max_steps, warmup_steps, decay_steps, decay, min_lr_ratio):
    if not 0 <= min_lr_ratio <= 1:
        raise UserError(
            f"lr_scheduler.min_lr_ratio: {min_lr_ratio} is not between 0 and 1. Give the last learning rate as a "
            f"share of "
            "the full one, such as 0.1."
        )
    return Schedule(max_steps, warmup_steps, decay_steps, decay, min_lr_ratio)


def _steps(what, steps, ratio, default_ratio, max_steps):
    """The length of a phase, in optimizer steps, from `<what>_steps` or `<what>_ratio`."""
    if max_steps < 1:
        raise UserError(f"max_steps: {max_steps} is not 1 or more. A schedule needs the number of optimizer steps.")
    if steps is not None and ratio is not None:
        raise UserError(
            f"lr_scheduler.{what}_steps = {steps} and {what}_ratio = {ratio} are both given. Remove one of them (in a "
            "config, set it to null)."
        )
    if steps is None:
        ratio = default_ratio if ratio is None else ratio
        if not 0 <= ratio <= 1:
            raise UserError(
                f"lr_scheduler.{what}_ratio: {ratio} is not between 0 and 1. It is a share of max_steps; for a "
                f"number of "
                f"steps use {what}_steps."
            )
        return round(ratio * max_steps)
    if not 0 <= steps <= max_steps:
        raise UserError(
            f"lr_scheduler.{what}_steps: {steps} is not between 0 and max_steps = {max_steps}. Use a number in that "
            f"range, "
            f"or {what}_ratio, a share of max_steps."
        )
    return steps
