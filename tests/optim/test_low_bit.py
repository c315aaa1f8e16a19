import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from torchrecipes import torchao_import
from torchrecipes.errors import UserError
from torchrecipes.models import neobert
from torchrecipes.optim import adamw, adamw_4bit, adamw_8bit, linear

BOTH = pytest.mark.parametrize("make", [adamw_8bit, adamw_4bit])
SETTINGS = {"betas": (0.8, 0.95), "eps": 1e-6}


def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(64, 128), nn.Linear(128, 64), nn.LayerNorm(64), nn.Linear(64, 128))
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    return net


def reference(parameter, gradients, lrs, betas, eps, weight_decay):
    """Algorithm 2 of arXiv:1711.05101, in float64."""
    p = parameter.double()
    m = v = torch.zeros_like(p)
    for step, (gradient, lr) in enumerate(zip(gradients, lrs, strict=True), start=1):
        m = betas[0] * m + (1 - betas[0]) * gradient.double()
        v = betas[1] * v + (1 - betas[1]) * gradient.double() ** 2
        p = p - lr * weight_decay * p
        p = p - lr * (m / (1 - betas[0] ** step)) / ((v / (1 - betas[1] ** step)).sqrt() + eps)
    return p


def displacement_errors(make):
    """How far each parameter is from where float64 brings it in 8 steps, relative to its way there."""
    net = model()
    optimizer = make(net, lr=0.01, weight_decay=0.3, **SETTINGS)
    scheduler = linear(optimizer, 8, warmup_steps=3)
    lrs = []
    start = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    gradients = {name: [] for name in start}
    for _ in range(8):
        lrs.append(float(optimizer.param_groups[0]["lr"]))
        for name, parameter in net.named_parameters():
            parameter.grad = torch.randn_like(parameter) + 0.5
            gradients[name].append(parameter.grad)
        optimizer.step()
        scheduler.step()
    errors = {}
    for name, parameter in net.named_parameters():
        decay = 0.3 if name in ("1.weight", "3.weight") else 0.0
        moved = reference(start[name], gradients[name], lrs, **SETTINGS, weight_decay=decay) - start[name]
        errors[name] = ((parameter.detach() - start[name] - moved).norm() / moved.norm()).item()
    return errors


@pytest.mark.parametrize(("make", "tolerance"), [(adamw_8bit, 0.015), (adamw_4bit, 0.2)])
def test_steps_are_those_of_adamw_to_the_precision_of_the_averages(make, tolerance):
    errors = displacement_errors(make)
    for name in ("0.weight", "1.weight", "3.weight"):
        assert 1e-4 < errors.pop(name) < tolerance
    assert max(errors.values()) < 1e-5  # small ones keep averages of fp32


def test_a_model_learns():
    def last_loss(make):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(64, 128), nn.Linear(128, 64), nn.LayerNorm(64), nn.Linear(64, 128))
        tokens = torch.arange(64)
        optimizer = make(net, lr=3e-3)
        for _ in range(40):
            loss = nn.functional.cross_entropy(net(tokens), tokens.roll(1))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    exact = last_loss(adamw)
    assert exact < 0.05  # from 4.2
    assert last_loss(adamw_8bit) < 1.1 * exact
    assert last_loss(adamw_4bit) < 0.3  # coarse averages learn more slowly


