"""Muon on several ranks: the update of one process, work that is shared, state that fits any number of ranks."""

import json

import torch
from safetensors.torch import load_file

from tests import ranks

UPDATES = """
import importlib, json, sys, warnings
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torchrecipes.errors import UserError
from torchrecipes.models import llama
from torchrecipes.error_file import hard_exit

module = importlib.import_module("torchrecipes.optim.muon_optimizer")  # the function has the same name
dist.init_process_group("gloo")

class Experts(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.up_proj = nn.Parameter(torch.zeros(experts, 24, 16))
        self.row_splits = {"up_proj": (8, 16)}

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        # Sizes that 2 and 3 ranks do not divide, and a matrix with fewer rows than ranks.
        self.blocks = nn.ModuleList([Experts(5), nn.Linear(17, 23), nn.Linear(6, 1), nn.Linear(16, 8)])
        self.decoder = llama(vocab_size=41, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
                             num_key_value_heads=2, intermediate_size=31, tie_word_embeddings=False)

orthogonalize, counts = module.orthogonalize, {}

def counted(stack, *args):
    counts["computed"] = counts.get("computed", 0) + len(stack)
    return orthogonalize(stack, *args)

module.orthogonalize = counted
GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
warnings.filterwarnings("error", ".*all_gather_into_tensor")
for name, kind in (("all_to_all_single", "all_to_all"), (GATHER, "all_gather")):
    def count(*args, kind=kind, original=getattr(dist, name), **kwargs):
        counts[kind] = counts.get(kind, 0) + 1
        return original(*args, **kwargs)
    setattr(dist, name, count)

def train(mesh):
    torch.manual_seed(0)
    model = Model()
    for p in model.parameters():
        nn.init.normal_(p)
    if mesh is not None:
        for block in (*model.blocks, *model.decoder.blocks):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = module.muon(model, ns_dtype="fp32", ns_coefficients="quintic", weight_decay=0.1)
    counts.clear()
    for number in range(3):
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * number + i))
            if mesh is not None:
                p.grad = distribute_tensor(p.grad, mesh, p.placements)
        optimizer.step()
    said = dict(counts)
    said["sharded"] = all(x.placements == p.placements and x.to_local().shape == p.to_local().shape
                          for p in model.parameters() if mesh is not None
                          for kind, x in optimizer.state[p].items() if kind != "step")
    tensors = {}
    for name, p in model.named_parameters():
        for kind, x in {"weight": p.detach(), **optimizer.state[p]}.items():
            tensors[f"{kind} of {name}"] = x.full_tensor() if hasattr(x, "full_tensor") else x
    return tensors, said

expected, _ = train(None)
for shape in ([2], [3], [2, 1], [2, 2]):
    names = ("replicate", "shard")[-len(shape):]
    mesh = DeviceMesh("cpu", torch.arange(torch.Size(shape).numel()).view(shape), mesh_dim_names=names)
    if mesh.get_coordinate() is not None:
        tensors, said = train(mesh)
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}: {m}")
        assert tensors.keys() == expected.keys()
        print(json.dumps({"shape": shape} | said))

column = nn.Linear(4, 4, bias=False)
column.weight = nn.Parameter(distribute_tensor(torch.zeros(4, 4), mesh, [Replicate(), Shard(1)]))
column.weight.grad = torch.zeros_like(column.weight)
try:
    module.muon(column).step()
except UserError as error:
    assert error.code == "unsupported_sharding"
else:
    raise AssertionError("columns were taken for rows")
dist.barrier()
hard_exit(0)
"""

MATRICES = 2 * 5 + 3 + 2 * 7  # two of each expert, the linear layers, q, k, v, o, gate, up and down of each block
SHAPES, EXPERT_SHAPES = 3 + 4, 2


