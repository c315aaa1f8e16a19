"""Training speed beside one busy process, for several waiting policies of OpenMP's threads, in turns.

    python benchmarks/busy_neighbour.py default GOMP_SPINCOUNT=10000 OMP_WAIT_POLICY=passive

Each setting (comma-separated variables) trains a 6 x 256 encoder in a process of its own, as OpenMP reads them when it
is loaded. The processes take turns, alone and beside a Python loop that keeps one core busy.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

ROWS, SEQ_LEN, VOCAB = 16, 256, 8192


def train() -> None:
    """Trains for as many seconds as each line of stdin says, and prints the tokens per second."""
    import torch

    from torchrecipes.losses import masked_lm_loss
    from torchrecipes.models import neobert
    from torchrecipes.optim import adamw

    precision = torch.bfloat16 if sys.argv[2] == "bf16" else torch.float32
    model = neobert(
        vocab_size=VOCAB, hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=688
    )
    optimizer = adamw(model, lr=1e-3)
    tokens = torch.randint(0, VOCAB, (ROWS, SEQ_LEN))
    positions = torch.randperm(tokens.numel())[: tokens.numel() // 5]
    for line in sys.stdin:
        seconds, steps, start = float(line), 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            with torch.autocast("cpu", precision, enabled=precision != torch.float32):
                loss = masked_lm_loss(model(tokens), model.head, positions, tokens.flatten()[positions])
            (loss / len(positions)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
        print(steps * tokens.numel() / (time.perf_counter() - start), flush=True)


class Trainer:
    """A process that trains under a setting when asked to."""

    def __init__(self, setting: str, args: argparse.Namespace) -> None:
        variables = {} if setting == "default" else dict(pair.split("=") for pair in setting.split(","))
        environment = {"OMP_NUM_THREADS": str(args.threads), **os.environ, **variables}
        command = [sys.executable, __file__, "train", args.precision]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, **pipes)

    def run(self, seconds: float) -> float:
        """Trains for some seconds. Returns tokens per second."""
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    settings = ["default", "GOMP_SPINCOUNT=10000", "OMP_WAIT_POLICY=passive"]
    parser.add_argument(
        "settings", nargs="*", default=settings, metavar="SETTING", help="default, or VARIABLE=VALUE,..."
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5, help="of each setting in a round, idle and busy")
    args = parser.parse_args()

    trainers = {setting: Trainer(setting, args) for setting in args.settings}
    for trainer in trainers.values():
        trainer.run(1)
    rates = {(setting, busy): [] for setting in trainers for busy in (False, True)}
    for _ in range(args.rounds):
        for busy in (False, True):
            neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
            for setting, trainer in trainers.items():
                rates[setting, busy].append(trainer.run(args.seconds))
            if neighbour:
                neighbour.kill()
                neighbour.wait()
    for trainer in trainers.values():
        trainer.close()

    base = statistics.median(rates[args.settings[0], False])
    print(f"{'tokens/s':40s} {'alone':>8s} {'busy':>8s}   of {args.settings[0]}, alone")
    for setting in trainers:
        idle, busy = (statistics.median(rates[setting, busy]) for busy in (False, True))
        spread = [round(rate) for rate in (*rates[setting, False], *rates[setting, True])]
        print(f"{setting:40s} {idle:8,.0f} {busy:8,.0f}   {idle / base:5.0%} {busy / base:5.0%}   {spread}")


if __name__ == "__main__":
    train() if sys.argv[1:2] == ["train"] else main()
