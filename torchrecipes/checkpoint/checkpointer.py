"""Checkpoints that survive a power cut: a Hugging Face model folder and a point to resume from, in one.

1. A checkpoint is written into a hidden folder, every file is flushed to the disk, and `manifest.json` with the size
   and checksum of each comes last. Then the folder is renamed: all of it is visible, or nothing.
2. Older checkpoints are removed only after that, each by renaming it to a hidden name first.
3. Resuming takes the newest checkpoint whose files all match the manifest, and reports the ones it skips.
4. Nothing is pickled: tensors are safetensors, the rest is JSON and text.
5. Every rank writes a part: optimizer and other state as it is sharded (torch.distributed.checkpoint, in safetensors),
   the model's tensors whole, so that any number of ranks, or `transformers`, can read them.
"""

import difflib
import errno
import json
import os
import random
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from torchrecipes.atomic_write import write_atomically
from torchrecipes.checkpoint.manifest import flush, fsync, verify, write_manifest
from torchrecipes.checkpoint.optimizer_state import (
    check_same_optimizer,
    flatten_optimizer,
    like_stored,
    unflatten_optimizer,
)
from torchrecipes.checkpoint.resume import check_same_architecture
from torchrecipes.checkpoint.state import flatten_state, unflatten_state
from torchrecipes.config.metadata import MayChange, Steps
from torchrecipes.distributed import collectives
from torchrecipes.errors import UserError
from torchrecipes.models.hub import hf_state_dict, stored_tensors, write_hf_config, write_tensors

__all__ = ["CheckpointConfig", "Checkpointer", "KeepBest", "find_checkpoint", "verify"]
# One process without a process group is intended.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
HIDDEN = ".incomplete-"  # prefix of a folder that is being written or removed
MODEL_FILE_BYTES = 4 << 30  # a larger model is stored in several files, written by several ranks


@dataclass
class KeepBest:
    """Which checkpoint is best: the one with the lowest or highest value of an evaluation metric."""

    metric: str  # as in metrics.jsonl: eval/validation/loss
    mode: Literal["min", "max"] = "min"


@dataclass
class CheckpointConfig:
    """The config group `checkpoint`."""

    save_every: MayChange[Steps | None] = 500  # steps; the last step is always saved
    keep_last: MayChange[Steps] = 3  # newest checkpoints that stay
    keep_best: MayChange[KeepBest | None] = None  # metric and mode: the best one stays too, as checkpoints/best
    async_save: MayChange[bool] = True  # training continues while a copy in the CPU's memory is written
    on_save_error: MayChange[Literal["stop", "continue"]] = "stop"  # when a disk is full
    resume: MayChange[str] = "auto"  # auto | never | path of a checkpoint


