"""Checkpoints that survive a power cut: a Hugging Face model folder and a point to resume from, in one.

1. A checkpoint is written into a hidden folder, every file is flushed to the disk, and `manifest.json` with the size
   and checksum of each comes last. Then the folder is renamed: it is there whole, or not at all.
2. Older checkpoints are removed only after that, each by renaming it to a hidden name first.
3. Resuming takes the newest checkpoint whose files are all as the manifest says, and says which ones it passes over.
4. Nothing is pickled: tensors are safetensors, the rest is JSON and text.
"""

import json
import os
import platform
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from torchrecipes import __version__
from torchrecipes.errors import UserError
from torchrecipes.models import load_hf, save_hf

FORMAT = "torchrecipes-checkpoint-1"
PICKLES = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"}
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
            The checkpoint's folder. One that is there already is left as it is.

        Raises:
            UserError: the disk is full, or the folder cannot be written. Older checkpoints are untouched.
        """
        target = self.folder / f"step-{step:08d}"
        if target.exists():
            return target
        hidden = self.folder / f"{HIDDEN}{target.name}"
        tensors = _flatten(optimizer, model)
        needed = sum(t.nbytes for t in (*tensors.values(), *model.parameters()))
        with _disk_errors(self.folder, needed):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_hidden()
            try:
                if shutil.disk_usage(self.folder).free < needed:
                    raise OSError(28, os.strerror(28))
                save_hf(model, hidden, tokenizer)
                save_file(tensors, hidden / "optimizer.safetensors")
                save_file(_torch_rng(), hidden / "rng.safetensors")
                stored = {"step": step, "state": state, "rng": {"python": random.getstate(), "numpy": _numpy_rng()}}
                (hidden / "state.json").write_text(json.dumps(stored) + "\n", encoding="utf-8")
                (hidden / "config.yaml").write_text(config_yaml, encoding="utf-8")
                (hidden / "recipe.py").write_text(recipe_text, encoding="utf-8")
                _write_manifest(hidden, step)
                os.rename(hidden, target)
                _fsync(self.folder)
            except BaseException:
                shutil.rmtree(hidden, ignore_errors=True)
                raise
            self._prune()
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
            problems = verify(Path(mode))
            if problems:
                raise UserError(f"resume: {mode} is not a whole checkpoint: {'; '.join(problems)}. Give another one.")
            return _open(Path(mode))
        found = self._checkpoints()
        for path in reversed(found):
            problems = verify(path)
            if not problems:
                print(f"resuming from {path}", flush=True)
                return _open(path)
            print(f"passed over {path}, which is damaged: {'; '.join(problems)}", flush=True)
        if found:
            raise UserError(
                f"every checkpoint in {self.folder} is damaged. Delete that folder to start again from step 1, or give "
                "resume=PATH with a whole checkpoint."
            )
        return None

    def _checkpoints(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if path.name.removeprefix("step-").isdigit())

    def _prune(self) -> None:
        for path in self._checkpoints()[: -self.keep_last]:
            hidden = self.folder / f"{HIDDEN}{path.name}"
            os.rename(path, hidden)
            shutil.rmtree(hidden, ignore_errors=True)

    def _remove_hidden(self) -> None:
        for path in self.folder.glob(f"{HIDDEN}*"):
            shutil.rmtree(path)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint.

    Attributes:
        path: its folder.
        step: optimizer steps done.
        state: what the recipe gave to `save`.
    """

    path: Path
    step: int
    state: dict
    rng: dict

    def load_model(self, model: nn.Module) -> None:
        """Sets the model's parameters to the saved ones.

        Raises:
            UserError: the checkpoint is of another model; names what differs.
        """
        with torch.device("cpu"):
            stored = load_hf(self.path).state_dict()
        _same_names(self.path, stored, model.state_dict())
        model.load_state_dict(stored)

    def load_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Sets the optimizer's state to the saved one. Learning rates and other settings stay those of `optimizer`.

        Raises:
            UserError: the state is of another model or another kind of optimizer.
        """
        names = _parameter_names(optimizer, model)
        states: dict[str, dict[str, Tensor]] = {name: {} for name in names}
        for key, tensor in load_file(self.path / "optimizer.safetensors").items():
            kind, _, name = key.partition(".")
            if name not in states:
                raise UserError(f"{self.path}: its optimizer has state for {name}, which this run does not train.")
            states[name][kind] = tensor
        current = optimizer.state_dict()
        parameters = dict(model.named_parameters())
        for name, state in states.items():
            for kind, tensor in state.items():
                shape = parameters[name].shape
                state[kind] = tensor.view(()) if tensor.numel() == 1 and tensor.shape != shape else tensor
        missing = [name for name, state in states.items() if not state]
        if missing and len(missing) < len(states):
            raise UserError(f"{self.path}: its optimizer has no state for {', '.join(missing[:5])}.")
        saved = {i: states[name] for i, name in enumerate(names) if states[name]}
        optimizer.load_state_dict({"state": saved, "param_groups": current["param_groups"]})

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


def verify(path: Path) -> list[str]:
    """What is wrong with a checkpoint, file by file; empty when it is whole. Reads every byte."""
    if not path.is_dir():
        return [f"{path} does not exist"]
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        stated = manifest.pop("xxh3")
        if manifest["format"] != FORMAT:
            return [f"manifest.json: its format is {manifest['format']!r}, this version reads {FORMAT!r}"]
        if stated != _digest(manifest):
            return ["manifest.json is damaged"]
        files = manifest["files"]
    except FileNotFoundError:
        return ["manifest.json is missing"]
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return ["manifest.json is damaged"]
    problems = []
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != entry["size"]:
            problems.append(f"{name} has {file.stat().st_size:,} bytes, not {entry['size']:,}")
        elif _checksum(file) != entry["xxh3"]:
            problems.append(f"{name} is damaged (wrong checksum)")
    added = [file.name for file in path.iterdir() if file.suffix.lower() in PICKLES]
    return problems + [f"{name} does not belong there: pickles can run code" for name in sorted(added)]


def _open(path: Path) -> Checkpoint:
    stored = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return Checkpoint(path, stored["step"], stored["state"], stored["rng"])


def _write_manifest(folder: Path, step: int) -> None:
    files = {}
    for file in sorted(folder.iterdir()):
        _fsync(file)
        files[file.name] = {"size": file.stat().st_size, "xxh3": _checksum(file)}
    versions = {"torchrecipes": __version__, "torch": torch.__version__, "python": platform.python_version()}
    manifest = {"format": FORMAT, "step": step, "versions": versions, "files": files}
    manifest["xxh3"] = _digest(manifest)
    # No newline behind it: every byte counts, so that a truncated manifest is none.
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    _fsync(folder / "manifest.json")
    _fsync(folder)


def _digest(manifest: dict) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())


def _checksum(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _parameter_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """The names of the optimizer's parameters, in the order in which its state_dict numbers them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _flatten(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's tensors as `<kind>.<parameter>`; one without dimensions gets one."""
    names, states = _parameter_names(optimizer, model), optimizer.state_dict()["state"]
    return {
        f"{kind}.{names[i]}": torch.as_tensor(value).detach().reshape(torch.as_tensor(value).shape or (1,)).contiguous()
        for i, state in states.items()
        for kind, value in state.items()
        if value is not None
    }


def _torch_rng() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _numpy_rng() -> list:
    name, keys, *rest = np.random.get_state()
    return [name, keys.tolist(), *rest]


def _same_names(path: Path, stored: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    problems = [f"{name} is not in the checkpoint" for name in ours if name not in stored]
    problems += [f"{name} is not in this model" for name in stored if name not in ours]
    problems += [
        f"{name} is {list(stored[name].shape)} there and {list(ours[name].shape)} here"
        for name in ours
        if name in stored and stored[name].shape != ours[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise UserError(f"{path} is a checkpoint of another model: {shown}. Give the settings it was trained with.")


@contextmanager
def _disk_errors(folder: Path, needed: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(there).free
        raise UserError(
            f"cannot save in {folder}: {error.strerror or error}. A checkpoint takes about {needed / 2**20:,.0f} MiB, "
            f"and {free / 2**20:,.0f} MiB are free. Make room, or lower keep_last: the run goes on from the last one."
        ) from error
