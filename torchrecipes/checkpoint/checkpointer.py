"""Checkpoints that survive a power cut: a Hugging Face model folder and a point to resume from, in one.

1. A checkpoint is written into a hidden folder, every file is flushed to the disk, and `manifest.json` with the size
   and checksum of each comes last. Then the folder is renamed: it is there whole, or not at all.
2. Older checkpoints are removed only after that, each by renaming it to a hidden name first.
3. Resuming takes the newest checkpoint whose files are all as the manifest says, and says which ones it passes over.
4. Nothing is pickled: tensors are safetensors, the rest is JSON and text.
5. Every rank writes a part: the optimizer's state as it is sharded (torch.distributed.checkpoint, in safetensors), the
   model's tensors whole, so that any number of ranks, or `transformers`, can read them.
"""

import errno
import json
import os
import random
import shutil
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from torchrecipes.checkpoint.manifest import flush, fsync, verify, write_manifest
from torchrecipes.checkpoint.optimizer_state import (
    check_same_optimizer,
    flatten_optimizer,
    like_stored,
    unflatten_optimizer,
)
from torchrecipes.checkpoint.resume import check_same_architecture
from torchrecipes.distributed import collectives
from torchrecipes.errors import UserError
from torchrecipes.models.hub import hf_state_dict, stored_tensors, write_hf_config, write_tensors

__all__ = ["Checkpoint", "Checkpointer", "verify"]
# One process without a process group is meant.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
HIDDEN = ".incomplete-"  # before the name of a folder that is being written or removed
MODEL_FILE_BYTES = 4 << 30  # a larger model is stored in several files, written by several ranks


