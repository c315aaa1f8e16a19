"""`FeatureCache`: a frozen encoder's outputs, computed once for every example and kept in the run's folder.

1. A file `features/<key>.npy` holds `[E, D]` float32. The key is a hash of the encoder's weights, of what else decides
   its outputs, and of the examples: a change of any of them makes another file.
2. It is written part by part, each flushed before its end is noted. An interrupted run continues after the last one.
3. Training reads it by memory map.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from torchrecipes.atomic_write import write_atomically
from torchrecipes.data.batching.batch import Batch
from torchrecipes.data.batching.features import FeatureCollator, FeatureRows
from torchrecipes.data.examples.block import ExampleBlock
from torchrecipes.distributed.collectives import rank, run_on_rank0_and_broadcast
from torchrecipes.evaluation.over_examples import map_examples
from torchrecipes.training.run import Run

EXAMPLES_PER_PART = 8192


class FeatureCache:
    """A collator whose batches hold what enters the head, in place of tokens: for a head on a frozen encoder.

        collator = FeatureCache(collator)
        collator.fill(model, [train, *eval_sets], run)  # when the model has its weights

    Frozen parts are in evaluation mode in training, too (`SequenceClassifier.train`): training is the same with and
    without the cache, but for rounding.

    Args:
        collator: makes batches of tokens.
    """

    def __init__(self, collator: Any):
        self.collator = collator
        self.sets: dict[str, FeatureRows] = {}  # by fingerprint

    def fill(self, model: nn.Module, sets: Sequence[Any], run: Run) -> None:
        """Computes the features of all examples that are not in the run's folder; the ranks share the work.

        Files of other weights or examples are removed. The folder must be one that all ranks see.

        Args:
            model: a `SequenceClassifier` with its weights, or another with `features(batch)`.
            sets: `ExampleRows` for training and evaluation.
            run: the processes, the folder and the number format.

        Raises:
            UserError: the classifier has no features of a text (code `no_features`).
        """
        folder, encoder = Path(run.output_dir) / "features", frozen_fingerprint(model, run.dtype)
        keys = [xxhash.xxh3_64_hexdigest(f"{encoder} {rows.corpus.fingerprint}".encode()) for rows in sets]
        run_on_rank0_and_broadcast(lambda: _remove_others(folder, keys))
        for rows, key in zip(sets, keys, strict=True):
            file = folder / f"{key}.npy"
            _compute(file, model, rows, self.collator, run)
            features = torch.from_numpy(np.load(file, mmap_mode="c"))  # copy on write: torch warns of read-only memory
            self.sets[rows.corpus.fingerprint] = FeatureRows(rows, features)
        size = sum(rows.features.nbytes for rows in self.sets.values()) / 2**20
        examples = sum(rows.num_rows for rows in self.sets.values())
        if rank() == 0:
            print(f"features of {examples:,} examples from the frozen encoder: {size:,.1f} MiB in {folder}", flush=True)

    def batch(self, rows: Any, numbers: np.ndarray, keys: np.ndarray, step: int = 1) -> Batch:
        """The features and labels of some examples: see `FeatureCollator`; `rows` is one of the sets."""
        found = self.sets[rows.corpus.fingerprint]
        return FeatureCollator(found).batch(found, numbers, keys, step)


def frozen_fingerprint(model: nn.Module, dtype: torch.dtype) -> str:
    """A hash of what decides a model's features: frozen weights, the encoder's config, pooling, number format.

    Args:
        model: sharded or not; if it is, all ranks call this.
        dtype: what the model computes in.
    """
    settings = f"{dtype} {getattr(model, 'pooling', '')} {getattr(model, 'config', '')}"
    digest = xxhash.xxh3_128(settings.encode())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            continue
        value = parameter.detach()
        value = value.full_tensor() if isinstance(value, DTensor) else value
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class _Part:
    """Some of the examples, one after the other, as `map_examples` needs them."""

    def __init__(self, rows: Any, first: int, end: int):
        self._rows, self._first, self.num_rows = rows, first, end - first
        self.source_names = rows.source_names

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        return self._rows.lengths(numbers + self._first)

    def examples(self, numbers: np.ndarray) -> ExampleBlock:
        return self._rows.examples(numbers + self._first)


def _compute(file: Path, model: nn.Module, rows: Any, collator: Any, run: Run) -> None:
    """Completes the file; returns at once if it is there."""
    partial, note = file.with_suffix(".part"), file.with_suffix(".json")

    def begin() -> int | None:
        if file.exists():
            return None
        file.parent.mkdir(parents=True, exist_ok=True)
        return json.loads(note.read_text())["examples"] if note.exists() and partial.exists() else 0

    done = run_on_rank0_and_broadcast(begin)
    if done is None:
        return
    terminal = sys.stderr.isatty()
    options = {"desc": "features", "unit": " examples", "mininterval": 0.1 if terminal else 15, "leave": False}
    with tqdm(total=rows.num_rows, initial=done, disable=rank() != 0, **options) as bar:
        while done < rows.num_rows:
            end = min(done + EXAMPLES_PER_PART, rows.num_rows)
            part = _Part(rows, done, end)
            features = map_examples(model, model.features, part, collator, autocast=run.autocast)
            run_on_rank0_and_broadcast(lambda: _append(partial, note, features, done, end, rows.num_rows))  # noqa: B023
            bar.update(end - done)
            done = end
    run_on_rank0_and_broadcast(lambda: _finish(partial, note, file))


def _append(partial: Path, note: Path, features: Tensor, done: int, end: int, total: int) -> None:
    with open(partial, "r+b" if done else "wb") as out:
        header = {"descr": "<f4", "fortran_order": False, "shape": (total, *features.shape[1:])}
        np.lib.format.write_array_header_1_0(out, header)
        out.seek(done * features[0].numel() * 4, os.SEEK_CUR)
        out.write(features.numpy().astype("<f4", copy=False).tobytes())
        out.truncate()  # what was written after the last note
        out.flush()
        os.fsync(out.fileno())
    write_atomically(note, [json.dumps({"examples": end}).encode()])


def _finish(partial: Path, note: Path, file: Path) -> None:
    os.replace(partial, file)
    note.unlink()


def _remove_others(folder: Path, keys: Sequence[str]) -> None:
    for file in folder.glob("*"):
        if file.stem not in keys and file.suffix in (".npy", ".part", ".json"):
            file.unlink()
