"""Measures this library on one GPU, beside its ceilings and its peers, and prints the tables of docs/benchmarks.md.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --only attention,loss --minutes 4 --json out.json
    python benchmarks/gpu.py --tiny

| part        | measures                                                                                          |
|-------------|---------------------------------------------------------------------------------------------------|
| `loss`      | `linear_cross_entropy` and `masked_lm_loss` beside compiled full logits                           |
| `attention` | every backend that the library can choose, forward and backward; which one it chooses             |
| `train`     | five models of the shipped recipes: speed, MFU, memory, time by kind of kernel; compiled and eager |
| `float8`    | the same with float8 products                                                                     |
| `peers`     | models of `transformers` (and `torchtitan`) on the same batches                                   |
| `muon`      | the optimizer's step beside `torch.optim.Muon`                                                    |

Every part has its share of the minutes, starts no case after that, and says what it left out. A case that fails prints
its error, and the next one runs. Figures are printed as they come and kept in the JSON file. Data are made up: tokens
at random, documents as long as those of web text. Needs torch 2.11 or newer; `transformers`, `torchao` and `torchtitan`
are used where they are installed. `--tiny` runs all of it with tiny shapes in a minute, on a CPU too, where nothing is
compiled and the figures mean nothing.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHARES = {"ceilings": 0.02, "loss": 0.05, "attention": 0.24, "train": 0.4, "peers": 0.14, "float8": 0.1, "muon": 0.05}
WORKER = "TORCHRECIPES_BENCHMARK_WORKER"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="parts, separated by commas; all without it")
    parser.add_argument("--minutes", type=float, default=8, help="for everything, about")
    parser.add_argument("--json", type=Path, default=Path("gpu_benchmark.json"), help="where the figures are kept")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to see that everything runs")
    args = parser.parse_args()
    chosen = [part for part in args.only.split(",") if part] or list(SHARES)
    if unknown := set(chosen) - set(SHARES):
        parser.error(f"no such part: {', '.join(sorted(unknown))}. The parts are {', '.join(SHARES)}")
    path = args.json.resolve()
    if WORKER in os.environ:
        measure([part for part in SHARES if part in chosen or part == "ceilings"], args.tiny, path)
        return

    from gpu_supervise import supervise, write_json

    # The measuring process is another one: whatever a kernel does to it, the next case can be measured.
    command = "python " + " ".join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    empty = {"running": None, "restarts": 0, "seconds": {}, "notes": [], "left_out": [], "rows": []}
    about = {"date": date.today().isoformat(), "command": command, "commit": commit(), "started": time.time()}
    write_json(path, {**about, "minutes": args.minutes, **empty})
    quiet = {"PYTHONUNBUFFERED": "1", "KINETO_LOG_LEVEL": "9", "TOKENIZERS_PARALLELISM": "false"}
    environment = {**os.environ, **quiet, WORKER: "1"}
    limit = max(240.0, 20 * args.minutes)
    raise SystemExit(supervise(path, [sys.executable, *sys.argv], environment, limit))


def measure(parts: list[str], tiny: bool, path: Path) -> None:
    """Runs the parts, after what the file at `path` says was run already, and prints the report."""
    sys.path.insert(0, str(ROOT))  # this checkout, wherever another copy is installed
    import gpu_attention
    import gpu_ceilings
    import gpu_loss
    import gpu_muon
    import gpu_peers
    import gpu_training
    import torch
    from gpu_bench import Bench
    from gpu_report import report
    from gpu_supervise import read_json

    functions = {
        "ceilings": gpu_ceilings.run,
        "loss": gpu_loss.run,
        "attention": gpu_attention.run,
        "train": gpu_training.run,
        "peers": gpu_peers.run,
        "float8": gpu_training.run_float8,
        "muon": gpu_muon.run,
    }
    warnings.simplefilter("ignore")  # of compilers and other libraries: hundreds of lines between the figures
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not tiny:
        raise SystemExit("there is no CUDA GPU here; --tiny runs on a CPU")
    if device.type == "cpu":
        torch.compiler.set_stance("force_eager")  # compiling for a CPU takes minutes and would show nothing
    content = read_json(path) | versions(device)
    print(
        ", ".join(f"{key} {content[key]}" for key in ("date", *versions(device), "commit") if content[key]), flush=True
    )
    total = sum(SHARES[part] for part in parts)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        bench, before = Bench(device, tiny, path, Path(folder), content), 0.0
        for part in parts:
            bench.begin(part, before, SHARES[part] / total)
            functions[part](bench)
            before += SHARES[part] / total
        print(f"\n{report(bench.content)}\n\n{bench.elapsed() / 60:.1f} minutes; all figures: {bench.path}", flush=True)


def versions(device: Any) -> dict[str, str]:
    """What the figures are measured on and with."""
    import torch

    cuda = device.type == "cuda"
    gpu = torch.cuda.get_device_properties(device) if cuda else None
    return {
        "device": f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" if gpu else f"CPU ({platform.machine()})",
        "capability": f"{gpu.major}.{gpu.minor}" if gpu else "",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "cudnn": str(torch.backends.cudnn.version() or "") if cuda else "",
        "python": platform.python_version(),
    }


def commit() -> str:
    """The checkout's commit, with `-dirty` where files differ from it; empty without git."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(git, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


if __name__ == "__main__":
    main()