class Checkpointer:
    """Saves and finds the checkpoints of one run, in `<output_dir>/checkpoints/step-00001000` and so on.

    In a run of several processes each makes one, and all call its methods at the same step.

    Args:
        output_dir: the run's folder.
        keep_last: how many checkpoints stay.
        asynchronous: `save` returns when it has copied everything to the CPU's memory (as much again as the model and
            the optimizer's state of this rank take), and a thread writes the copy.
        on_error: what a save that fails does: `stop` raises, `continue` prints and lets the training go on.
    """

    def __init__(self, output_dir: str | Path, keep_last: int = 3, asynchronous: bool = False, on_error: str = "stop"):
        if keep_last < 1:
            raise UserError(
                f"keep_last is {keep_last}; keep at least 1 checkpoint, or there is nothing to resume from."
            )
        if on_error not in ("stop", "continue"):
            raise UserError(f"on_save_error: {on_error!r} is not known. Use stop or continue.")
        self.folder, self.keep_last = Path(output_dir) / "checkpoints", keep_last
        self.asynchronous, self.on_error = asynchronous, on_error
        self._resumed: Path | None = None
        self._ours: set[Path] = set()  # saved by this object, or resumed from
        self._corrupt: set[Path] = set()  # passed over by it
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None  # of the thread
        self._unsaved: UserError | None = None  # of the last save, when training goes on without it
        # A group of its own: the thread's messages must not come between those of the training.
        self._group = dist.new_group(backend="gloo") if collectives.world_size() > 1 else None
        self._copies: dict[str, Tensor] = {}  # the CPU's memory for them, used again by every save
        self._cpu_meshes: dict[DeviceMesh, DeviceMesh] = {}

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None or kind is SystemExit:
            self.wait()
            collectives.all_reduce_sum(0)  # leave together: gloo aborts a process whose peers go while it is at work
        elif self._thread is not None:
            # What is being written is good, whatever has ended the run; but a peer that is gone is not waited for.
            self._thread.join(None if self._group is None else 60)

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        tokenizer,
        *,
        state: dict,
        config_yaml: str,
        recipe_source: str,
    ) -> Path:
        """Writes the checkpoint of `step`, then removes those beyond `keep_last`. Waits for the save before it.

        Args:
            step: optimizer steps done.
            model, optimizer, tokenizer: what is saved; `optimizer` by the model's parameter names.
            state: more that the recipe wants back, JSON values.
            config_yaml, recipe_source: kept beside, so that the run can be repeated.

        Returns:
            The checkpoint's folder; with `asynchronous` it is there after `wait()`. One that this object saved already,
            or resumed from, is left as it is; a damaged one is replaced.

        Raises:
            UserError: with on_error="stop", here or from `wait`: the disk is full or the folder cannot be written,
                older checkpoints are untouched; or another run's checkpoint of this step is there.
        """
        self.wait()
        self._unsaved = None
        target = self.folder / f"step-{step:08d}"
        hidden = self.folder / f"{HIDDEN}{target.name}"
        optimizer_tensors, optimizer_state = flatten_optimizer(optimizer, model)
        needed = sum(t.nbytes for t in (*optimizer_tensors.values(), *model.parameters()))
        try:
            if collectives.run_on_rank0_and_broadcast(lambda: self._begin(target, hidden, needed)):
                return target
        except UserError as error:
            self._failed(error)
            return target
        model_files, weight_map = _my_model_files(model)
        generators = {"python": random.getstate(), "numpy": _numpy_rng()}
        stored = {"step": step, "state": state, "optimizer": optimizer_state, "rng": generators}
        texts = {"state.json": json.dumps(stored) + "\n", "config.yaml": config_yaml, "recipe.py": recipe_source}
        if weight_map:
            size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            texts["model.safetensors.index.json"] = json.dumps(index, indent=2) + "\n"
        if self.asynchronous:
            optimizer_tensors = self._copy(optimizer_tensors)
            model_files = {file: self._copy(tensors) for file, tensors in model_files.items()}
            if torch.cuda.is_available():
                torch.cuda.current_stream().synchronize()
        rng = _torch_rng()
        job = _Save(step, target, hidden, needed, model, tokenizer, texts, rng, model_files, optimizer_tensors)
        if self.asynchronous:
            # A daemon: a process that ends in an error must not wait for a peer that is gone.
            self._thread = threading.Thread(target=self._write, args=(job,), name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._write(job)
            self.wait()
        return target

    def _copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies tensors, or this rank's shards of them, into the CPU's memory; from a GPU without waiting for it."""
        copies = {}
        for name, tensor in tensors.items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            copy = self._copies.get(name)
            if copy is None or copy.shape != local.shape or copy.dtype != local.dtype:
                copy = torch.empty(local.shape, dtype=local.dtype, pin_memory=torch.cuda.is_available())
                self._copies[name] = copy
            copies[name] = copy.copy_(local, non_blocking=True)
            if isinstance(tensor, DTensor):
                mesh = tensor.device_mesh
                if mesh.device_type != "cpu":
                    if mesh not in self._cpu_meshes:
                        self._cpu_meshes[mesh] = DeviceMesh("cpu", mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)
                    mesh = self._cpu_meshes[mesh]
                copies[name] = DTensor.from_local(
                    copy, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
                )
        return copies

    def wait(self, final: bool = False) -> None:
        """Returns when the last save is on the disk.

        Args:
            final: nothing comes after: a failed save is an error then, with on_error="continue", too.

        Raises:
            UserError: with on_error="stop", or `final`: it failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            self._failed(error)
        if final and self._unsaved:
            raise self._unsaved

    def _failed(self, error: BaseException) -> None:
        if self.on_error == "stop" or not isinstance(error, UserError):
            raise error
        self._unsaved = error
        print(f"not saved, training goes on (on_save_error=continue): {error}", flush=True)

    def _begin(self, target: Path, hidden: Path, needed: int) -> bool:
        """Makes room for a save. Returns whether the checkpoint is there already."""
        with _disk_errors(self.folder, needed):
            if target.exists() and self._is_saved(target):
                return True
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_left_overs()
            if shutil.disk_usage(self.folder).free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            hidden.mkdir()
        return False

    def _write(self, job: "_Save") -> None:
        """Writes a save's files with all ranks, then lets rank 0 make it visible; a failure is kept for `wait`."""
        try:
            reports = collectives.all_gather_object(self._write_mine(job), self._group)
            problems = [problem for problem, _ in reports if problem]
            files = {name: entry for _, entries in reports for name, entry in entries.items()}
            collectives.run_on_rank0_and_broadcast(lambda: self._publish(job, problems, files), self._group)
        except BaseException as error:
            self._error = error

    def _write_mine(self, job: "_Save") -> tuple[str, dict[str, dict]]:
        """Writes this rank's files: (what went wrong or "", the files' entries for the manifest)."""
        problem, names, entries = "", [], {}
        try:
            with _disk_errors(self.folder, job.needed):
                for name, tensors in job.model.items():
                    write_tensors(tensors, job.hidden / name)
                    names.append(name)
                if collectives.rank() == 0:
                    write_hf_config(job.network, job.hidden, job.tokenizer)
                    write_tensors(job.rng, job.hidden / "rng.safetensors")
                    for name, text in job.texts.items():
                        (job.hidden / name).write_text(text, encoding="utf-8")
        except UserError as error:
            problem = str(error)
        try:
            # All ranks have to take part, also one that has failed already.
            with _disk_errors(self.folder, job.needed):
                names += _save_shards(job.optimizer, job.hidden, self._group)
                entries = flush(job.hidden, names)
        except UserError as error:
            problem = problem or str(error)
        return problem, entries

    def _publish(self, job: "_Save", problems: list[str], files: dict[str, dict]) -> None:
        try:
            if problems:
                raise UserError(problems[0])
            with _disk_errors(self.folder, job.needed):
                found = [file for file in job.hidden.rglob("*") if file.is_file()]
                rest = {str(file.relative_to(job.hidden)) for file in found} - files.keys()  # config, tokenizer, ...
                write_manifest(job.hidden, job.step, files | flush(job.hidden, rest))
                if job.target.exists():
                    os.rename(job.target, self.folder / f"{HIDDEN}damaged-{job.target.name}")
                os.rename(job.hidden, job.target)
                fsync(self.folder)
                fsync(self.folder.parent)  # which `checkpoints` itself may be new in
        except BaseException:
            shutil.rmtree(job.hidden, ignore_errors=True)
            raise
        self._ours.add(job.target)
        self._corrupt.discard(job.target)
        with _disk_errors(self.folder, job.needed):
            self._prune(job.step)

    def resume(self, mode: str) -> "Checkpoint | None":
        """The checkpoint to go on from.

        Args:
            mode: `auto`: the newest whole one of this run, None where there is none; `never`: None; else the path of a
                checkpoint, of any run.

        Raises:
            UserError: the path is not a whole checkpoint; or there are checkpoints and all of them are damaged.
        """
        if mode == "never":
            return None
        path = collectives.run_on_rank0_and_broadcast(lambda: self._find(mode))
        if path is None:
            return None
        if mode == "auto" or Path(path).resolve().parent == self.folder.resolve():
            self._ours.add(self.folder / Path(path).name)
        self._resumed = Path(path)
        return _open(Path(path))

    def _find(self, mode: str) -> str | None:
        """The checkpoint to resume from."""
        if mode != "auto":
            return self._named(Path(mode))
        found = self._checkpoints()
        for path in reversed(found):
            problems = verify(path)
            if not problems:
                print(f"resuming from {path}", flush=True)
                return str(path)
            self._corrupt.add(path)
            print(f"passed over {path}, which is damaged: {'; '.join(problems)}", flush=True)
        if found:
            raise UserError(
                f"every checkpoint in {self.folder} is damaged. Delete that folder to start again from step 1, or give "
                "resume=PATH with a whole checkpoint."
            )
        return None

    def latest_valid(self) -> "Checkpoint":
        """The newest whole checkpoint that this object saved or resumed from, to go back to. Waits for a save.

        Raises:
            UserError: there is none.
        """
        try:
            self.wait()
        except UserError as error:
            print(f"the last save has failed: {error}", flush=True)

        def find() -> str:
            newest_first = sorted(self._ours, key=_step, reverse=True)
            for path in [*newest_first, self._resumed]:
                if path and not verify(path):
                    return str(path)
            raise UserError("there is no whole checkpoint to go back to.")

        return _open(Path(collectives.run_on_rank0_and_broadcast(find)))

    def _is_saved(self, target: Path) -> bool:
        """Whether this run's checkpoint is there, whole; False: a damaged one is, to be replaced."""
        problems = verify(target)
        if problems:
            print(f"{target}, which is damaged, is replaced: {'; '.join(problems)}", flush=True)
        elif target in self._ours:
            print(f"{target} is saved already", flush=True)
        else:
            raise UserError(
                f"{target} is there already, and this run has not written it. Go on from it with resume=auto, or give "
                "another output_dir=..."
            )
        return not problems

    def _named(self, path: Path) -> str:
        problems = verify(path)
        if problems:
            raise UserError(f"resume: {path} is not a whole checkpoint: {'; '.join(problems)}. Give another one.")
        step = _open(path).step
        newest = max(self._checkpoints(), key=_step, default=None)
        if newest and _step(newest) > step:
            raise UserError(
                f"resume: {path} is of step {step}, and {newest} is newer: going on would mix two runs in "
                "one folder. Give another output_dir=..., or resume=auto to take the newest, or delete the newer ones."
            )
        return str(path)

    def _checkpoints(self) -> list[Path]:
        """The checkpoints that can be seen, oldest first."""
        names = (path for path in self.folder.glob("step-*") if path.name.removeprefix("step-").isdigit())
        return sorted((path for path in names if path.is_dir()), key=_step)

    def _prune(self, step: int) -> None:
        """Removes all but the newest. Damaged ones do not count, and none stays that `step` has passed."""
        past = [path for path in self._checkpoints() if _step(path) <= step]
        kept = [path for path in past if path not in self._corrupt and not verify(path, checksums=False)][
            -self.keep_last :
        ]
        for path in past:
            if path not in kept:
                os.rename(path, self.folder / f"{HIDDEN}{path.name}")
        for path in self.folder.glob(f"{HIDDEN}*"):
            shutil.rmtree(path, ignore_errors=True)

    def _remove_left_overs(self) -> None:
        """Removes what a dead save or prune left. Done by saving only: one who only reads would hit a run's save."""
        for path in self.folder.glob(f"{HIDDEN}*"):
            shutil.rmtree(path)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint.

    Attributes:
        path: its folder.
        step: optimizer steps done.
        state: what the recipe gave to `save`.
        optimizer: the optimizer's class, groups and settings, see optimizer_state.py.
        rng: the generators of Python and NumPy.
    """

    path: Path
    step: int
    state: dict
    optimizer: dict
    rng: dict

    def load_model(self, model: nn.Module) -> None:
        """Sets the model's parameters to the saved ones; a sharded model takes its own parts, tensor by tensor.

        Raises:
            UserError: the checkpoint is of another model; names what differs.
        """
        check_same_architecture(self.path, model)
        parameters = model.state_dict()
        with torch.no_grad():
            for name, tensor in stored_tensors(model, self.path):
                _set(parameters[name], tensor)

    def load_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Sets the optimizer's state to the saved one. Learning rates and other settings stay those of `optimizer`.

        Raises:
            UserError: the state is of other parameters or another kind of optimizer; names what differs.
        """
        check_same_optimizer(self.optimizer, optimizer, model, str(self.path))
        tensors = {}
        if (self.path / "optimizer").exists():
            reader = dcp.HuggingFaceStorageReader(str(self.path / "optimizer"))
            stored = reader.read_metadata().state_dict_metadata
            tensors = {key: like_stored(key, meta, model) for key, meta in stored.items()}
            # Each rank reads what it needs by itself.
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(self.path / "optimizer")), no_dist=True)
        unflatten_optimizer(tensors, self.optimizer, optimizer, model, str(self.path))

    def restore_rng(self) -> None:
        """Sets the global generators of torch, NumPy and Python, which dropout reads, to where they were.

        Those of torch are each rank's own; a rank that the saved run did not have begins with a seed of (step, rank).
        """
        states, rank = load_file(self.path / "rng.safetensors"), collectives.rank()
        if f"cpu.{rank}" in states:
            torch.set_rng_state(states[f"cpu.{rank}"])
        else:
            torch.manual_seed(self.step << 20 | rank)
        if f"cuda.{rank}" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states[f"cuda.{rank}"])
        version, internal, gauss = self.rng["python"]
        random.setstate((version, tuple(internal), gauss))
        name, keys, *rest = self.rng["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))


@dataclass(frozen=True)
class _Save:
    """What is to be written: nothing in it changes while training goes on.

    Attributes:
        network: for its config only.
        model: file -> the tensors that this rank writes into it.
        optimizer: the state as it is sharded.
    """

    step: int
    target: Path
    hidden: Path
    needed: int
    network: nn.Module
    tokenizer: object
    texts: dict[str, str]
    rng: dict[str, Tensor]
    model: dict[str, dict[str, Tensor]]
    optimizer: dict[str, Tensor]


def _open(path: Path) -> Checkpoint:
    stored = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return Checkpoint(path, stored["step"], stored["state"], stored["optimizer"], stored["rng"])


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _my_model_files(model: nn.Module) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """The model's tensors whole, under their Hugging Face names.

    Returns:
        file -> the tensors that this rank writes into it; and, where there are several files, tensor -> file.
    """
    state = model.state_dict()
    sizes = [tensor.numel() * tensor.element_size() for tensor in state.values()]
    number_of = (np.cumsum(sizes) - 1) // MODEL_FILE_BYTES
    count = int(number_of[-1]) + 1
    files: dict[str, dict[str, Tensor]] = {}
    weight_map = {}
    for number, (name, tensor) in zip(number_of.tolist(), state.items(), strict=True):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        theirs = hf_state_dict(model, {name: whole})
        weight_map |= dict.fromkeys(theirs, file)
        if number % collectives.world_size() == collectives.rank():
            # What was gathered is freed tensor by tensor, so that a GPU holds one of them at a time.
            files.setdefault(file, {}).update(
                {key: value.cpu() if whole is not tensor else value for key, value in theirs.items()}
            )
    return files, weight_map if count > 1 else {}


def _save_shards(tensors: dict[str, Tensor], folder: Path, group: dist.ProcessGroup | None) -> list[str]:
    """Saves an optimizer's tensors with all ranks. Returns the files that this one has written."""
    inside = folder / "optimizer"
    if not tensors:
        return []
    writer = dcp.HuggingFaceStorageWriter(str(inside), save_distributed=True)
    try:
        dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)
    except dcp.CheckpointException as error:
        # It is raised on all ranks, with what happened on each: a full disk is to be told as one.
        first, _ = next(iter(error.failures.values()))
        raise first from None
    mine = f"shard-{collectives.rank() + 1:05d}-"
    mode = folder.stat().st_mode & 0o666
    files = [file for file in inside.iterdir() if file.name.startswith(mine)]
    for file in files:
        file.chmod(mode)
    return [f"optimizer/{file.name}" for file in files]


def _set(parameter: Tensor, value: Tensor) -> None:
    if isinstance(parameter, DTensor):
        value = value.to(parameter.device_mesh.device_type)
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(value)


def _torch_rng() -> dict[str, Tensor]:
    """Every rank's generators, on every rank."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {
        f"{kind}.{rank}": torch.tensor(values, dtype=torch.uint8)
        for kind, state in states.items()
        for rank, values in enumerate(collectives.all_gather_object(state.tolist()))
    }


def _numpy_rng() -> list:
    name, keys, *rest = np.random.get_state()
    return [name, keys.tolist(), *rest]


@contextmanager
def _disk_errors(folder: Path, needed: int) -> Iterator[None]:
    """Turns what the disk refuses into a UserError; safetensors tells it in an error of its own."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(there).free
        raise UserError(
            f"cannot save in {folder}: {reason}. A checkpoint takes about {needed / 2**20:,.0f} MiB, and "
            f"{free / 2**20:,.0f} MiB are free. Make room there, or make it writable; older checkpoints are untouched, "
            "and the same command goes on from the newest."
        ) from error