def state_bytes(optimizer):
    def size(state):
        return (
            sum(size(getattr(state, part)) for part in ("codes", "scale")) if hasattr(state, "codes") else state.nbytes
        )

    return sum(size(state[kind]) for state in optimizer.state.values() for kind in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize(("make", "bytes_per_value"), [(adamw_8bit, 2 + 8 / 64), (adamw_4bit, 1 + 8 / 64)])
def test_what_the_averages_take(make, bytes_per_value):
    net = nn.Linear(128, 64, bias=False)
    optimizer = make(net, block_size=64)
    net.weight.grad = torch.ones_like(net.weight)
    optimizer.step()
    assert state_bytes(optimizer) == bytes_per_value * net.weight.numel()


def test_the_page_says_what_the_averages_take():
    page = (Path(__file__).parents[2] / "docs/precision-and-memory.md").read_text(encoding="utf-8")
    with torch.device("meta"):
        sizes = [parameter.numel() for parameter in neobert("base").parameters()]

    def average(size, code, block_size):
        return size * code + size / block_size * 4 if size >= 4096 and size % block_size == 0 else size * 4

    for name, code, block_size in (("adamw", 4, math.inf), ("adamw_8bit", 1, 256), ("adamw_4bit", 0.5, 128)):
        total = 2 * sum(average(size, code, block_size) for size in sizes)
        assert f"| `{name}` | {total / sum(sizes):.2f} | {total / 2**30:.2f} GiB |" in page
    assert f"NeoBERT base ({sum(sizes):,} parameters)" in page


@BOTH
def test_nothing_is_compiled_on_a_cpu(make, monkeypatch):
    def fail(*_):
        raise AssertionError("compiled")

    monkeypatch.setattr(torch._dynamo.eval_frame, "lookup_backend", lambda _: fail, raising=False)
    displacement_errors(make)


@pytest.mark.filterwarnings("ignore")  # torch's own, of its compiler
@BOTH
def test_a_schedule_compiles_nothing_anew(make, monkeypatch):
    """The step of parameters on a GPU, here with a compiler that counts and changes nothing."""
    compiled = Counter()
    compile_step = torch.compile

    def count(graph, _inputs):
        compiled[make] += 1
        return graph

    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compile_step(*args, **kwargs, backend=count))
    torch.compiler.reset()
    net = model()
    optimizer = make(net)
    scheduler = linear(optimizer, 5)
    counts = []
    for _ in range(5):
        for parameter in net.parameters():
            parameter.grad = torch.randn_like(parameter)
        type(optimizer).step(optimizer)
        scheduler.step()
        counts.append(compiled[make])
    assert counts == [counts[0]] * 5
    assert 3 <= counts[0] <= 6  # at most one per parameter


@BOTH
def test_defaults_and_what_groups_remember(make):
    optimizer = make(nn.Linear(3, 3), lr=2e-3, betas=[0.9, 0.95])  # a list, as YAML gives it
    assert [float(g["lr"]) for g in optimizer.param_groups] == pytest.approx([2e-3, 2e-3])
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.01, 0]
    assert [g["param_names"] for g in optimizer.param_groups] == [["weight"], ["bias"]]
    assert all(g["betas"] == (0.9, 0.95) and g["eps"] == 1e-8 for g in optimizer.param_groups)
    linear(optimizer, 4, warmup_steps=2)
    assert [g["lr"].item() for g in optimizer.param_groups] == pytest.approx([1e-3, 1e-3])


@BOTH
def test_wrong_values_are_all_named(make):
    with pytest.raises(UserError) as error:
        make(nn.Linear(3, 3), lr=-1.0, block_size=7)
    assert sorted(problem.key for problem in error.value.problems) == ["block_size", "lr"]


def test_without_torchao_the_error_says_how_to_install_it(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name=name.partition(".")[0])

    monkeypatch.setattr(torchao_import.importlib, "import_module", missing)
    with pytest.raises(UserError) as error:
        adamw_8bit(nn.Linear(3, 3))
    assert error.value.code == "missing_package" and "torchrecipes[torchao]" in str(error.value)


@BOTH
def test_torch_schedulers_take_it(make):
    net = nn.Linear(3, 3)
    optimizer = make(net, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, 2)
    net(torch.ones(3)).sum().backward()
    optimizer.step()
    scheduler.step()
    assert [g["lr"].item() for g in optimizer.param_groups] == pytest.approx([7.5e-3, 7.5e-3])


def test_the_import_prints_nothing():
    script = "from torch import nn; from torchrecipes.optim import adamw_8bit; adamw_8bit(nn.Linear(2, 2))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
