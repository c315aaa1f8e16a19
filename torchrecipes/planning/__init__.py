"""Before a run: memory, time and disk, and a dry run.

run_estimate       the estimate of a whole run from its config
memory_estimate    the memory of a training step, from a step on tensors without data
flops              FLOPs per token, and the peak of a device
auto_batch_size    `micro_batch_size: auto`
preflight_checks   `tune-style preflight`
dry_run            a few steps of the run in a folder of their own
check_components   builds what a config names, and throws it away
"""
