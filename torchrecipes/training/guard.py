"""Skips steps whose loss or gradient is not finite, reports loss spikes, rolls back, and scales the loss in fp16."""

import math
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from torchrecipes.devices import preset
from torchrecipes.errors import UserError

MIN_DEVIATION = 0.01  # nats: the noise of a flat loss is not a spike
JUDGES_FROM = 0.5  # share of the window that must be filled before a loss is judged
GROWTH_FACTOR, BACKOFF_FACTOR = 2.0, 0.5  # of the loss scale, those of `torch.amp.GradScaler`
MIN_LOSS_SCALE = 1.0  # at which an overflow is no matter of the scale any more


class Guard:
    """Skips non-finite steps, finds loss spikes, and says when to stop or to roll back to a checkpoint.

    In a loop, `step` replaces `optimizer.step()`, and `check` comes before anything is saved:

        guard.step(optimizer, loss, grad_norm)
        optimizer.zero_grad()
        if guard.check(step, sync=save_now, checkpoint=saved) == "rollback":
            ...  # load that checkpoint, `guard.load_state_dict` too, and continue with later data

    Every decision follows from numbers that are equal on all ranks, so all decide alike without communication.

    In fp16 most gradients would be below 6e-8 and round to 0. So the loss is multiplied by `loss_scale`, and clipping
    divides the gradients by it (Micikevicius et al. 2017, arXiv:1710.03740, section 3.2):

        (loss * guard.loss_scale).backward()
        grad_norm = clip_grad_norm(model, 1.0, guard.loss_scale)

    The scale is as large as it can be, by the rule of `torch.amp.GradScaler`: a step whose gradients overflow is
    skipped and halves it, and `growth_interval` steps without an overflow double it. An overflow is the scale's doing:
    it counts as a step that is not finite only if the loss is not finite, too, or the scale is 1 already.

    Args:
        on_nonfinite: what happens after a step whose loss or gradient norm is not finite. Its update is always skipped.
            `skip`: `max_skips` of them in a row stop the run. `rollback`: `max_skips` of them in a row roll back.
            `stop`: the first one stops the run.
        max_skips: steps in a row.
        on_spike: `log` or `rollback`.
        spike_zscore: a loss more than this many standard deviations above the mean of the window is a spike; None: off.
        spike_window: the number of past losses that a loss is compared with, from half of them on. Spikes are left out,
            until half a window of them came in a row: then the loss has settled there, and they become the window.
        max_rollbacks: in the whole run; one more stops it.
        init_scale: the loss scale of the first step, in fp16.
        growth_interval: steps without an overflow after which the loss scale is doubled.
        dtype: of the forward and backward pass; the loss is scaled in `torch.float16` only.

    Attributes:
        loss_scale: 1.0, or in fp16 a tensor `[]` fp32 on the device, which changes with every `step`.
        log_fn: prints a line. Beside a progress bar, set it to a function that prints above the bar.

    Raises:
        UserError: a value is out of range.
    """

    def __init__(
        self,
        on_nonfinite: str = "skip",
        max_skips: int = 5,
        on_spike: str = "log",
        spike_zscore: float | None = 6.0,
        spike_window: int = 128,
        max_rollbacks: int = 3,
        init_scale: float = 2.0**16,
        growth_interval: int = 2000,
        dtype: torch.dtype = torch.float32,
    ):
        problems = []
        if on_nonfinite not in ("skip", "rollback", "stop"):
            problems.append(("on_nonfinite", f"{on_nonfinite!r} is not one of skip, rollback, stop"))
        if max_skips < 1:
            problems.append(("max_skips", f"{max_skips} is not 1 or more; on_nonfinite=stop stops at the first one"))
        if on_spike not in ("log", "rollback"):
            problems.append(("on_spike", f"{on_spike!r} is not one of log, rollback (spike_zscore=null turns it off)"))
        if spike_zscore is not None and not spike_zscore > 0:
            problems.append(("spike_zscore", f"{spike_zscore} is not above 0 (it is off with null)"))
        if spike_window < 2:
            problems.append(("spike_window", f"{spike_window} is not 2 or more"))
        if max_rollbacks < 0:
            problems.append(("max_rollbacks", f"{max_rollbacks} is not 0 or more"))
        if not MIN_LOSS_SCALE <= init_scale < math.inf:
            problems.append(("init_scale", f"{init_scale} is not {MIN_LOSS_SCALE:g} or more"))
        if growth_interval < 1:
            problems.append(("growth_interval", f"{growth_interval} is not 1 or more"))
        if problems:
            errors = [UserError(problem, key=key, code="out_of_range") for key, problem in problems]
            raise UserError("\n".join(map(str, errors)), code="out_of_range", problems=errors)
        self.on_nonfinite, self.max_skips = on_nonfinite, max_skips
        self.on_spike, self.spike_zscore, self.spike_window = on_spike, spike_zscore, spike_window
        self.max_rollbacks, self.growth_interval = max_rollbacks, growth_interval
        self.scales_loss = dtype == torch.float16
        # Moved to the loss' device by the first step; a scalar on the CPU multiplies a loss anywhere.
        self.loss_scale: float | Tensor = torch.tensor(float(init_scale)) if self.scales_loss else 1.0
        self._good_steps = torch.tensor(0.0)  # since the scale changed, on the same device
        self.log_fn: Callable[[str], object] = partial(print, flush=True)
        self.window: deque[float] = deque(maxlen=spike_window)  # finite losses that are not spikes
        self.spiking: list[float] = []  # the latest losses, while all of them are spikes
        self.skipping: list[int] = []  # the latest steps, while all of them are skipped
        self.skipped_steps = self.overflowed_steps = self.spikes = self.rollbacks = 0
        self._stepped: tuple[Tensor, torch.cuda.Event | None] | None = None  # not checked yet
        self._unread: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def step(self, optimizer: torch.optim.Optimizer, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Updates the weights unless the loss or the gradient norm is not finite.

        A skipped step changes neither weights nor the optimizer's state: no decay, no step count. With fused Adam or
        AdamW the device decides by itself; any other optimizer, and `mps`, cost a wait for it in every step.

        Args:
            optimizer: its gradients are ready: clipped, if they are.
            loss: `[]`, the step's mean over targets, of all ranks.
            grad_norm: `[]`, before clipping, of all ranks: a plain tensor, not a DTensor. In fp16 of the gradients
                divided by `loss_scale`.

        Returns:
            `[]` float32 on the device of the loss: 1 where the step was skipped, else 0.
        """
        values = torch.stack([loss.detach().float(), grad_norm.detach().float()])
        skip = (~values.isfinite().all()).float()
        if preset(skip.device).found_inf and _skips_on_device(optimizer):
            optimizer.found_inf = skip
            try:
                optimizer.step()
            finally:
                del optimizer.found_inf
        elif not skip.item():
            optimizer.step()
        if self.scales_loss:
            scale = self._on_device(self.loss_scale, skip.device)
            values = torch.cat((values, scale[None]))
            self._update_loss_scale(scale, skip)
        self._stepped = _to_host(values)
        return skip

    def _update_loss_scale(self, scale: Tensor, overflowed: Tensor) -> None:
        good_steps = (self._on_device(self._good_steps, scale.device) + 1) * (1 - overflowed)
        grows = good_steps >= self.growth_interval
        larger = torch.where(grows & (scale * GROWTH_FACTOR).isfinite(), scale * GROWTH_FACTOR, scale)
        smaller = (scale * BACKOFF_FACTOR).clamp(min=MIN_LOSS_SCALE)
        self.loss_scale = torch.where(overflowed > 0, smaller, larger)
        self._good_steps = torch.where(grows, 0, good_steps)

    @staticmethod
    def _on_device(number: Tensor, device: torch.device) -> Tensor:
        return number.to(device, non_blocking=preset(device).copies_async)

    def check(self, step: int, *, sync: bool = False, checkpoint: str | Path | None = None) -> str:
        """Judges the last step. Call it once after every `step`, and before saving.

        On a GPU it judges the step before, so that the host does not wait for this one.

        Args:
            step: the step's number, for the messages.
            sync: judge this step, too, at the cost of waiting for it: a step must be judged before it is saved.
            checkpoint: the last one, which a rollback restores; None if there is none.

        Returns:
            `continue`, or `rollback`: the caller loads `checkpoint` and skips the data up to this step.

        Raises:
            UserError: the run has to stop (code `diverged`): what happened, when, and what to do.
        """
        if self._stepped is not None:
            self._unread.append((step, *self._stepped))
            self._stepped = None
        while self._unread and (sync or self._unread[0][0] < step or self._unread[0][2] is None):
            judged, values, copied = self._unread.popleft()
            if copied is not None:
                copied.synchronize()
            loss, grad_norm, *scale = values.tolist()
            if math.isfinite(loss) and math.isfinite(grad_norm):
                self.skipping.clear()
                reason = self._judge_finite(judged, loss)
            elif math.isfinite(loss) and scale and scale[0] > MIN_LOSS_SCALE:
                self.overflowed_steps += 1
                self.log_fn(f"step {judged}: a gradient overflowed fp16 at loss scale {scale[0]:g}: step skipped")
                reason = None
            else:
                reason = self._judge_nonfinite(judged, loss, grad_norm, checkpoint)
            if reason:
                self._roll_back(step, judged, reason, checkpoint)
                self._unread.clear()
                return "rollback"
        return "continue"

    def state_dict(self) -> dict[str, int | float | list]:
        """JSON values for a checkpoint. Call `check(step, sync=True)` first."""
        if self._unread or self._stepped is not None:
            raise RuntimeError("a step was not judged yet: call check(step, sync=True) before state_dict()")
        state: dict[str, int | float | list] = {
            "window": list(self.window),
            "spiking": list(self.spiking),
            "skipping": list(self.skipping),
            "skipped_steps": self.skipped_steps,
            "spikes": self.spikes,
            "rollbacks": self.rollbacks,
        }
        return state | (self._loss_scale_state() if self.scales_loss else {})

    def load_state_dict(self, state: dict[str, int | float | list]) -> None:
        """Restores a `state_dict()` after a restart or a rollback; what was counted since stays counted."""
        rolled_back = self.rollbacks > state["rollbacks"]  # later data comes next: the row of skipped steps ends here
        self.skipping = [] if rolled_back else list(state["skipping"])
        self.spiking = list(state["spiking"])
        self.window = deque(state["window"], maxlen=self.spike_window)
        self.skipped_steps = max(self.skipped_steps, state["skipped_steps"])
        self.spikes = max(self.spikes, state["spikes"])
        self.rollbacks = max(self.rollbacks, state["rollbacks"])
        if self.scales_loss and "loss_scale" in state:  # not in one of a run in bf16 or fp32
            self.overflowed_steps = max(self.overflowed_steps, state["overflowed_steps"])
            self.loss_scale = torch.tensor(state["loss_scale"])
            self._good_steps = torch.tensor(state["good_steps"])

    def metrics(self) -> dict[str, float]:
        """`skipped_steps`, `spikes` and `rollbacks` of the run so far.

        In fp16 also `overflowed_steps` and the `loss_scale` of the next step, which waits for the device.
        """
        counts = {"skipped_steps": self.skipped_steps, "spikes": self.spikes, "rollbacks": self.rollbacks}
        if self.scales_loss:
            counts |= {"overflowed_steps": self.overflowed_steps, "loss_scale": float(self.loss_scale)}
        return counts

    def _loss_scale_state(self) -> dict[str, float]:
        return {
            "overflowed_steps": self.overflowed_steps,
            "loss_scale": float(self.loss_scale),
            "good_steps": float(self._good_steps),
        }

    def _judge_nonfinite(self, step: int, loss: float, grad_norm: float, checkpoint: str | Path | None) -> str | None:
        """Counts a skipped step. Returns why to roll back, or None."""
        named = [("loss", loss), ("gradient norm", grad_norm)]
        what = " and ".join(f"{name} is {value}" for name, value in named if not math.isfinite(value))
        self.skipping.append(step)
        self.skipped_steps += 1
        count = len(self.skipping)
        self.log_fn(f"step {step}: {what}: step skipped ({count} in a row)")
        if self.on_nonfinite == "stop":
            raise self._lost(f"step {step}: {what} (guard.on_nonfinite=stop).", self.skipping, checkpoint)
        if count < self.max_skips:
            return None
        if self.on_nonfinite == "skip":
            text = f"step {step}: {what}. This and the steps before it, {count} in a row, were skipped."
            raise self._lost(text, self.skipping, checkpoint)
        return f"{count} steps in a row were not finite"

    def _judge_finite(self, step: int, loss: float) -> str | None:
        """Counts a spike, or adds the loss to the window. Returns why to roll back, or None."""
        if self.spike_zscore is None:
            return None
        enough = math.ceil(JUDGES_FROM * self.spike_window)
        if len(self.window) >= enough:
            mean = math.fsum(self.window) / len(self.window)
            variance = math.fsum((past - mean) ** 2 for past in self.window) / len(self.window)
            zscore = (loss - mean) / max(math.sqrt(variance), MIN_DEVIATION)
            if zscore > self.spike_zscore:
                self.spikes += 1
                self.spiking.append(loss)
                self.log_fn(
                    f"step {step}: loss {loss:.4g} is a spike: {zscore:.1f} standard deviations above {mean:.4g}, the "
                    f"mean of the last {len(self.window)} losses"
                )
                if self.on_spike == "rollback":
                    return f"the loss of step {step} is a spike"
                if len(self.spiking) >= enough:
                    self.log_fn(
                        f"step {step}: {len(self.spiking)} spikes in a row: later losses are compared with these"
                    )
                    self.window = deque(self.spiking, maxlen=self.spike_window)
                    self.spiking = []
                return None
        self.spiking.clear()
        self.window.append(loss)
        return None

    def _roll_back(self, step: int, judged: int, reason: str, checkpoint: str | Path | None) -> None:
        steps = [*self.skipping, judged]
        if checkpoint is None:
            raise self._lost(f"step {step}: {reason}, and there is no checkpoint to roll back to.", steps, None)
        if self.rollbacks >= self.max_rollbacks:
            text = f"step {step}: {reason}, and the run was rolled back {self.rollbacks} times before"
            raise self._lost(f"{text} (guard.max_rollbacks={self.max_rollbacks}).", steps, checkpoint)
        self.rollbacks += 1
        self.skipping.clear()
        self.spiking.clear()
        self.log_fn(
            f"step {step}: {reason}: rolling back to {checkpoint}, continuing with later data "
            f"(rollback {self.rollbacks} of {self.max_rollbacks})"
        )

    def _lost(self, what: str, steps: list[int], checkpoint: str | Path | None) -> UserError:
        """The error that ends a run: what happened, where the last good weights are, what to try."""
        data = f"step {steps[-1]}" if steps[0] == steps[-1] else f"steps {steps[0]} to {steps[-1]}"
        last = f"The last good checkpoint is {checkpoint}." if checkpoint else "No checkpoint was saved yet."
        other = f", with output_dir=OTHER checkpoint.resume={checkpoint}" if checkpoint else ""
        return UserError(
            f"{what} {last}",
            hint="Lower optimizer.lr, lengthen the warm-up, lower max_grad_norm, or try compute.precision=fp32"
            f"{other}. Check the data of {data}.",
            code="diverged",
        )


def _skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `found_inf`, a tensor on the device, can tell its `step` to change nothing.

    Fused SGD takes it, too, but a skipped first step leaves a momentum buffer that was never written. An optimizer of
    this library says so in an attribute.
    """
    if hasattr(optimizer, "takes_found_inf"):
        return optimizer.takes_found_inf
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return isinstance(optimizer, torch.optim.Adam) and fused  # AdamW is an Adam


def _to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy on the CPU, and the event after which it can be read; None: it can be read at once."""
    if not values.is_cuda:
        return values.cpu(), None
    copy = values.to("cpu", non_blocking=True)  # into pinned memory
    copied = torch.cuda.Event()
    copied.record()
    return copy, copied
