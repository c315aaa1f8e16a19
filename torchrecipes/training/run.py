"""The start of a run: its processes, its folder, its device, its seed."""

import atexit
import os
import random
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
import torch.distributed as dist

from torchrecipes.atomic_write import write_atomically
from torchrecipes.checkpoint.find import list_checkpoints
from torchrecipes.checkpoint.resume import check_same_settings
from torchrecipes.config import MayChange, to_yaml
from torchrecipes.devices import choose_device, device_name, preset
from torchrecipes.distributed import collectives
from torchrecipes.errors import UserError
from torchrecipes.file_lock import lock_folder
from torchrecipes.modules.attention_backend import activate_flash_attention_4
from torchrecipes.training.activation_checkpointing import tune_malloc
from torchrecipes.training.precision import (
    autocast,
    resolve_dtype,
    set_deterministic,
    set_float32_matmul_precision,
)


@dataclass
class ComputeConfig:
    """The config group `compute`: number formats, compilation, and how the model is spread over processes."""

    precision: Literal["auto", "bf16", "fp16", "fp32", "float8", "float8_rowwise"] = "auto"  # of products
    residual: Literal["auto", "bf16", "fp32"] = "auto"  # of the residual stream; auto: bf16 on GPUs
    float32_matmul_precision: Literal["high", "highest"] = "high"  # of fp32 runs on a GPU: high is TF32
    emulate_float8: bool = False  # on a device without float8: slow, for tests
    deterministic: bool = False  # a GPU's numbers repeat to the last bit, slower; a CPU's do anyway
    compile: bool = False  # torch.compile: about a minute at start-up
    activation_checkpointing: MayChange[Literal["none", "selective", "full"]] = "none"  # less memory, more time
    strategy: MayChange[Literal["auto", "none", "ddp", "fsdp", "hsdp"]] = "auto"  # how processes share the model
    device: MayChange[Literal["auto", "cpu", "cuda", "mps"]] = "auto"  # auto: a GPU (cuda, mps) if there is one
    reduce_gradients: MayChange[  # between shards; every: gradients stay sharded; auto: every with fsdp and hsdp
        Literal["auto", "every_micro_batch", "last_micro_batch"]
    ] = "auto"


@dataclass(frozen=True)
class Run:
    """The processes, the folder and the device of a run.

    Attributes:
        output_dir: the run's folder; it exists and can be written.
        device: where this process' model lives: see `compute.device`.
        dtype: of the forward and backward pass: bf16, fp16 or fp32.
        rank, world_size: this process among all.
        local_world_size: processes on this machine.
        resumes: a checkpoint is there to be restored, so initial weights need not be read.
        lock: keeps other processes from training into the folder as long as this object lives.
    """

    output_dir: Path
    device: torch.device
    dtype: torch.dtype = torch.float32
    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    resumes: bool = False
    lock: object = None

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    @property
    def placement(self) -> dict[str, Any]:
        """`rank`, `world_size` and `device`, as loaders take them."""
        return {"rank": self.rank, "world_size": self.world_size, "device": self.device}

    def autocast(self) -> AbstractContextManager:
        """The context for forward passes."""
        return autocast(self.device, self.dtype)


