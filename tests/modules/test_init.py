import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchrecipes.modules import SwiGLU, init, init_tensor, init_weights
from torchrecipes.modules.init import BLOCK


class Two(nn.Module):
    def __init__(self, extra=False):
        super().__init__()
        if extra:
            self.extra = nn.Linear(4, 4)
        self.mlp = SwiGLU(48, 30)
        self.norm = nn.LayerNorm(48)


def test_values_depend_on_seed_and_name_alone():
    torch.manual_seed(1)
    first, second, other = Two(), Two(extra=True), Two()
    for model, seed in ((first, 5), (second, 5), (other, 6)):
        init_weights(model, seed=seed, std=0.02)
    assert torch.equal(first.mlp.down_proj.weight, second.mlp.down_proj.weight)
    assert not torch.equal(first.mlp.down_proj.weight, other.mlp.down_proj.weight)
    assert first.mlp.gate_up_proj.weight.flatten()[:100].tolist() != first.mlp.down_proj.weight.flatten()[:100].tolist()


def test_kinds_of_parameters():
    assert init_tensor("norm.weight", (5,), seed=0, std=0.02).tolist() == [1.0] * 5
    assert init_tensor("norm.bias", (5,), seed=0, std=0.02).tolist() == [0.0] * 5
    value = init_tensor("experts.weight", (4, 300, 200), seed=0, std=0.02)
    assert abs(value.mean().item()) < 1e-4
    assert abs(value.std().item() - 0.02) < 1e-4


class CountDrawn(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.normal_.default:
            self.elements += args[0].numel()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(1000, 300), (7, 60, 50), (3, BLOCK + 5), (40, 3)])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_the_parts_of_all_ranks_are_the_whole_and_each_draws_about_its_own(shape, ranks):
    whole = init_tensor("weight", shape, seed=4, std=0.1)
    size = -(-shape[0] // ranks)
    parts = []
    for rank in range(ranks):
        rows = min(rank * size, shape[0]), min((rank + 1) * size, shape[0])
        with CountDrawn() as drawn:
            parts.append(init_tensor("weight", shape, seed=4, std=0.1, rows=rows))
        assert drawn.elements <= parts[-1].numel() + 2 * BLOCK
    assert torch.equal(torch.cat(parts), whole)


def test_blocks_differ():
    value = init_tensor("weight", (4, BLOCK), seed=0, std=1.0)
    assert torch.corrcoef(value).fill_diagonal_(0).abs().max() < 6 * BLOCK**-0.5


def test_projections_into_the_residual_stream_have_a_deviation_of_their_own():
    model = Two()
    model.experts = nn.Module()
    model.experts.down_proj = nn.Parameter(torch.empty(3, 40, 40))
    model.experts.register_buffer("bias", torch.full((3,), 5.0))
    init_weights(model, seed=1, std=0.02, residual_std=0.005)
    assert abs(model.mlp.gate_up_proj.weight.std().item() - 0.02) < 1e-3
    assert abs(model.mlp.down_proj.weight.std().item() - 0.005) < 3e-4
    assert abs(model.experts.down_proj.std().item() - 0.005) < 3e-4
    assert model.experts.bias.tolist() == [0.0] * 3


def test_meta_parameters_stay():
    with torch.device("meta"):
        model = Two()
    init_weights(model, seed=0, std=0.02)
    assert all(parameter.is_meta for parameter in model.parameters())


def _sharded(rank, store, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    init.BLOCK = 200
    with torch.device("meta"):
        model = Two()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    model.to_empty(device="cpu")
    with CountDrawn() as drawn:
        init_weights(model, seed=5, std=0.02)
    assert drawn.elements < 0.7 * sum(parameter.numel() for parameter in model.parameters())
    state = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
    if rank == 0:
        torch.save(state, results)
    dist.destroy_process_group()


def test_a_sharded_model_starts_from_the_same_values(tmp_path, monkeypatch):
    monkeypatch.setattr(init, "BLOCK", 200)
    mp.start_processes(_sharded, (tmp_path / "store", tmp_path / "results"), nprocs=2, start_method="spawn")
    whole = Two()
    init_weights(whole, seed=5, std=0.02)
    state = torch.load(tmp_path / "results", weights_only=True)
    assert set(state) == set(dict(whole.named_parameters()))
    for name, parameter in whole.named_parameters():
        assert torch.equal(state[name], parameter)


def test_values_do_not_depend_on_the_default_device():
    with torch.device("meta"):
        shapes = {"weight": (2, 2), "norm.weight": (2,), "norm.bias": (2,)}
        values = [init_tensor(name, shape, seed=0, std=1.0) for name, shape in shapes.items()]
    assert [value.device.type for value in values] == ["cpu"] * 3
