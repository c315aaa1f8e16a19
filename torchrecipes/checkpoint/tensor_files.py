"""A checkpoint's tensors as safetensors files: unsharded for the model, as they are sharded for the rest."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from torchrecipes.distributed import collectives
from torchrecipes.models.hub import iterate_hf_tensors
from torchrecipes.models.stored_tensors import file_of
from torchrecipes.modules.lora import merged_tensors, without_lora

MODEL_FILE_BYTES = 4 << 30  # a larger model is stored in several files, written by several ranks


def unsharded_files(
    model: nn.Module, state: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """Unsharded tensors of a model, under their Hugging Face names where it has an adapter.

    Args:
        model: has the adapter.
        state: all of the model's tensors, by its own names; LoRA's are merged into the others.

    Returns:
        file -> the tensors that this rank writes into it; and, where there are several files, tensor -> file.
    """
    sizes = {name: tensor.nbytes for name, tensor in without_lora(model, state).items()}
    number_of = dict(zip(sizes, ((np.cumsum(list(sizes.values())) - 1) // MODEL_FILE_BYTES).tolist(), strict=True))
    count = max(number_of.values()) + 1
    files: dict[str, dict[str, Tensor]] = {}
    weight_map, seen = {}, set()
    for name, stored in iterate_hf_tensors(model, merged_tensors(model, state)):
        number = number_of[name]
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
        for key, value in stored.items():
            target, key = file_of(key, file)
            if target == file:
                weight_map[key] = file
            # A file of an inner folder is small; rank 0 writes it.
            if (number if target == file else 0) % collectives.world_size() != collectives.rank():
                continue
            if isinstance(state[name], DTensor):
                value = value.cpu()  # one by one, so that a GPU holds one of them at a time
            view = value.data_ptr(), value.shape
            files.setdefault(target, {})[key] = value.clone() if view in seen else value  # a file has no tied tensors
            seen.add(view)
    return files, weight_map if count > 1 else {}


def save_shards(tensors: dict[str, Tensor], folder: Path, group: dist.ProcessGroup | None) -> list[str]:
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


def load_shards(folder: Path, like: Callable[[str, Any], Tensor]) -> dict[str, Tensor]:
    """Reads what `save_shards` wrote, each tensor into `like(key, metadata)`: a full one, or this rank's shard."""
    return dict(iterate_shards(folder, like))


def iterate_shards(
    folder: Path, like: Callable[[str, Any], Tensor], part_bytes: int = 1 << 28
) -> Iterator[tuple[str, Tensor]]:
    """`load_shards`, (key, tensor) by tensor; no more than about `part_bytes` are in memory for it at a time."""
    if not folder.exists():
        return
    stored = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    part, size = {}, 0
    for number, (key, meta) in enumerate(stored.items(), start=1):
        part[key] = like(key, meta)
        size += meta.size.numel() * meta.properties.dtype.itemsize
        if size >= part_bytes or number == len(stored):
            # Each rank reads what it needs by itself.
            dcp.load(part, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
            while part:
                yield part.popitem()
            size = 0


class HostCopies:
    """Copies of tensors in the CPU's memory, which is allocated once and used again."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}
        self._cpu_meshes: dict[DeviceMesh, DeviceMesh] = {}

    def copy(self, tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """Copies tensors, or this rank's shards of them; from a GPU without waiting for it.

        Args:
            tensors: what to copy.
            prefix: names the memory together with a tensor's name.
        """
        copies = {}
        for name, tensor in tensors.items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            copy = self._memory.get(f"{prefix}/{name}")
            if copy is None or copy.shape != local.shape or copy.dtype != local.dtype:
                copy = torch.empty(local.shape, dtype=local.dtype, pin_memory=torch.cuda.is_available())
                self._memory[f"{prefix}/{name}"] = copy
            copies[name] = copy.copy_(local, non_blocking=local.is_cuda)
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
