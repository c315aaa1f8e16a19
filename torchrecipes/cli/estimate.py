"""`tune-style estimate`: memory, time and disk of a run, before it is started."""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from torchrecipes.cli import run
from torchrecipes.config.stages import read_stages

MEANINGS = {  # of the parts of a rank's memory
    "weights": "fp32",
    "optimizer": "its state",
    "ema": "averaged weights",
    "gradients": "at the peak, and temporary tensors of the backward pass",
    "activations": "kept for the backward pass",
    "loss": "logits of a chunk, gradients that the loss computes in the forward pass",
    "unsharded_parameters": "that several processes compute with, beside their shards",
    "allocator_overhead": "freed memory that the C library cannot use again",
    "async_save_buffer": "copies of weights and optimizer state",
    "process": "torch and its libraries",
}
REMEDIES = (
    "try compute.activation_checkpointing=full, a smaller seq_len, compute.strategy=fsdp with a larger --world-size, "
    "or a larger --device"
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
    parser.add_argument(
        "--device", metavar="NAME", help="h200, 4090, t4, m2, laptop, ... or cpu (default: this machine's)"
    )
    parser.add_argument("--world-size", type=int, default=1, metavar="N", help="processes of the run (default 1)")
    parser.add_argument("--nproc-per-node", type=int, default=8, metavar="N", help="processes on a machine (default 8)")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of a device's peak that is reached (default 0.4)")
    parser.add_argument("--json", action="store_true", help="print JSON: bytes, hours and numbers")


def main(args: argparse.Namespace) -> None:
    """Print the estimate, of a config with stages one for each."""
    if args.stage is None and read_stages(args.config, args.overrides):
        _print_stages(args)
        return
    estimate = _estimate(args, *run.load_recipe_and_config(args))
    print(json.dumps(estimate, indent=2) if args.json else table(estimate))


def _print_stages(args: argparse.Namespace) -> None:
    from torchrecipes.cli.stages import load_stages

    estimates: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        loaded: dict[str, tuple[ModuleType, Any]] = {}
        for name, (stage, recipe, config) in load_stages(args).items():
            if stage.start and not Path(config.init_from).exists():
                config = _with_model_of(*loaded[stage.start], config, Path(folder, name))
            loaded[name] = (recipe, config)
            estimates[name] = _estimate(args, recipe, config)
            if not args.json:
                print(f"\nstage {name}\n{table(estimates[name])}")
    if args.json:
        print(json.dumps(estimates, indent=2))


def _with_model_of(recipe: ModuleType, start: Any, config: Any, folder: Path) -> Any:
    """`config` with a start that has not run yet: what it would save but for the weights is written into `folder`."""
    from torchrecipes.models.hub import write_hf_config
    from torchrecipes.planning.fake_model import meta_model, tokenizer_for

    folder.mkdir()
    write_hf_config(meta_model(start, tokenizer_for(start), recipe.build_model), folder)
    return replace(config, init_from=str(folder), tokenizer=start.tokenizer)


def _estimate(args: argparse.Namespace, recipe: ModuleType, config: Any) -> dict[str, Any]:
    from torchrecipes.planning.run_estimate import estimate_run

    machines = {"device": args.device, "world_size": args.world_size, "per_node": args.nproc_per_node}
    return estimate_run(recipe, config, **machines, mfu=args.mfu)


def table(estimate: dict[str, Any]) -> str:
    """The result of `estimate_run` as text."""
    counts, parts = estimate["parameters"], estimate["memory"]
    active = "all are" if counts["active"] == counts["total"] else f"{counts['active']:,} are"
    lines = [
        f"{'parameters':<14} {counts['total']:>14,}  {active} active for a token",
        *(f"  {name:<12} {count:>14,}" for name, count in counts.items() if name not in ("total", "active")),
        "",
        f"memory of a process at its peak: {estimate['world_size']} x {estimate['device']}, {estimate['strategy']}, "
        f"{estimate['precision']}, {estimate['micro_batches']} x {estimate['micro_batch_size']} rows per step",
    ]
    names = {name: name.replace("async_", "async-").replace("_", " ") for name in MEANINGS if name in parts}
    width = max(12, *map(len, names.values()))
    lines += [f"  {names[name]:<{width}} {_size(parts[name]):>14}  {MEANINGS[name]}" for name in names]
    share = f"{parts['total'] / estimate['device_bytes']:.0%} of {_size(estimate['device_bytes'])}"
    lines += [f"  {'total':<{width}} {_size(parts['total']):>14}  {share}"]
    largest = estimate["max_micro_batch_size"]
    fits = f"{largest:,} rows" if largest else "not one row"
    lines += [f"  {'fits':<{width}} {fits:>14}  {'largest micro_batch_size that fits' if largest else REMEDIES}"]
    work = f"of {estimate['tokens_per_step']:,} tokens, {estimate['flops_per_token'] / 1e9:,.3g} GFLOP per token"
    if estimate["steps"] is None:
        lines += ["", f"{'steps':<14} {'unknown':>14}  {work}"]
    else:
        lines += ["", f"{'steps':<14} {estimate['steps']:>14,}  {work}"]
    if estimate["hours"] is not None:
        lines += [f"{'time':<14} {_time(estimate['hours']):>14}  at {estimate['mfu']:.0%} of the device's peak (--mfu)"]
    kept = f"per checkpoint, {_size(estimate['kept_bytes'])} for those that are kept and one being written"
    lines += [f"{'disk':<14} {_size(estimate['checkpoint_bytes']):>14}  {kept}"]
    if estimate["notes"]:
        lines += ["", *estimate["notes"]]
    return "\n".join(lines)


def _size(number: int) -> str:
    return f"{number / GIB:,.2f} GiB" if number >= GIB / 10 else f"{number / 2**20:,.1f} MiB"


def _time(hours: float) -> str:
    for least, unit, length in ((48, "days", 24), (1, "hours", 1), (1 / 60, "minutes", 1 / 60)):
        if hours >= least:
            return f"{hours / length:,.1f} {unit}"
    return f"{3600 * hours:.1f} seconds"
