"""`tune-style estimate`: what a run will take of memory, time and disk, before it is started."""

import argparse
import json
from typing import Any

from torchrecipes.cli import run

MEANINGS = {  # of the parts of a rank's memory
    "weights": "fp32",
    "optimizer": "its state",
    "gradients": "of what the backward pass has behind it at the peak, and temporary tensors",
    "activations": "kept for the backward pass",
    "loss": "logits of a chunk, gradients that are ready before the backward pass",
    "gathered": "weights that several processes compute with, beside those that they keep",
    "heap": "freed pieces that the C library cannot use again",
    "copy to save": "of weights and optimizer (async_save)",
    "process": "torch and its libraries",
}
REMEDIES = (
    "try activation_checkpointing=full, a smaller seq_len, parallel.strategy=fsdp with a larger --world-size, or a "
    "larger --device"
)
GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments: a recipe, its config, and the machines to think of."""
    parser.epilog = (
        "example: tune-style estimate mlm_pretrain --config neobert/quickstart\n"
        "         tune-style estimate mlm_pretrain --config neobert/base data.source.path=texts --device h200 "
        "--world-size 8"
    )
    run.add_config_arguments(parser)
    parser.add_argument("--device", metavar="NAME", help="h200, a100-80, 4090, ... or cpu (default: this machine's)")
    parser.add_argument("--world-size", type=int, default=1, metavar="N", help="processes in all (default 1)")
    parser.add_argument("--nproc-per-node", type=int, default=8, metavar="N", help="of them on a machine (default 8)")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of a device's peak that is reached (default 0.4)")
    parser.add_argument("--json", action="store_true", help="print JSON: bytes, hours and numbers")


def main(args: argparse.Namespace) -> None:
    """Print the estimate."""
    _, config = run.load_recipe_and_config(args)

    from torchrecipes.planning.run_estimate import estimate_run

    found = estimate_run(
        config, device=args.device, world_size=args.world_size, per_node=args.nproc_per_node, mfu=args.mfu
    )
    print(json.dumps(found, indent=2) if args.json else table(found))


def table(found: dict[str, Any]) -> str:
    """What `estimate_run` found, to be read in ten seconds."""
    counts = found["parameters"]
    active = "all are" if counts["active"] == counts["total"] else f"{counts['active']:,} are"
    lines = [
        f"{'parameters':<14} {counts['total']:>14,}  {active} active for a token",
        *(f"  {name:<12} {count:>14,}" for name, count in counts.items() if name not in ("total", "active")),
        "",
        f"memory of a process at its peak: {found['world_size']} x {found['device']}, {found['strategy']}, "
        f"{found['precision']}, {found['micro_batches']} x {found['micro_batch_size']} rows per step",
    ]
    parts = found["memory"]
    lines += [f"  {name:<12} {_size(parts[name]):>14}  {said}" for name, said in MEANINGS.items() if name in parts]
    share = parts["total"] / found["device_bytes"]
    lines += [f"  {'in all':<12} {_size(parts['total']):>14}  {share:.0%} of {_size(found['device_bytes'])}"]
    largest = found["max_micro_batch_size"]
    fits = f"{largest:,} rows" if largest else "not one row"
    said = "micro_batch_size that fits, at most" if largest else REMEDIES
    lines += [f"  {'fits':<12} {fits:>14}  {said}"]
    steps = "by the corpus" if found["steps"] is None else f"{found['steps']:,}"
    unknown = ": epochs of text that is not prepared yet" if found["steps"] is None else ""
    work = f"of {found['tokens_per_step']:,} tokens, {found['flops_per_token'] / 1e9:,.3g} GFLOP per token"
    lines += ["", f"{'steps':<14} {steps:>14}  {work}{unknown}"]
    if found["hours"] is not None:
        lines += [f"{'time':<14} {_time(found['hours']):>14}  at {found['mfu']:.0%} of the device's peak (--mfu)"]
    kept = f"per checkpoint, {_size(found['kept_bytes'])} for those that are kept and one that is written"
    lines += [f"{'disk':<14} {_size(found['checkpoint_bytes']):>14}  {kept}"]
    if found["notes"]:
        lines += ["", *found["notes"]]
    return "\n".join(lines)


def _size(number: int) -> str:
    return f"{number / GIB:,.2f} GiB" if number >= GIB / 10 else f"{number / 2**20:,.1f} MiB"


def _time(hours: float) -> str:
    for least, unit, length in ((48, "days", 24), (1, "hours", 1), (1 / 60, "minutes", 1 / 60)):
        if hours >= least:
            return f"{hours / length:,.1f} {unit}"
    return f"{3600 * hours:.1f} seconds"
