"""A GPU that is not there: tensors on a device `fakegpu`, computed on the CPU, with the limits of Apple's `mps`.

PyTorch's device for backends in Python (PrivateUse1) gives it autograd and autocast. Every operation goes through
`FakeGPU`, which refuses what fails, or is silently wrong, on a real one: float64, tensors of two devices, copies that
do not wait, `found_inf`. It changes PyTorch for the whole process, so tests run it in one of their own (`tests.ranks`):

    python tests/fake_gpu.py RECIPE CONFIG KEY=VALUE ...  # runs the recipe on it, and resumes it from its first step
"""

import shutil
import sys
from pathlib import Path

import torch
import torch.utils.backend_registration as backend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

MIXES_DEVICES = ("copy_", "_to_copy", "index.", "index_put", "_index_put_impl_")  # with tensors of the CPU


class Module(backend._DummyBackendModule):
    """What `torch.fakegpu` is; its generator is that of the CPU."""

    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]

    def current_device(self):
        return 0

    def device_count(self):
        return 1

    def is_available(self):
        return False  # or distributed checkpointing asks for its streams

    def synchronize(self, device=None):
        pass

    def _is_in_bad_fork(self):
        return False

    def manual_seed_all(self, seed):
        pass


class OnGPU(torch.Tensor):
    """A tensor on `fakegpu`; `cpu` holds its values."""

    @staticmethod
    def __new__(cls, cpu):
        if cpu.dtype == torch.float64:
            raise TypeError("there is no float64 on this device")
        options = {"dtype": cpu.dtype, "device": "fakegpu:0", "strides": cpu.stride()}
        tensor = torch.Tensor._make_wrapper_subclass(cls, cpu.shape, storage_offset=cpu.storage_offset(), **options)
        tensor.cpu_tensor = cpu
        return tensor

    def tolist(self):
        return self.cpu_tensor.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


class FakeGPU(TorchDispatchMode):
    """Makes tensors on `fakegpu`, and computes with them."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        is_new = device is not None and torch.device(device).type == "fakegpu"
        if is_new or any(isinstance(x, OnGPU) for x in tree_leaves((args, kwargs))):
            return compute(function, args, kwargs)
        return function(*args, **kwargs)


def compute(function, args, kwargs):
    name = function.__name__
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    moves = name.startswith(MIXES_DEVICES)
    if any(x.device.type == "cpu" and x.dim() for x in tensors) and not moves:
        devices = [(str(x.device), list(x.shape)) for x in tensors]
        raise RuntimeError(f"{name}: tensors on two devices: {devices}")
    if moves and (kwargs.get("non_blocking") or (name.startswith("copy_") and args[2:] and args[2])):
        raise RuntimeError(f"{name} does not wait")
    if kwargs.get("found_inf") is not None:
        raise RuntimeError(f"{name} ignores found_inf")
    if "scaled_dot_product" in name or "flex_attention" in name:
        raise RuntimeError(f"{name} is not right on this device")
    device = kwargs.get("device")
    to_cpu = device is not None and torch.device(device).type == "cpu"
    here = kwargs | ({"device": torch.device("cpu")} if device is not None else {})
    out = function(*tree_map(_unwrap, args), **tree_map(_unwrap, here))
    if name.startswith("copy_"):
        return args[0]
    if to_cpu or name.startswith("_local_scalar_dense"):
        return out
    known = {id(x.cpu_tensor): x for x in tensors if isinstance(x, OnGPU)}  # what an operation in place returns

    def wrap(x):
        if not isinstance(x, torch.Tensor):
            return x
        return known[id(x)] if id(x) in known else OnGPU(x)

    return tree_map(wrap, out)


def _unwrap(x):
    return x.cpu_tensor if isinstance(x, OnGPU) else x


def run(recipe: str, config: str, settings: list[str]) -> None:
    """Runs a recipe of two steps that saves both, and again from the first: both must end with the same weights."""
    backend._setup_privateuseone_for_python_backend("fakegpu", backend_module=Module())
    from safetensors.torch import load_file

    from torchrecipes.cli.run import load_recipe
    from torchrecipes.config import load
    from torchrecipes.config.catalog import find_recipe
    from torchrecipes.devices import PRESETS
    from torchrecipes.training import run as module

    PRESETS["fakegpu"] = PRESETS["mps"]
    module.choose_device = lambda *_: torch.device("fakegpu:0")
    path = find_recipe(recipe)
    main = load_recipe(path)
    folder = Path("run")
    last = folder / "checkpoints" / "step-00000002"
    ends = []
    with FakeGPU():
        for _ in range(2):
            shutil.rmtree(last, ignore_errors=True)
            main.main(load(main.Config, Path(config), [f"output_dir={folder}", *settings], recipe=path))
            ends.append(load_file(last / "model.safetensors"))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    run(sys.argv[1], sys.argv[2], sys.argv[3:])
