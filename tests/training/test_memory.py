import subprocess
import sys

import pytest
import torch
from torch import nn

from torchrecipes.errors import UserError
from torchrecipes.training.memory import checkpoint_activations, out_of_memory_advice


def blocks():
    torch.manual_seed(0)
    return nn.ModuleList(nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8)) for _ in range(3))


def run(layers, x):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        out = x
        for layer in layers:
            out = layer(out)
    out.pow(2).sum().backward()
    return sum(saved), [p.grad.clone() for p in layers.parameters()]


def test_gradients_are_the_same_and_less_is_kept():
    x = torch.randn(32, 8, requires_grad=True)
    kept, gradients = run(blocks(), x)
    layers = blocks()
    names = [name for name, _ in layers.named_parameters()]
    checkpoint_activations(layers)
    kept_less, same_gradients = run(layers, x)
    assert kept_less < kept / 4
    assert [name for name, _ in layers.named_parameters()] == names
    for gradient, same in zip(gradients, same_gradients, strict=True):
        assert torch.equal(gradient, same)


@pytest.mark.parametrize(("rows", "advice"), [(8, "rows_per_micro_batch=4"), (1, "smaller seq_len")])
def test_out_of_memory_names_the_setting_to_lower(rows, advice):
    with pytest.raises(UserError, match=advice), out_of_memory_advice(rows):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_other_errors_pass():
    with pytest.raises(KeyError), out_of_memory_advice(8):
        raise KeyError("x")


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_is_used_again_without_new_pages():
    script = """
import resource, sys, torch
from torchrecipes.training.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(30):  # the heap settles
    torch.ones(64 * 2**18)  # 64 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(64 * 2**18)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {
        way: int(subprocess.run([sys.executable, "-c", script, way], capture_output=True, text=True, check=True).stdout)
        for way in ("keep", "give back")
    }
    assert faults["keep"] < 100 < faults["give back"]