def start_run(config: Any) -> Run:
    """Joins the processes of the run, makes its folder, seeds every generator and picks device and number format.

    Under torchrun, or whatever sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, a process group is made
    if there is none: NCCL between GPUs, gloo between CPUs. Only rank 0 prints.

    Args:
        config: a recipe's, with the keys `output_dir`, `seed`, `optimizer`, `compute` and `checkpoint`. It is written
            to `<output_dir>/config.yaml`; a file that is there already is compared with it. The seed is for `random`,
            NumPy and torch: what the library draws itself (weights, order, masks) is a pure function of the seed and
            does not read these generators; dropout does, from seed + rank.

    Raises:
        UserError: the folder cannot be written, or holds a run with other settings (code `other_settings`) or, with
            resume=never, any run; or the environment names more processes than there are devices; or
            there is no `compute.device` (codes `no_device`, `old_torch`), or it cannot do what the config asks of it
            (`one_process`, `no_compile`).
    """
    compute, seed = config.compute, config.seed
    rank, local_rank, world_size, local_world_size = collectives.dist_env()
    device = _device(compute, local_rank, world_size)
    if compute.deterministic:
        set_deterministic()
    dtype = resolve_dtype(compute.precision, device, compute.emulate_float8)
    set_float32_matmul_precision(compute.float32_matmul_precision, device, dtype)
    flash_4 = ", FlashAttention-4" if activate_flash_attention_4(device) else ""
    if world_size > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, device_id=device if device.type == "cuda" else None)
        atexit.register(_destroy_process_group)
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, it lives as long as the process

    folder = Path(config.output_dir)
    locks: list = []
    resumes = collectives.run_on_rank0_and_broadcast(lambda: _prepare(folder, config, locks))

    random.seed(seed + rank)
    numpy.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)
    if device.type == "cpu":
        tune_malloc()
    processes = f"{world_size} processes" if world_size > 1 else "1 process"
    chosen = f" (precision: {compute.precision})" if compute.precision == "auto" else ""
    settings = ", ".join(f"{key}={value}" for key, value in config.optimizer.args.items())
    print(
        f"{folder}: {processes}, {device_name(device)}{flash_4}, {str(dtype).removeprefix('torch.')}{chosen}",
        flush=True,
    )
    print(f"optimizer: {config.optimizer.path} ({settings})", flush=True)
    return Run(folder, device, dtype, rank, world_size, local_world_size, resumes, locks)


def _destroy_process_group() -> None:
    # Threads of gloo that still run when the interpreter ends can abort the process.
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(compute: ComputeConfig, local_rank: int, world_size: int) -> torch.device:
    try:
        device = choose_device(compute.device, local_rank)
    except UserError as error:
        raise error.under("compute.device") from None
    if world_size > 1 and not preset(device).distributed:
        raise UserError(
            f"{device.type} trains in one process, and there are {world_size}",
            key="compute.device",
            hint="Start one process, or set compute.device=cpu.",
            code="one_process",
        )
    if compute.compile and not preset(device).compiles:
        raise UserError(
            f"torch.compile is not used on {device.type}: its kernels for it are a prototype",
            key="compute.compile",
            hint="Set compute.compile=false, or compute.device=cpu.",
            code="no_compile",
        )
    if device.type != "cuda":
        return device
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}",
            hint="Start one process per GPU: --nproc-per-node gpu.",
            code="more_processes_than_gpus",
        )
    torch.cuda.set_device(device)
    return device


def _prepare(folder: Path, config: Any, locks: list) -> bool:
    """Locks the folder and writes the config into it. Returns whether there is a checkpoint to resume from."""
    config_file, config_yaml, resume = folder / "config.yaml", to_yaml(config), config.checkpoint.resume
    try:
        folder.mkdir(parents=True, exist_ok=True)
        locks += lock_folder(folder)
        has_checkpoints = bool(list_checkpoints(folder / "checkpoints"))
        if resume not in ("auto", "never"):
            _check_is_checkpoint(Path(resume))
        if has_checkpoints and resume == "never":
            raise UserError(
                f"{folder} holds the checkpoints of a run, and resume=never would write over them",
                key="checkpoint.resume",
                hint="Give another output_dir=..., delete the folder, or continue the run with checkpoint.resume=auto.",
                code="would_overwrite",
            )
        if has_checkpoints and config_file.exists():
            check_same_settings(config_file, config_yaml, type(config))
        write_atomically(config_file, [config_yaml.encode()])
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror}",
            key="output_dir",
            hint="Give another output_dir=...",
            code="not_writable",
        ) from error
    return has_checkpoints or resume not in ("auto", "never")


def _check_is_checkpoint(path: Path) -> None:
    """Reports a wrong path before a corpus is made; the files are verified when the checkpoint is loaded."""
    if (path / "manifest.json").is_file():
        return
    of_run = sorted(path.glob("checkpoints/step-*"))
    raise UserError(
        f"{path} is not a checkpoint: it has no manifest.json",
        key="checkpoint.resume",
        hint=f"It is a run; its newest checkpoint is {of_run[-1]}"
        if of_run
        else "Give a folder .../checkpoints/step-...",
        code="not_a_checkpoint",
    )
