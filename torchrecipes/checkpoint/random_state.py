"""The global random generators of Python, NumPy and torch, of every rank, as JSON and tensors."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrecipes.devices import accelerator_in_use, rng_state, set_rng_state
from torchrecipes.distributed import collectives


def random_state() -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The state of all ranks' generators, on every rank.

    Returns:
        By rank, what JSON holds: Python's and NumPy's. And torch's as `cpu.<rank>`, and on GPUs as `cuda.<rank>` or
        `mps.<rank>`.
    """
    name, keys, *rest = np.random.get_state()
    mine = {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest], "cpu": torch.get_rng_state().tolist()}
    device = accelerator_in_use()
    if (own := rng_state(device)) is not None:
        mine[device.type] = own.tolist()
    ranks = collectives.all_gather_object(mine)
    tensors = {
        f"{device}.{rank}": torch.tensor(state.pop(device), dtype=torch.uint8)
        for rank, state in enumerate(ranks)
        for device in ("cpu", "cuda", "mps")
        if device in state
    }
    return ranks, tensors


def restore_random_state(ranks: list[dict[str, Any]], tensors: dict[str, Tensor], step: int) -> None:
    """Sets this rank's generators to what `random_state` gave.

    A rank that the saved run did not have begins with a seed of (step, rank).
    """
    rank = collectives.rank()
    if rank >= len(ranks):
        seed = step << 20 | rank
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        return
    version, internal, gauss = ranks[rank]["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = ranks[rank]["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(tensors[f"cpu.{rank}"])
    device = accelerator_in_use()
    set_rng_state(tensors.get(f"{device.type}.{rank}") if device.type != "cpu" else None, device)
