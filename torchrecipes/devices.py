"""Devices: the one that a process computes on, and what differs between them.

|                           | `cuda`                    | `cpu`                      | `mps` (Apple silicon) |
|---------------------------|---------------------------|----------------------------|-----------------------|
| `compute.precision: auto` | bf16; fp16 before Ampere  | bf16 with instructions for it, else fp32 | fp32    |
| batches                   | pinned, copied meanwhile  | as they are                | copied, then used     |
| attention                 | block masks, cuDNN, flash | by length, regrouped       | products and a mask   |
| a skipped step            | decided on the device     | at once                    | after a wait          |
| sums in float64           | on the device             | at once                    | on the CPU            |
| `compute.compile`         | yes                       | yes                        | refused               |
| processes                 | any number                | any number                 | one                   |

Why `mps` is treated so, with PyTorch's issues: copies with `non_blocking=True` may read memory that is used again
(#139550, #189690); fused Adam ignores `found_inf` (#186360, fixed in June 2026); `scaled_dot_product_attention` was
wrong for queries that are not contiguous (#181133) and for masks that heads share (#184180); Metal has no float64. The
GPU multiplies fp16 and fp32 at the same rate (github.com/philipturner/metal-benchmarks), so fp32 costs memory only.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from torchrecipes.errors import UserError
from torchrecipes.estimation import kernel_device

DEVICES = ("auto", "cpu", "cuda", "mps")
# Before, `mps` had wrong gradients of SiLU, sigmoid and tanh for tensors that are not contiguous (pytorch #175188).
MPS_TORCH = "2.13"


class Preset(NamedTuple):
    """What a kind of device can do.

    Attributes:
        copies_async: the loader pins batches, and they are copied while the device computes.
        found_inf: the kernels of fused Adam and AdamW skip their update where `found_inf` is 1.
        float64: there are tensors in float64.
        compiles: `torch.compile` is used and tested.
        distributed: several processes can train together.
    """

    copies_async: bool
    found_inf: bool
    float64: bool
    compiles: bool
    distributed: bool


PRESETS = {
    "cuda": Preset(copies_async=True, found_inf=True, float64=True, compiles=True, distributed=True),
    "cpu": Preset(copies_async=False, found_inf=True, float64=True, compiles=True, distributed=True),
    "mps": Preset(copies_async=False, found_inf=False, float64=False, compiles=False, distributed=False),
}


def preset(device: torch.device | str) -> Preset:
    """What `device` can do; one of another kind as much as a CPU."""
    return PRESETS.get(kernel_device(torch.device(device)), PRESETS["cpu"])


def choose_device(name: str = "auto", index: int = 0) -> torch.device:
    """The device of a process.

    Args:
        name: `cpu`, `cuda`, `mps`, one with a number such as `cuda:1`, or `auto`: CUDA where there is a GPU, else `mps`
            on Apple silicon with torch 2.13 or later, else the CPU.
        index: the number of the GPU where `name` has none; it need not exist.

    Raises:
        UserError: this machine has no such device (code `no_device`), or its torch is too old for it (`old_torch`).
    """
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    is_new = TorchVersion(torch.__version__) >= MPS_TORCH
    if name == "auto":
        name = "cuda" if has_cuda else "mps" if has_mps and is_new else "cpu"
    if name == "cuda" and has_cuda:
        return torch.device("cuda", index)
    try:
        device = torch.device(name)
        if device.type == "mps" and has_mps and not is_new:
            raise UserError(
                f"torch {torch.__version__} computes wrong gradients on mps",
                hint=f"Install torch {MPS_TORCH} or later, or use the CPU.",
                code="old_torch",
            )
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        is_missing = name.partition(":")[0] == "mps" and not has_mps  # where torch names an operator and a backend
        reason = "torch finds no Apple GPU" if is_missing else str(error).splitlines()[0]
        known = ["cpu", *["cuda"] * has_cuda, *["mps"] * has_mps]
        raise UserError(f"{name}: {reason}", hint=f"This machine has {', '.join(known)}.", code="no_device") from None
    return device


def device_name(device: torch.device) -> str:
    """Its name for people: of a GPU its model, of a CPU the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU (mps)"
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def to_float64(x: Tensor) -> Tensor:
    """`x.double()`; of a tensor on a device without float64 a copy on the CPU."""
    return x.double() if preset(x.device).float64 else x.cpu().double()


def float64_device(device: torch.device) -> torch.device:
    """Where `to_float64` puts what is on `device`."""
    return device if preset(device).float64 else torch.device("cpu")


def rng_state(device: torch.device) -> Tensor | None:
    """The state of the device's own generator; None for a CPU, whose generator is torch's default one."""
    module = torch.get_device_module(device)
    return module.get_rng_state(device) if hasattr(module, "get_rng_state") else None


def set_rng_state(state: Tensor | None, device: torch.device) -> None:
    """Restores what `rng_state` gave."""
    if state is not None:
        torch.get_device_module(device).set_rng_state(state, device)


@contextmanager
def fork_rng(device: torch.device | None = None) -> Iterator[None]:
    """Afterwards the generators of the CPU and of `device` are as they were before.

    Args:
        device: None: the GPU that this process has used.
    """
    device = device or accelerator_in_use()
    cpu, own = torch.get_rng_state(), rng_state(device)
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        set_rng_state(own, device)


def accelerator_in_use() -> torch.device:
    """The GPU that this process has used, or else the CPU."""
    if torch.cuda.is_initialized():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def empty_cache(device: torch.device) -> None:
    """Returns memory that no tensor uses to the system: pieces for other sizes would be in the way."""
    module = torch.get_device_module(device)
    if hasattr(module, "empty_cache"):
        module.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host, has no memory left for a tensor."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    texts = ("DefaultCPUAllocator", "MPS backend out of memory")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
