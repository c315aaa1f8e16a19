"""Before a run: its memory, time and disk; the size of its micro-batches; checks and a dry run.

run_estimate       estimate of a whole run from its config
memory_estimate    peak memory of a training step, on tensors without data
flops              FLOPs per token, and the peak of a device
auto_batch_size    `micro_batch_size: auto`
duration           optimizer steps from a budget in steps, tokens, epochs or minutes
preflight_checks   `tune-style preflight`
dry_run            a few steps of the run in a folder of their own
component_checks   builds what a config names on the meta device, and discards it
fake_model         models and tokenizers without data

All of it calls the recipe's `build_model`, `build_collator` and `compute_loss`, and knows no key of any objective.
"""

from torchrecipes.planning.auto_batch_size import auto_micro_batch_size, find_micro_batch_size
from torchrecipes.planning.component_checks import check_components
from torchrecipes.planning.duration import resolve_max_steps
from torchrecipes.planning.flops import flops_per_token, peak_flops
from torchrecipes.planning.preflight_checks import preflight
from torchrecipes.planning.run_estimate import estimate_run

__all__ = [
    "auto_micro_batch_size",
    "check_components",
    "estimate_run",
    "find_micro_batch_size",
    "flops_per_token",
    "peak_flops",
    "preflight",
    "resolve_max_steps",
]
