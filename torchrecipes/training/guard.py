"""Watches a run for numbers that mean it is lost."""

import math

from torchrecipes.errors import UserError


def check_finite(line: dict, checkpoints: str) -> None:
    """Stops the run when the loss or the gradient norm of a log line is not a number or infinite.

    It reads the log line, which is on the host already, so it costs no transfer. Call it before saving: a step that is
    not finite must never become a checkpoint.

    Args:
        line: what `Metrics.write` returned; `loss` and `grad_norm` are looked at.
        checkpoints: the folder that holds the last good checkpoint, for the message.

    Raises:
        UserError: the value, the step, and what to do.
    """
    for name in ("loss", "grad_norm"):
        value = line.get(name)
        if value is not None and not math.isfinite(value):
            raise UserError(
                f"step {line['step']}: {name} is {value}. Nothing of this step was saved; the last good checkpoint is "
                f"in {checkpoints}. Lower optimizer.lr or max_grad_norm, lengthen the warm-up, or try precision=fp32."
            )