def test_the_update_of_several_ranks_is_that_of_one(tmp_path):
    script = tmp_path / "updates.py"
    script.write_text(UPDATES, encoding="utf-8")
    told = [json.loads(line) for out in ranks.run(script, 4) for line in out.splitlines()]
    assert len(told) == 2 + 3 + 2 + 4 and all(one["sharded"] for one in told)
    # In 3 steps, there and back, at most once for the matrices of a shape; experts stay in their shard.
    most = {
        (2,): {"all_to_all": 6 * SHAPES},
        (3,): {"all_to_all": 6 * SHAPES},
        (2, 1): {"all_gather": 3 * (SHAPES + EXPERT_SHAPES)},
        (2, 2): {"all_to_all": 6 * SHAPES, "all_gather": 3 * (SHAPES + EXPERT_SHAPES)},
    }
    for shape, kinds in most.items():
        here = [one for one in told if one["shape"] == list(shape)]
        computed = [one["computed"] for one in here]
        assert sum(computed) == 3 * MATRICES and max(computed) < 0.7 * 3 * MATRICES  # each by one rank, and shared out
        for one in here:
            assert {name for name in one if name.startswith("all_")} == kinds.keys()
            assert all(0 < one[name] <= count for name, count in kinds.items())


CHECKPOINTS = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torchrecipes.checkpoint import CheckpointConfig, Checkpointer
from torchrecipes.error_file import hard_exit
from torchrecipes.distributed.fsdp import init_on_device, parallelize
from torchrecipes.models import llama
from torchrecipes.optim import muon

folder, strategy, first, last, saved = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
dist.init_process_group("gloo")

def make(seed):
    with torch.device("meta"):
        model = llama(vocab_size=62, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                      intermediate_size=31, tie_word_embeddings=False, seed=seed)
    parallelize(model, strategy, torch.device("cpu"), torch.float32)
    init_on_device(model, torch.device("cpu"), seed)
    optimizer = muon(model, ns_dtype="fp32")
    options = CheckpointConfig(async_save=False)
    return model, optimizer, Checkpointer(folder, options, model=model, optimizer=optimizer)

def train(model, optimizer, first, last):
    for step in range(first, last + 1):
        ids = torch.arange(step, step + 24).view(2, 12) % 60
        model.head(model(ids)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    tensors = {}
    for name, p in model.named_parameters():
        for kind, x in {"weight": p.detach(), **optimizer.state[p]}.items():
            tensors[f"{kind} of {name}"] = (x.full_tensor() if hasattr(x, "full_tensor") else x).contiguous().clone()
    return tensors

model, optimizer, checkpointer = make(seed=0 if first == 1 else 9)
if first == 1:
    train(model, optimizer, 1, 2)
    checkpointer.save(2)
    found = train(model, optimizer, 3, last)
    other_model, other_optimizer, other = make(seed=9)
    assert other.resume() == 2
    for name, x in train(other_model, other_optimizer, 3, last).items():
        assert torch.equal(x, found[name]), name
else:
    assert checkpointer.resume() == first - 1
    found = train(model, optimizer, first, last)
    checkpointer.save(last)
if dist.get_rank() == 0:
    save_file(found, saved)
hard_exit(0)
"""


def test_a_checkpoint_resumes_on_as_many_ranks_bit_for_bit_and_on_others(tmp_path):
    script = tmp_path / "checkpoints.py"
    script.write_text(CHECKPOINTS, encoding="utf-8")

    def train(world_size, strategy, first, last):
        saved = tmp_path / "end.safetensors"
        ranks.run(script, world_size, tmp_path / "run", strategy, first, last, saved)
        return load_file(saved)

    uninterrupted = train(2, "fsdp", 1, 4)  # and again from step 2, where it was saved
    train(1, "none", 3, 3)
    others = train(3, "fsdp", 4, 4)
    assert any(name.startswith("momentum_buffer of blocks.0.self_attn.qkv_proj") for name in others)
    for name, tensor in others.items():
        torch.testing.assert_close(tensor, uninterrupted[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
