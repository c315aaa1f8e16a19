"""classify_finetune for each choice of `trainable`: validation and test metric, and seconds of the run.

    python benchmarks/trainable_choices.py --config classify_finetune/sst2 --init-from FOLDER \
        --output-dir runs/choices data.source.path=train.tsv data.validation.path=dev.tsv data.test.path=test.tsv

Every run is a process of its own and reads the same tokenized examples. What follows the options are overrides of all
runs. A run that has finished is not repeated.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

# A new head on a frozen encoder takes a higher rate and more passes, which cost little.
CHOICES = {
    "classifier": ["optimizer.lr=3e-3", "epochs=20"],
    "last_2": ["optimizer.lr=2e-4"],
    "last_3": ["optimizer.lr=1e-4"],
    "all": ["optimizer.lr=5e-5"],
    "lora": ["optimizer.lr=5e-4", "lora.rank=8"],
}


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="classify_finetune/sst2")
    parser.add_argument("--init-from", required=True)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--metric", default="accuracy")
    parser.add_argument("--choices", nargs="+", default=list(CHOICES), choices=list(CHOICES))
    args, overrides = parser.parse_known_args()
    print(f"| trainable | validation {args.metric} | test {args.metric} | seconds | tokens/s in training |")
    print("|---|---|---|---|---|")
    for choice in args.choices:
        folder = args.output_dir / choice
        settings = [f"output_dir={folder}", f"init_from={args.init_from}", f"trainable={choice}", *CHOICES[choice]]
        settings += [f"data.corpus_dir={args.output_dir / 'examples'}", *overrides]
        command = [sys.executable, "-m", "torchrecipes.cli.main", "run", "classify_finetune", "--config", args.config]
        seconds = folder / "seconds.txt"
        if not seconds.exists():
            start = time.perf_counter()
            subprocess.run([*command, *settings], check=True, stdout=subprocess.DEVNULL)
            seconds.write_text(f"{time.perf_counter() - start:.0f}")
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        best = max((line.get(f"eval/validation/{args.metric}") or 0) for line in lines)
        test = [line[key] for line in lines if (key := f"eval/test/{args.metric}") in line]
        speeds = sorted(line["tokens_per_second"] for line in lines if "tokens_per_second" in line)
        tested = f"{test[-1]:.3f}" if test else ""
        print(
            f"| {choice} | {best:.3f} | {tested} | {seconds.read_text()} | {speeds[len(speeds) // 2]:,.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
