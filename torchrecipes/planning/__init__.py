"""Before a run: memory, time and disk, and a dry run.

run_estimate       the estimate of a whole run from its config
memory_estimate    the memory of a training step, from a step on tensors without data
flops              FLOPs per token, and the peak of a device
auto_batch_size    `micro_batch_size: auto`
preflight_checks   `tune-style preflight`
dry_run            a few steps of the run in a folder of their own
check_components   builds what a config names, and throws it away
"""

from typing import Any

from torchrecipes.planning.flops import peak_flops

__all__ = ["auto_micro_batch_size", "flops_per_token", "peak_flops"]


def flops_per_token(*_objective: Any) -> float | None:
    """Counts nothing yet."""
    return None


def auto_micro_batch_size(config: Any, *_objective: Any) -> int:
    """One row, which always fits."""
    return 1 if config.micro_batch_size == "auto" else config.micro_batch_size
