"""Checkpoints that survive a power cut: a Hugging Face model folder and a point to resume from, in one.

1. A checkpoint is written into a hidden folder, every file is flushed to the disk, and `manifest.json` with the size
   and checksum of each comes last. Then the folder is renamed: it is there whole, or not at all.
2. Older checkpoints are removed only after that, each by renaming it to a hidden name first.
3. Resuming takes the newest checkpoint whose files are all as the manifest says, and says which ones it passes over.
4. Nothing is pickled: tensors are safetensors, the rest is JSON and text.
"""

import errno
import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from torchrecipes.errors import UserError
from torchrecipes.models import load_hf, save_hf
from torchrecipes.training.manifest import fsync, verify, write_manifest
from torchrecipes.training.optimizer_state import flatten_optimizer, unflatten_optimizer

__all__ = ["Checkpoint", "Checkpointer", "check_same_data", "verify"]
HIDDEN = ".incomplete-"  # before the name of a folder that is being written or removed


class Checkpointer:
    """Saves and finds the checkpoints of one run, in `<output_dir>/checkpoints/step-00001000` and so on.

    Args:
        output_dir: the run's folder.
        keep_last: how many checkpoints stay.
    """

    def __init__(self, output_dir: str | Path, keep_last: int = 3):
        if keep_last < 1:
            raise UserError(
                f"keep_last is {keep_last}; keep at least 1 checkpoint, or there is nothing to resume from."
            )
        self.folder, self.keep_last = Path(output_dir) / "checkpoints", keep_last
        self._ours: set[Path] = set()  # saved by this object, or resumed from
        self._damaged: set[Path] = set()  # passed over by it

    def save(
        self,
        step: int,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        tokenizer,
        state: dict,
        config_yaml: str,
        recipe_text: str,
    ) -> Path:
        """Writes the checkpoint of `step`, then removes those beyond `keep_last`.

        Args:
            step: optimizer steps done.
            model, optimizer, tokenizer: what is saved; `optimizer` by the model's parameter names.
            state: more that the recipe wants back, JSON values.
            config_yaml, recipe_text: kept beside, so that the run can be repeated.

        Returns:
            The checkpoint's folder. One that this object saved already, or resumed from, is left as it is; a damaged
            one is replaced.

        Raises:
            UserError: the disk is full or the folder cannot be written, older checkpoints are untouched; or another
                run's checkpoint of this step is there.
        """
        target = self.folder / f"step-{step:08d}"
        hidden = self.folder / f"{HIDDEN}{target.name}"
        tensors, optimizer_state = flatten_optimizer(optimizer, model)
        needed = sum(t.nbytes for t in (*tensors.values(), *model.parameters()))
        with _disk_errors(self.folder, needed):
            if target.exists() and self._is_saved(target):
                return target
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_left_overs()
            try:
                if shutil.disk_usage(self.folder).free < needed:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                save_hf(model, hidden, tokenizer)
                save_file(tensors, hidden / "optimizer.safetensors")
                save_file(_torch_rng(), hidden / "rng.safetensors")
                rng = {"python": random.getstate(), "numpy": _numpy_rng()}
                stored = {"step": step, "state": state, "optimizer": optimizer_state, "rng": rng}
                (hidden / "state.json").write_text(json.dumps(stored) + "\n", encoding="utf-8")
                (hidden / "config.yaml").write_text(config_yaml, encoding="utf-8")
                (hidden / "recipe.py").write_text(recipe_text, encoding="utf-8")
                # Who may read the text may read the weights: safetensors would let only the owner.
                for file in hidden.iterdir():
                    file.chmod((hidden / "state.json").stat().st_mode)
                write_manifest(hidden, step)
                if target.exists():
                    os.rename(target, self.folder / f"{HIDDEN}damaged-{target.name}")
                os.rename(hidden, target)
                self._ours.add(target)
                self._damaged.discard(target)
                fsync(self.folder)
                fsync(self.folder.parent)  # which `checkpoints` itself may be new in
            except BaseException:
                shutil.rmtree(hidden, ignore_errors=True)
                raise
            self._prune(step)
        return target

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
        if mode != "auto":
            return self._resume_named(Path(mode))
        found = self._checkpoints()
        for path in reversed(found):
            problems = verify(path)
            if not problems:
                print(f"resuming from {path}", flush=True)
                self._ours.add(path)
                return _open(path)
            self._damaged.add(path)
            print(f"passed over {path}, which is damaged: {'; '.join(problems)}", flush=True)
        if found:
            raise UserError(
                f"every checkpoint in {self.folder} is damaged. Delete that folder to start again from step 1, or give "
                "resume=PATH with a whole checkpoint."
            )
        return None

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

    def _resume_named(self, path: Path) -> "Checkpoint":
        problems = verify(path)
        if problems:
            raise UserError(f"resume: {path} is not a whole checkpoint: {'; '.join(problems)}. Give another one.")
        checkpoint = _open(path)
        newest = max(self._checkpoints(), key=_step, default=None)
        if newest and _step(newest) > checkpoint.step:
            raise UserError(
                f"resume: {path} is of step {checkpoint.step}, and {newest} is newer: going on would mix two runs in "
                "one folder. Give another output_dir=..., or resume=auto to take the newest, or delete the newer ones."
            )
        if path.resolve().parent == self.folder.resolve():
            self._ours.add(self.folder / path.name)
        return checkpoint

    def _checkpoints(self) -> list[Path]:
        """The checkpoints that can be seen, oldest first."""
        names = (path for path in self.folder.glob("step-*") if path.name.removeprefix("step-").isdigit())
        return sorted((path for path in names if path.is_dir()), key=_step)

    def _prune(self, step: int) -> None:
        """Removes all but the newest. Damaged ones do not count, and none stays that `step` has passed."""
        past = [path for path in self._checkpoints() if _step(path) <= step]
        kept = [path for path in past if path not in self._damaged and not verify(path, checksums=False)][
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
        """Sets the model's parameters to the saved ones.

        Raises:
            UserError: the checkpoint is of another model; names what differs.
        """
        with torch.device("cpu"):
            stored = load_hf(self.path)
        _same_network(self.path, stored, model)
        model.load_state_dict(stored.state_dict())

    def load_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Sets the optimizer's state to the saved one. Learning rates and other settings stay those of `optimizer`.

        Raises:
            UserError: the state is of other parameters or another kind of optimizer; names what differs.
        """
        tensors = load_file(self.path / "optimizer.safetensors")
        unflatten_optimizer(tensors, self.optimizer, optimizer, model, str(self.path))

    def restore_rng(self) -> None:
        """Sets the global generators of torch, NumPy and Python, which dropout reads, to where they were."""
        states = load_file(self.path / "rng.safetensors")
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])
        version, internal, gauss = self.rng["python"]
        random.setstate((version, tuple(internal), gauss))
        name, keys, *rest = self.rng["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))


def check_same_data(checkpoint: Checkpoint, corpus, resume: str) -> None:
    """Checks that a run goes on with the corpus that it was started with.

    Args:
        checkpoint: has the corpus' fingerprint as `state["corpus"]`.
        corpus: has `fingerprint` and `folder`.
        resume: the recipe's setting; a path was named on purpose, so there the corpus may be another one.

    Raises:
        UserError: it is another corpus.
    """
    if resume == "auto" and checkpoint.state.get("corpus") != corpus.fingerprint:
        raise UserError(
            f"{corpus.folder} is not the corpus that {checkpoint.path} was trained on: its order would be another one. "
            f"Bring the old corpus back, or go on on purpose: resume={checkpoint.path} output_dir=OTHER."
        )


def _open(path: Path) -> Checkpoint:
    stored = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return Checkpoint(path, stored["step"], stored["state"], stored["optimizer"], stored["rng"])


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _torch_rng() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _numpy_rng() -> list:
    name, keys, *rest = np.random.get_state()
    return [name, keys.tolist(), *rest]


def _same_network(path: Path, stored_model: nn.Module, model: nn.Module) -> None:
    stored, ours = stored_model.state_dict(), model.state_dict()
    problems = [f"{name} is not in the checkpoint" for name in ours if name not in stored]
    problems += [f"{name} is not in this model" for name in stored if name not in ours]
    problems += [
        f"{name} is {list(stored[name].shape)} there and {list(ours[name].shape)} here"
        for name in ours
        if name in stored and stored[name].shape != ours[name].shape
    ]
    # The same shapes can be another network: other heads, another rope_theta. What only training uses may change.
    if not problems and type(stored_model) is type(model):
        there, here = asdict(stored_model.config), asdict(model.config)
        may_change = (
            "initializer_range",
            "max_position_embeddings",
            "hidden_dropout_prob",
            "attention_probs_dropout_prob",
        )
        problems = [
            f"{key} is {there[key]} there and {here[key]} here"
            for key in here
            if key not in may_change and there[key] != here[key]
        ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise UserError(f"{path} is a checkpoint of another model: {shown}. Give the settings it was trained with.")


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