class Checkpointer:
    """Saves, finds and restores the checkpoints of one run, in `<output_dir>/checkpoints/step-00001000` and so on.

        checkpointer = Checkpointer(output_dir, model=model, optimizer=optimizer, state={"loader": loader})
        step = checkpointer.resume()
        ...
        checkpointer.save(step)

    In a run of several processes each makes one, and all call its methods at the same step. Use it as a context
    manager, which waits for the last save.

    Args:
        output_dir: the run's folder.
        options: the config group.
        model: saved under the names of its Hugging Face layout (`model.hf_adapter`), or under its own without one.
        optimizer: its state is saved by the model's parameter names, and restored bit by bit; learning rates and other
            settings stay those of this run.
        tokenizer: saved beside the model, and compared when resuming; None: there is none.
        state: more objects with `state_dict()` and `load_state_dict(state)`, by name. A state holds numbers, strings,
            lists, dicts and tensors, sharded ones (DTensor) included, and is equal on all ranks. An object that also
            has
            `exported_weights()`, parameter name to tensor, is written as a model folder `<checkpoint>/<name>/`, too.
        config_yaml: the resolved config, stored beside, so that the run can be repeated.
        recipe: the recipe's file, stored beside, too.

    Attributes:
        saved: the last checkpoint saved or resumed from; None: there is none.
    """

    def __init__(
        self,
        output_dir: str | Path,
        options: CheckpointConfig | None = None,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        tokenizer: Any = None,
        state: Mapping[str, Any] | None = None,
        config_yaml: str = "",
        recipe: str | Path | None = None,
    ):
        self.options, self.folder = options or CheckpointConfig(), Path(output_dir) / "checkpoints"
        self.model, self.optimizer, self.tokenizer, self.state = model, optimizer, tokenizer, dict(state or {})
        self.config_yaml = config_yaml
        self.recipe_source = Path(recipe).read_text(encoding="utf-8") if recipe else ""
        self.saved: Path | None = None
        self._ours: set[Path] = set()  # saved by this object, or resumed from
        self._corrupt: set[Path] = set()  # skipped by it
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None  # of the thread
        self._unsaved: UserError | None = None  # of the last save, when training continues without it
        # Its own group: the thread's messages must not come between those of the training.
        self._group = dist.new_group(backend="gloo") if collectives.world_size() > 1 else None
        self._copies: dict[str, Tensor] = {}  # CPU memory that every asynchronous save uses again
        self._cpu_meshes: dict[DeviceMesh, DeviceMesh] = {}

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None or kind is SystemExit:
            self.wait()
            collectives.all_reduce_sum(0)  # leave together: gloo aborts a process whose peers leave while it works
        elif self._thread is not None:
            # What is being written is good, whatever ended the run; but do not wait for a peer that is gone.
            self._thread.join(None if self._group is None else 60)

    def save(self, step: int) -> Path:
        """Writes the checkpoint of `step`, then removes old ones. Waits for the save before it.

        Args:
            step: optimizer steps done.

        Returns:
            The checkpoint's folder; with `async_save` it is there after `wait()`. One that this object saved already,
            or resumed from, is left as it is; a corrupt one is replaced.

        Raises:
            UserError: with on_save_error="stop", here or from `wait`: the disk is full or the folder cannot be written
                (code `cannot_save`; older checkpoints are untouched); or another run's checkpoint of this step is
                there.
        """
        self.wait()
        self._unsaved = None
        target = self.folder / f"step-{step:08d}"
        hidden = self.folder / f"{HIDDEN}{target.name}"
        optimizer_tensors, optimizer_state = flatten_optimizer(self.optimizer, self.model)
        state, state_tensors = flatten_state({name: obj.state_dict() for name, obj in self.state.items()})
        sharded = {"optimizer": optimizer_tensors, "state": state_tensors}
        needed = sum(t.nbytes for part in sharded.values() for t in part.values())
        needed += sum(parameter.nbytes for parameter in self.model.parameters())
        try:
            if collectives.run_on_rank0_and_broadcast(lambda: self._begin(target, hidden, needed)):
                self.saved = target
                return target
        except UserError as error:
            self._failed(error)
            return target
        texts = {"config.yaml": self.config_yaml, "recipe.py": self.recipe_source}
        files: dict[str, dict[str, Tensor]] = {}
        exports = {
            name: weights
            for name, obj in self.state.items()
            if hasattr(obj, "exported_weights") and (weights := obj.exported_weights())
        }
        for folder, weights in {"": self.model.state_dict(), **exports}.items():
            inside = f"{folder}/" if folder else ""
            my_files, weight_map = _my_model_files(self.model, weights)
            files |= {f"{inside}{file}": tensors for file, tensors in my_files.items()}
            if weight_map:
                index = {"metadata": {"total_size": sum(t.nbytes for t in weights.values())}, "weight_map": weight_map}
                texts[f"{inside}model.safetensors.index.json"] = json.dumps(index, indent=2) + "\n"
        stored = {"step": step, "state": state, "optimizer": optimizer_state}
        stored["tokenizer"] = getattr(self.tokenizer, "fingerprint", None)
        stored["rng"] = {"python": random.getstate(), "numpy": _numpy_rng()}
        texts["state.json"] = json.dumps(stored) + "\n"
        if self.options.async_save:
            sharded = {part: self._copy(tensors, part) for part, tensors in sharded.items()}
            files = {file: self._copy(tensors, file) for file, tensors in files.items()}
            if torch.cuda.is_available():
                torch.cuda.current_stream().synchronize()
        job = _Save(step, target, hidden, needed, texts, _torch_rng(), files, sharded, ["", *exports])
        self.saved = target
        if self.options.async_save:
            # A daemon: a process that ends in an error must not wait for a peer that is gone.
            self._thread = threading.Thread(target=self._write, args=(job,), name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._write(job)
            self.wait()
        return target

    def is_due(self, step: int, is_last: bool = False, is_evaluated: bool = False) -> bool:
        """Whether `step` is saved: every `save_every` steps, the last one, and with `keep_best` before evaluations."""
        every = self.options.save_every
        return is_last or (every is not None and step % every == 0) or bool(self.options.keep_best and is_evaluated)

    def resume(self, max_steps: int | None = None) -> int:
        """Restores the checkpoint that `options.resume` names: model, optimizer, state and random generators.

        `auto`: the newest valid one of this run; `never`: none; else the path of a checkpoint, of any run.

        Args:
            max_steps: the last step of this run, for a check.

        Returns:
            Its step; 0: there is nothing to resume.

        Raises:
            UserError: the path is not a valid checkpoint; all checkpoints are corrupt (code `corrupt_checkpoint`); it
                is of another model, optimizer, tokenizer or data.
        """
        mode = self.options.resume
        path = collectives.run_on_rank0_and_broadcast(self._find)
        if path is None:
            return 0
        self.saved = Path(path)
        if mode == "auto" or Path(path).parent == self.folder.resolve():
            self.saved = self.folder / Path(path).name
            self._ours.add(self.saved)
        self._report_recipe_changes(self.saved)
        step = self._restore(self.saved)
        if max_steps is not None and step > max_steps:
            raise UserError(
                f"{path} is of step {step:,}, and the run ends at step {max_steps:,}",
                key="max_steps",
                hint=f"Train for more steps, or take its weights alone: output_dir=OTHER init_from={path}",
                code="beyond_last_step",
            )
        return step

    def rollback(self) -> int:
        """Restores the newest valid checkpoint that this object saved or resumed from, and returns its step.

        State objects that must not go back, such as the rows that a loader has consumed, see to it in their
        `load_state_dict`.

        Raises:
            UserError: there is none.
        """
        try:
            self.wait()
        except UserError as error:
            print(f"the last save failed: {error}", flush=True)

        def find() -> str:
            for path in [*sorted(self._ours, key=_step, reverse=True), self.saved]:
                if path and not verify(path):
                    return str(path)
            raise UserError("there is no valid checkpoint to roll back to", code="no_checkpoint")

        self.saved = Path(collectives.run_on_rank0_and_broadcast(find))
        return self._restore(self.saved)

    def record_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """With `keep_best`: makes the checkpoint of `step` the best one if its metric is better than all before.

        Args:
            step: the checkpoint's; without a checkpoint of this step nothing happens.
            metrics: what the evaluation gave, named as in metrics.jsonl.

        Raises:
            UserError: the metric is not among them.
        """
        best = self.options.keep_best
        target = self.folder / f"step-{step:08d}"
        if best is None or self.saved != target:
            return
        if best.metric not in metrics:
            raise UserError(
                f"{best.metric} is not a metric of this run: {', '.join(metrics)}",
                key="checkpoint.keep_best.metric",
                code="unknown_metric",
            )
        self.wait()
        value = metrics[best.metric]
        collectives.run_on_rank0_and_broadcast(lambda: self._mark_best(target, best, value))

    def _mark_best(self, target: Path, best: KeepBest, value: float) -> None:
        former = self._best()
        same = former is not None and (former["metric"], former["mode"]) == (best.metric, best.mode)
        better = not same or (value < former["value"] if best.mode == "min" else value > former["value"])
        if not better or value != value or verify(target, checksums=False):  # NaN is never best
            return
        entry = {"checkpoint": target.name, "metric": best.metric, "mode": best.mode, "value": value}
        write_atomically(self.folder / "best.json", [json.dumps(entry).encode() + b"\n"])
        link = self.folder / f"{HIDDEN}best-link"
        link.unlink(missing_ok=True)
        link.symlink_to(target.name)
        os.replace(link, self.folder / "best")

    def _best(self) -> dict | None:
        try:
            return json.loads((self.folder / "best.json").read_bytes())
        except (OSError, ValueError):
            return None

    def _report_recipe_changes(self, path: Path) -> None:
        stored = path / "recipe.py"
        if not self.recipe_source or not stored.exists():
            return
        before, now = stored.read_text(encoding="utf-8").splitlines(), self.recipe_source.splitlines()
        changes = [line for line in difflib.ndiff(before, now) if line[:2] in ("+ ", "- ")]
        if changes:
            added = sum(line.startswith("+") for line in changes)
            print(
                f"the recipe has changed since {path}: {added} lines added, {len(changes) - added} removed "
                f"(saved version: {stored})",
                flush=True,
            )

    def _restore(self, path: Path) -> int:
        stored = json.loads((path / "state.json").read_text(encoding="utf-8"))
        fingerprint = getattr(self.tokenizer, "fingerprint", None)
        if stored["tokenizer"] != fingerprint:
            raise UserError(
                f"{path} was trained with another tokenizer (fingerprint {stored['tokenizer']}, current {fingerprint})",
                key="tokenizer",
                hint=f"Use the tokenizer in the checkpoint: tokenizer._component_=torchrecipes.data.tokenizers."
                f"load_tokenizer tokenizer.path={path}",
                code="other_tokenizer",
            )
        self._load_model(path)
        self._load_optimizer(path, stored["optimizer"])
        self._load_state(path, stored["state"])
        _restore_rng(path, stored)
        return stored["step"]

    def _load_model(self, path: Path) -> None:
        check_same_architecture(path, self.model)
        parameters = self.model.state_dict()
        with torch.no_grad():
            for name, tensor in stored_tensors(self.model, path):
                _set(parameters[name], tensor)

    def _load_optimizer(self, path: Path, description: dict) -> None:
        check_same_optimizer(description, self.optimizer, self.model, str(path))
        tensors = _load_shards(path / "optimizer", lambda key, meta: like_stored(key, meta, self.model))
        unflatten_optimizer(tensors, description, self.optimizer, self.model, str(path))

    def _load_state(self, path: Path, stored: dict) -> None:
        missing, unknown = self.state.keys() - stored.keys(), stored.keys() - self.state.keys()
        if missing or unknown:
            raise UserError(
                f"{path} has the state of {', '.join(stored) or 'nothing'}, this run that of {', '.join(self.state)}",
                key="checkpoint.resume",
                hint="Resume with the recipe and settings that saved it, or train its weights from step 1: "
                f"init_from={path} output_dir=OTHER.",
                code="other_state",
            )
        _, current = flatten_state({name: obj.state_dict() for name, obj in self.state.items()})

        def like(key: str, meta: Any) -> Tensor:
            now = current.get(key)
            if now is not None and now.shape == meta.size:
                return torch.empty_like(now, dtype=meta.properties.dtype, requires_grad=False)
            return torch.empty(meta.size, dtype=meta.properties.dtype)

        values = unflatten_state(stored, _load_shards(path / "state", like))
        for name, obj in self.state.items():
            obj.load_state_dict(values[name])

    def _copy(self, tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
        """Copies tensors, or this rank's shards of them, into CPU memory; from a GPU without waiting for it."""
        copies = {}
        for name, tensor in tensors.items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            copy = self._copies.get(f"{part}/{name}")
            if copy is None or copy.shape != local.shape or copy.dtype != local.dtype:
                copy = torch.empty(local.shape, dtype=local.dtype, pin_memory=torch.cuda.is_available())
                self._copies[f"{part}/{name}"] = copy
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
        if self.options.on_save_error == "stop" or not isinstance(error, UserError):
            raise error
        self._unsaved = error
        print(f"not saved, training continues (on_save_error=continue): {error}", flush=True)

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
                for name, tensors in job.files.items():
                    (job.hidden / name).parent.mkdir(exist_ok=True)
                    write_tensors(tensors, job.hidden / name)
                    names.append(name)
                if collectives.rank() == 0:
                    for folder in job.model_folders:
                        (job.hidden / folder).mkdir(exist_ok=True)
                        write_hf_config(self.model, job.hidden / folder, self.tokenizer)
                    write_tensors(job.rng, job.hidden / "rng.safetensors")
                    for name, text in job.texts.items():
                        (job.hidden / name).write_text(text, encoding="utf-8")
        except UserError as error:
            problem = str(error)
        try:
            # All ranks have to take part, also one that has failed already.
            with _disk_errors(self.folder, job.needed):
                for part, tensors in job.sharded.items():
                    names += _save_shards(tensors, job.hidden / part, self._group)
                entries = flush(job.hidden, names)
        except UserError as error:
            problem = problem or str(error)
        return problem, entries

    def _publish(self, job: "_Save", problems: list[str], files: dict[str, dict]) -> None:
        try:
            if problems:
                raise UserError(problems[0], code="cannot_save")
            with _disk_errors(self.folder, job.needed):
                found = [file for file in job.hidden.rglob("*") if file.is_file()]
                rest = {str(file.relative_to(job.hidden)) for file in found} - files.keys()  # config, tokenizer, ...
                write_manifest(job.hidden, job.step, files | flush(job.hidden, rest))
                if job.target.exists():
                    os.rename(job.target, self.folder / f"{HIDDEN}corrupt-{job.target.name}")
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

    def _find(self) -> str | None:
        path, skipped = find_checkpoint(self.folder.parent, self.options.resume)
        self._corrupt |= set(skipped)
        return path and str(path)

    def _is_saved(self, target: Path) -> bool:
        """Whether this run's valid checkpoint is there; False: a corrupt one is, to be replaced."""
        problems = verify(target)
        if problems:
            print(f"replacing corrupt checkpoint {target}: {'; '.join(problems)}", flush=True)
        elif target in self._ours:
            print(f"{target} is saved already", flush=True)
        else:
            raise UserError(
                f"{target} exists already, and this run has not written it",
                hint="Resume from it with checkpoint.resume=auto, or give another output_dir=...",
                code="checkpoint_exists",
            )
        return not problems

    def _prune(self, step: int) -> None:
        """Removes all but the newest and the best. Corrupt ones do not count, and none before `step` stays."""
        past = [path for path in _checkpoints(self.folder) if _step(path) <= step]
        kept = [path for path in past if path not in self._corrupt and not verify(path, checksums=False)]
        kept = kept[-self.options.keep_last :]
        if self.options.keep_best and (best := self._best()):
            kept.append(self.folder / best["checkpoint"])
        for path in past:
            if path not in kept:
                os.rename(path, self.folder / f"{HIDDEN}{path.name}")
        for path in self.folder.glob(f"{HIDDEN}*"):
            shutil.rmtree(path, ignore_errors=True)

    def _remove_left_overs(self) -> None:
        """Removes what a dead save or prune left. Only saving does it: a reader would hit a run's save."""
        for path in self.folder.glob(f"{HIDDEN}*"):
            path.unlink() if path.is_symlink() else shutil.rmtree(path)


@dataclass(frozen=True)
class _Save:
    """What is to be written; nothing in it changes while training continues.

    Attributes:
        files: model file -> the tensors that this rank writes into it.
        sharded: `optimizer` and `state` -> tensors as they are sharded.
        model_folders: folders inside the checkpoint that hold a model, "" for the checkpoint itself.
    """

    step: int
    target: Path
    hidden: Path
    needed: int
    texts: dict[str, str]
    rng: dict[str, Tensor]
    files: dict[str, dict[str, Tensor]]
    sharded: dict[str, dict[str, Tensor]]
    model_folders: list[str]


def find_checkpoint(output_dir: str | Path, resume: str = "auto") -> tuple[Path | None, dict[Path, list[str]]]:
    """The checkpoint that a run would resume from; reads every file of it, and changes nothing.

    Args:
        output_dir: the run's folder.
        resume: `auto`: the newest valid one; `never`: none; else the path of a checkpoint, of any run.

    Returns:
        Its folder, None if there is none; and the corrupt ones that were skipped, each with its problems.

    Raises:
        UserError: the path is not a valid checkpoint, or all of the run's are corrupt (code `corrupt_checkpoint`); or
            the run has newer ones (code `newer_checkpoints`).
    """
    folder, skipped = Path(output_dir) / "checkpoints", {}
    if resume == "never":
        return None, skipped
    if resume != "auto":
        return _named(Path(resume).resolve(), folder), skipped  # resolved, as checkpoints/best is a link
    found = _checkpoints(folder)
    for path in reversed(found):
        problems = verify(path)
        if not problems:
            print(f"resuming from {path}", flush=True)
            return path, skipped
        skipped[path] = problems
        print(f"skipping corrupt checkpoint {path}: {'; '.join(problems)}", flush=True)
    if found:
        raise UserError(
            f"every checkpoint in {folder} is corrupt",
            hint="Delete that folder to start again from step 1, or give checkpoint.resume=PATH with a valid one.",
            code="corrupt_checkpoint",
        )
    return None, skipped


def _named(path: Path, folder: Path) -> Path:
    if problems := verify(path):
        raise UserError(
            f"{path} is not a valid checkpoint: {'; '.join(problems)}",
            key="checkpoint.resume",
            hint="Give another one.",
            code="corrupt_checkpoint",
        )
    newest = max(_checkpoints(folder), key=_step, default=None)
    if newest and _step(newest) > json.loads((path / "state.json").read_text(encoding="utf-8"))["step"]:
        raise UserError(
            f"{newest} is newer than {path}: continuing from there would mix two runs in one folder",
            key="checkpoint.resume",
            hint="Give another output_dir=..., or checkpoint.resume=auto for the newest, or delete the newer ones.",
            code="newer_checkpoints",
        )
    return path


def _checkpoints(folder: Path) -> list[Path]:
    """The visible checkpoints in a folder, oldest first."""
    names = (path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit())
    return sorted((path for path in names if path.is_dir()), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _my_model_files(
    model: nn.Module, state: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """Unsharded tensors of a model, under their Hugging Face names where it has an adapter.

    Returns:
        file -> the tensors that this rank writes into it; and, where there are several files, tensor -> file.
    """
    sizes = [tensor.nbytes for tensor in state.values()]
    number_of = (np.cumsum(sizes) - 1) // MODEL_FILE_BYTES
    count = int(number_of[-1]) + 1
    files: dict[str, dict[str, Tensor]] = {}
    weight_map = {}
    for number, (name, tensor) in zip(number_of.tolist(), state.items(), strict=True):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        stored = hf_state_dict(model, {name: whole})
        weight_map |= dict.fromkeys(stored, file)
        if number % collectives.world_size() == collectives.rank():
            # Unsharded tensors are freed one by one, so that a GPU holds one of them at a time.
            files.setdefault(file, {}).update(
                {key: value.cpu() if whole is not tensor else value for key, value in stored.items()}
            )
    return files, weight_map if count > 1 else {}


def _save_shards(tensors: dict[str, Tensor], folder: Path, group: dist.ProcessGroup | None) -> list[str]:
    """Saves tensors into `folder` with all ranks. Returns the files that this one has written, with the folder."""
    if not tensors:
        return []
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)
    except dcp.CheckpointException as error:
        # Raised on all ranks, with what happened on each: a full disk is reported as such.
        first, _ = next(iter(error.failures.values()))
        raise first from None
    mine = f"shard-{collectives.rank() + 1:05d}-"
    mode = folder.parent.stat().st_mode & 0o666
    files = [file for file in folder.iterdir() if file.name.startswith(mine)]
    for file in files:
        file.chmod(mode)
    return [f"{folder.name}/{file.name}" for file in files]


def _load_shards(folder: Path, like: Callable[[str, Any], Tensor]) -> dict[str, Tensor]:
    """Reads what `_save_shards` wrote, each tensor into `like(key, metadata)`: whole, or this rank's shard."""
    if not folder.exists():
        return {}
    stored = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    tensors = {key: like(key, meta) for key, meta in stored.items()}
    # Each rank reads what it needs by itself.
    dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    return tensors


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


def _restore_rng(path: Path, stored: dict) -> None:
    """Sets the global generators of torch, NumPy and Python, which dropout reads, to where they were.

    Those of torch are each rank's own; a rank that the saved run did not have begins with a seed of (step, rank).
    """
    states, rank = load_file(path / "rng.safetensors"), collectives.rank()
    if f"cpu.{rank}" in states:
        torch.set_rng_state(states[f"cpu.{rank}"])
    else:
        torch.manual_seed(stored["step"] << 20 | rank)
    if f"cuda.{rank}" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[f"cuda.{rank}"])
    version, internal, gauss = stored["rng"]["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = stored["rng"]["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))


def _numpy_rng() -> list:
    name, keys, *rest = np.random.get_state()
    return [name, keys.tolist(), *rest]


@contextmanager
def _disk_errors(folder: Path, needed: int) -> Iterator[None]:
    """Turns a disk's errors into a UserError; safetensors raises its own class for them."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(there).free
        raise UserError(
            f"cannot save in {folder}: {reason}; a checkpoint takes about {needed / 2**20:,.0f} MiB, and "
            f"{free / 2**20:,.0f} MiB are free",
            hint="Make room there, or make it writable, and run the same command to resume from the newest checkpoint; "
            "older ones are untouched.",
            code="cannot_save",
        ) from error
