"""Checkpoints that survive a power cut: a Hugging Face model folder and a point to resume from, in one.

1. A checkpoint is written into a hidden folder, every file is flushed to the disk, and `manifest.json` with the size
   and checksum of each comes last. Then the folder is renamed: all of it is visible, or nothing.
2. Older checkpoints are removed only after that, each by renaming it to a hidden name first.
3. Resuming takes the newest checkpoint whose files all match the manifest, and reports the ones it skips.
4. Nothing is pickled: tensors are safetensors, the rest is JSON and text.
5. Every rank writes a part: optimizer and other state as it is sharded (torch.distributed.checkpoint, in safetensors),
   the model's tensors whole, so that any number of ranks, or `transformers`, can read them.
"""

import errno
import json
import os
import shutil
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchrecipes.checkpoint.best import KeepBest, best_checkpoint, link_best, mark_if_best
from torchrecipes.checkpoint.find import find_checkpoint, list_checkpoints, step_of
from torchrecipes.checkpoint.optimizer_state import flatten_optimizer
from torchrecipes.checkpoint.random_state import random_state
from torchrecipes.checkpoint.restore import restore_checkpoint
from torchrecipes.checkpoint.resume import report_recipe_changes
from torchrecipes.checkpoint.state import flatten_state
from torchrecipes.checkpoint.tensor_files import HostCopies, unsharded_files
from torchrecipes.checkpoint.write import Save, disk_errors, write_checkpoint
from torchrecipes.config.metadata import MayChange, Steps
from torchrecipes.distributed import collectives
from torchrecipes.errors import UserError
from torchrecipes.manifest import HIDDEN, verify
from torchrecipes.models.hub import write_hf_config
from torchrecipes.models.lora_adapter import peft_config, peft_tensors
from torchrecipes.modules.lora import LoRAState, lora_layers

__all__ = ["CheckpointConfig", "Checkpointer"]
# One process without a process group is intended.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


