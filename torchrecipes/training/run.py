"""The start of a run: its processes, its folder, its device, its seed."""

import atexit
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
import yaml

from torchrecipes.distributed import collectives
from torchrecipes.errors import UserError
from torchrecipes.training.activation_checkpointing import tune_malloc

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# Keys that change how a run is watched, kept or spread, its numbers in their rounding only, and when the guard acts: a
# run may be continued with other values.
MAY_CHANGE = (
    "output_dir",
    "resume",
    "log_every",
    "eval_every",
    "eval_sequences",
    "save_every",
    "sample_every",
    "sample_prompts",
    "sample_tokens",
    "keep_last",
    "async_save",
    "on_save_error",
    "metrics",
    "guard",
    "parallel",
    "activation_checkpointing",
    "micro_batch_size",
    "data.num_workers",
    "data.tokenizer_threads",
)


@dataclass(frozen=True)
class Run:
    """What a run stands on.

    Attributes:
        output_dir: the run's folder; it exists and can be written.
        device: where this process' model lives: its GPU if there is one, else the CPU.
        rank, world_size: this process among all.
        local_world_size: processes on this machine.
        lock: keeps other processes from training into the folder as long as this object lives.
    """

    output_dir: Path
    device: torch.device
    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    lock: object = None

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0


def start_run(output_dir: str | Path, *, seed: int, config_yaml: str, resume: str) -> Run:
    """Joins the processes of the run, makes its folder, seeds every generator and picks the device.

    Under torchrun, or whatever sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, a process group is made,
    if there is none: NCCL between GPUs, gloo between CPUs. What ranks but the first print goes nowhere.

    Args:
        output_dir: the run's folder, made if needed; the same for all processes.
        seed: seeds `random`, NumPy and torch. What the library draws itself (weights, order, masks) is a pure function
            of the seed and does not read these generators; dropout does, from seed + rank.
        config_yaml: the resolved config. It is written to `<output_dir>/config.yaml`; when that file is there already,
            the two are compared.
        resume: `auto`, `never` or the path of a checkpoint.

    Raises:
        UserError: the folder cannot be written, or it holds a run with other settings, or, for `never`, any run; or the
            environment names more processes than there are devices.
    """
    rank, local_rank, world_size, local_world_size = collectives.dist_env()
    device = _device(local_rank)
    if world_size > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, device_id=device if device.type == "cuda" else None)
        atexit.register(_leave)
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, it lives as long as the process

    folder = Path(output_dir)
    locks: list = []
    collectives.run_on_rank0_and_broadcast(lambda: _prepare(folder, config_yaml, resume, locks))

    random.seed(seed + rank)
    numpy.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)
    if device.type == "cpu":
        tune_malloc()
    return Run(folder, device, rank, world_size, local_world_size, locks)


def _leave() -> None:
    # Threads of gloo that still run when the interpreter ends can abort the process.
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}. Start one "
            "process per GPU: --nproc-per-node gpu."
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _prepare(folder: Path, config_yaml: str, resume: str, locks: list) -> None:
    config_file = folder / "config.yaml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        locks += _lock(folder)
        has_checkpoints = any((folder / "checkpoints").glob("step-*"))
        if resume not in ("auto", "never"):
            _check_is_checkpoint(Path(resume))
        if has_checkpoints and resume == "never":
            raise UserError(
                f"{folder} holds the checkpoints of a run, and resume=never would write over them. Give another "
                f"output_dir=..., or delete the folder, or continue the run with resume=auto."
            )
        if has_checkpoints and config_file.exists():
            _check_same_settings(config_file, config_yaml)
        temporary = config_file.with_suffix(".tmp")
        temporary.write_text(config_yaml, encoding="utf-8")
        os.replace(temporary, config_file)
    except OSError as error:
        raise UserError(f"output_dir: cannot write {folder}: {error.strerror}. Give another output_dir=...") from error


def _check_is_checkpoint(path: Path) -> None:
    """Tells of a wrong path before a corpus is made; whether the checkpoint is whole is looked at when it is loaded."""
    if (path / "manifest.json").is_file():
        return
    of_run = sorted(path.glob("checkpoints/step-*"))
    hint = f"This is a run; its newest is resume={of_run[-1]}" if of_run else "Give a folder .../checkpoints/step-..."
    raise UserError(f"resume: {path} is no checkpoint, which has a manifest.json. {hint}")


def _lock(folder: Path) -> list:
    """Keeps other processes from training into the same folder while the file that it returns is open.

    The kernel closes it however the process ends.
    """
    if fcntl is None:
        return []
    file = (folder / ".lock").open("a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(
            f"output_dir: another process trains into {folder}. Wait for it or stop it, or give another output_dir=..."
        ) from None
    except OSError:  # a file system without locks
        return []
    return [file]


def _check_same_settings(config_file: Path, config_yaml: str) -> None:
    old, new = _flat(yaml.safe_load(config_file.read_text(encoding="utf-8"))), _flat(yaml.safe_load(config_yaml))
    differing = [
        key
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not any(key == may or key.startswith(may + ".") for may in MAY_CHANGE)
    ]
    if not differing:
        return
    lines = [f"  {key}: {old.get(key, 'absent')} there, {new.get(key, 'absent')} now" for key in differing]
    folder = config_file.parent
    raise UserError(
        "\n".join([f"{folder} holds a run with other settings:", *lines]) + "\nTo start a new run: output_dir=OTHER. "
        f"To go on from its weights with the new settings: output_dir=OTHER resume={folder}/checkpoints/step-... "
        f"To continue it as it was: give the values on the left. To throw it away: delete {folder}."
    )


def _flat(node: object, prefix: str = "") -> dict[str, object]:
    if isinstance(node, dict) and node:
        return {k: v for key, child in node.items() for k, v in _flat(child, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): node}