@dataclass
class CheckpointConfig:
    """The config group `checkpoint`."""

    save_every: MayChange[Steps | None] = 500  # steps; the last step is always saved
    keep_last: MayChange[Steps] = 3  # newest checkpoints that stay
    keep_best: MayChange[KeepBest | None] = None  # metric, mode, limits: the best one stays too, as checkpoints/best
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
        model: saved under the names of its Hugging Face layout (`model.hf_adapter`), or under its own without one. One
            with LoRA is saved merged, and as a folder `adapter` for peft; the state `lora` is what it resumes from.
        optimizer: its state is saved by the model's parameter names, and restored bit by bit. Its settings stay
            those of this run, but for what a scheduler in `state` has set, such as the learning rate.
        tokenizer: saved beside the model, and compared when resuming; None: there is none.
        state: more objects with `state_dict()` and `load_state_dict(state)`, by name. A state holds numbers, strings,
            lists, dicts and tensors, sharded ones (DTensor) included, and is equal on all ranks. An object that also
            has `exported_weights()`, the model's state with other values, is written as a model folder
            `<checkpoint>/<name>/`, too.
        config_yaml: the resolved config, stored beside, so that the run can be repeated.
        recipe: the recipe's file, stored beside, too.

    Attributes:
        saved: the last checkpoint saved or resumed from; None: there is none.

    Raises:
        TypeError: a state holds something else, with its place.
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
        if lora_layers(model):
            self.state["lora"] = LoRAState(model)
        self.config_yaml = config_yaml
        self.recipe_source = Path(recipe).read_text(encoding="utf-8") if recipe else ""
        self.saved: Path | None = None
        self._max_steps: int | None = None  # as `resume` was given it
        self._saved_before: Path | None = None  # what `saved` was before the save that is being written
        self._ours: set[Path] = set()  # saved by this object, or resumed from
        self._corrupt: set[Path] = set()  # skipped by it
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None  # of the thread
        self._unsaved: UserError | None = None  # of the last save, when training continues without it
        # Its own group: the thread's messages must not come between those of the training.
        self._group = dist.new_group(backend="gloo") if collectives.world_size() > 1 else None
        self._host = HostCopies()  # for asynchronous saves
        self._companions: dict[str, bytes] = {}  # files beside a model's weights: they never change
        self._flat_state()  # a state that cannot be saved is reported before training

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None or kind is SystemExit:
            self.wait()
            collectives.all_reduce_sum(0)  # leave together: gloo aborts a process whose peers leave while it works
        elif self._thread is not None:
            # What is being written is good, whatever ended the run; but do not wait for a peer that is gone.
            self._thread.join(None if self._group is None else 60)

    def is_due(self, step: int, is_last: bool = False, is_evaluated: bool = False) -> bool:
        """Whether `step` is saved: every `save_every` steps, the last one, and with `keep_best` before evaluations."""
        every = self.options.save_every
        return is_last or (every is not None and step % every == 0) or bool(self.options.keep_best and is_evaluated)

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
                there (code `checkpoint_exists`).
        """
        self.wait()
        self._unsaved, self._saved_before = None, self.saved
        target = self.folder / f"step-{step:08d}"
        hidden = self.folder / f"{HIDDEN}{target.name}"
        # The model's first: FSDP may have unsharded parameters, which the optimizer does not know; this reshards them.
        models = {"": self.model.state_dict()}
        for name, obj in self.state.items():
            if hasattr(obj, "exported_weights") and (weights := obj.exported_weights()):
                models[f"{name}/"] = weights
        optimizer_tensors, optimizer_state = flatten_optimizer(self.optimizer, self.model)
        state, state_tensors = self._flat_state()
        sharded = {"optimizer": optimizer_tensors, "state": state_tensors}
        needed = sum(tensor.nbytes for part in (*models.values(), *sharded.values()) for tensor in part.values())
        try:
            if collectives.run_on_rank0_and_broadcast(lambda: self._begin(target, hidden, needed)):
                self.saved = target
                return target
        except UserError as error:
            self._failed(error)
            return target
        ranks, rng = random_state()
        stored = {"step": step, "state": state, "optimizer": optimizer_state, "random": ranks}
        stored["max_steps"] = self._max_steps
        stored["tokenizer"] = getattr(self.tokenizer, "fingerprint", None)
        texts = {"config.yaml": self.config_yaml, "recipe.py": self.recipe_source, "state.json": json.dumps(stored)}
        files: dict[str, dict[str, Tensor]] = {}
        for folder, weights in models.items():
            my_files, weight_map = unsharded_files(self.model, weights)
            files |= {folder + file: tensors for file, tensors in my_files.items()}
            if weight_map:
                index = {"metadata": {"total_size": sum(t.nbytes for t in weights.values())}, "weight_map": weight_map}
                texts[f"{folder}model.safetensors.index.json"] = json.dumps(index, indent=2) + "\n"
        if lora_layers(self.model):
            lora = peft_tensors(self.model, models[""])
            if collectives.rank() == 0:
                files["adapter/adapter_model.safetensors"] = lora
            texts["adapter/adapter_config.json"] = peft_config(self.model)
        if self.options.async_save:
            sharded = {part: self._host.copy(tensors, part) for part, tensors in sharded.items()}
            files = {file: self._host.copy(tensors, file) for file, tensors in files.items()}
            if torch.cuda.is_available():
                torch.cuda.current_stream().synchronize()
        contents = {name: text.encode() for name, text in texts.items()}
        contents |= {folder + name: content for folder in models for name, content in self._companions.items()}
        job = Save(step, target, hidden, needed, contents, rng, files, sharded)
        self.saved = target
        if self.options.async_save:
            # A daemon: a process that ends in an error must not wait for a peer that is gone.
            self._thread = threading.Thread(target=self._write, args=(job,), name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._write(job)
            self.wait()
        return target

    def wait(self, final: bool = False) -> None:
        """Returns when the last save is on the disk.

        Args:
            final: no save comes after: a failed one is an error then, with on_save_error="continue", too.

        Raises:
            UserError: with on_save_error="stop", or `final`: it failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            self.saved = self._saved_before
            self._failed(error)
        if final and self._unsaved:
            raise self._unsaved

    def resume(self, max_steps: int | None = None) -> int:
        """Restores the checkpoint that `options.resume` names: model, optimizer, state and random generators.

        `auto`: the newest valid one of this run; `never`: none; else the path of a checkpoint, of any run.

        Args:
            max_steps: the last step of this run, for a check, and stored in its checkpoints.

        Returns:
            Its step; 0: there is nothing to resume.

        Raises:
            UserError: the path is not a valid checkpoint; all checkpoints are corrupt (code `corrupt_checkpoint`); it
                is of another model, optimizer, tokenizer or data; or of a step after the last (`beyond_last_step`).
        """
        self._max_steps = max_steps
        found = collectives.run_on_rank0_and_broadcast(self._find)
        if found is None:
            return 0
        path = Path(found)
        if path.parent == self.folder or path.parent == self.folder.resolve():
            path = self.folder / path.name
            self._ours.add(path)
        report_recipe_changes(path, self.recipe_source)
        step = self._restore(path, max_steps)
        self.saved = path
        return step

    def rollback(self) -> int:
        """Restores the newest valid checkpoint that this object saved or resumed from, and returns its step.

        State objects that must not go back, such as the rows that a loader has consumed, see to it in their
        `load_state_dict`.

        Raises:
            UserError: there is none (code `no_checkpoint`).
        """
        try:
            self.wait()
        except UserError as error:
            print(f"the last save failed: {error}", flush=True)

        def find() -> str:
            for path in [*sorted(self._ours, key=step_of, reverse=True), self.saved]:
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
            UserError: a metric that `keep_best` names is not among them (code `unknown_metric`); or as `save`.
        """
        keep = self.options.keep_best
        if keep is None:
            return
        keys = {keep.metric: "metric"} | dict.fromkeys(keep.at_most, "at_most")
        for name, key in keys.items():
            if name not in metrics:
                raise UserError(
                    f"this run has no metric {name}",
                    key=f"checkpoint.keep_best.{key}",
                    hint=f"Its metrics are {', '.join(metrics)}",
                    code="unknown_metric",
                )
        self.wait()
        target = self.folder / f"step-{step:08d}"
        if self.saved != target:
            return

        def mark() -> None:
            with disk_errors(self.folder, 0):
                if mark_if_best(target, keep, metrics):
                    print(f"best checkpoint: {target.name}, {keep.metric} {metrics[keep.metric]:.4g}", flush=True)
                link_best(self.folder)

        try:
            collectives.run_on_rank0_and_broadcast(mark)
        except UserError as error:
            self._failed(error)

    def restore_best(self) -> int | None:
        """Restores the best checkpoint by `keep_best`, for what follows the last step.

        Returns:
            Its step; None: nothing was restored, as there is none or it is corrupt, which is reported.
        """
        self.wait()

        def find() -> str | None:
            problems = verify(self.best) if self.best else []
            if problems:
                print(f"the best checkpoint, {self.best}, is corrupt: {'; '.join(problems)}", flush=True)
            return str(self.best) if self.best and not problems else None

        found = collectives.run_on_rank0_and_broadcast(find)
        if found is None:
            return None
        self.saved = Path(found)
        return self._restore(self.saved)

    @property
    def best(self) -> Path | None:
        """The best checkpoint by `keep_best`, by what is on the disk; None: there is none."""
        best = best_checkpoint(self.folder)
        return best and self.folder / best["checkpoint"]

    def _find(self) -> str | None:
        path, skipped = find_checkpoint(self.folder.parent, self.options.resume)
        self._corrupt |= set(skipped)
        return path and str(path)

    def _restore(self, path: Path, max_steps: int | None = None) -> int:
        parts = {"model": self.model, "optimizer": self.optimizer, "tokenizer": self.tokenizer, "state": self.state}
        return restore_checkpoint(path, **parts, max_steps=max_steps)

    def _flat_state(self) -> tuple[dict, dict[str, Tensor]]:
        return flatten_state({name: obj.state_dict() for name, obj in self.state.items()})

    def _failed(self, error: BaseException) -> None:
        if self.options.on_save_error == "stop" or not isinstance(error, UserError):
            raise error
        self._unsaved = error
        print(f"not saved, training continues (on_save_error=continue): {error}", flush=True)

    def _begin(self, target: Path, hidden: Path, needed: int) -> bool:
        """Prepares a save on rank 0. Returns whether the checkpoint is there already."""
        with disk_errors(self.folder, needed):
            if target.exists() and self._is_saved(target):
                return True
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_left_overs()
            if shutil.disk_usage(self.folder).free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            try:
                hidden.mkdir()
                if not self._companions:
                    # Once, and not by the thread, for which the parameters may be unsharded and of another dtype.
                    write_hf_config(self.model, hidden, self.tokenizer)
                    written = [file for file in hidden.rglob("*") if file.is_file()]
                    self._companions = {str(file.relative_to(hidden)): file.read_bytes() for file in written}
            except BaseException:
                shutil.rmtree(hidden, ignore_errors=True)
                raise
        return False

    def _write(self, job: Save) -> None:
        """Writes a checkpoint, here or in the thread; a failure is kept for `wait`."""
        try:
            write_checkpoint(job, self._group)
            collectives.run_on_rank0_and_broadcast(lambda: self._record(job), self._group)
        except BaseException as error:
            self._error = error

    def _record(self, job: Save) -> None:
        self._ours.add(job.target)
        self._corrupt.discard(job.target)
        with disk_errors(self.folder, job.needed):
            self._prune(job.step)

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
        past = [path for path in list_checkpoints(self.folder) if step_of(path) <= step]
        kept = [path for path in past if path not in self._corrupt and not verify(path, checksums=False)]
        kept = kept[-self.options.keep_last :]
        if self.options.keep_best and (best := best_checkpoint(self.folder)):
            kept.append(self.folder / best["checkpoint"])
        for path in past:
            if path not in kept:
                os.rename(path, self.folder / f"{HIDDEN}{path.name}")
        for path in self.folder.glob(f"{HIDDEN}*"):
            shutil.rmtree(path, ignore_errors=True)
        link_best(self.folder)  # its checkpoint may be gone

    def _remove_left_overs(self) -> None:
        """Removes what a dead save or prune left. Only saving does it: a reader would hit a run's save."""
        for path in self.folder.glob(f"{HIDDEN}*"):
            path.unlink() if path.is_symlink() else shutil.rmtree(path)
