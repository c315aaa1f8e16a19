"""Collectives, and models sharded over ranks."""

import json
from functools import partial

import pytest
import torch
from torch import nn

from tests import ranks
from torchrecipes.distributed import fsdp
from torchrecipes.distributed.fsdp import choose_strategy, clip_grad_norm, init_on_device, parallelize, set_grad_sync
from torchrecipes.errors import UserError
from torchrecipes.models import bert, neobert

CPU = torch.device("cpu")

SCRIPT = """
import json, sys
from functools import partial
import torch
import torch.distributed as dist
from torch.profiler import profile
from torchrecipes.errors import UserError
from torchrecipes.losses import masked_lm_loss
from torchrecipes.models import bert, gpt2, llama, neobert
from torchrecipes.error_file import hard_exit
from torchrecipes.distributed import collectives
from torchrecipes.distributed.fsdp import clip_grad_norm, init_on_device, parallelize, set_grad_sync
from torchrecipes.training.run import Run

what, folder, strategy, kind, choice = sys.argv[1:6]
torch.distributed.init_process_group("gloo")
run = Run(folder, torch.device("cpu"), rank=torch.distributed.get_rank(), world_size=torch.distributed.get_world_size())

def model_of(kind):
    with torch.device("meta"):
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 30}
        makers = {"neobert": neobert, "bert": bert, "untied": partial(neobert, tie_word_embeddings=False)}
        model = makers[kind](vocab_size=50, **sizes)
    parallelize(model, strategy, run.device, torch.float32, choice)
    init_on_device(model, run.device, 3)
    return model

def backward(model, row, last):
    set_grad_sync(model, last=last)
    ids = (torch.arange(24).view(2, 12) + 7 * row) % 50
    hidden = model(ids)
    positions = torch.tensor([1, 5, 14])
    loss = masked_lm_loss(hidden, model.head, positions, positions + row)
    (loss * run.world_size / 12).backward()

if what == "gradients":
    model = model_of(kind)
    for row in range(4):  # 4 micro-batches in the whole run, whatever the number of ranks
        if row % run.world_size == run.rank:
            backward(model, row, last=row >= 4 - run.world_size)
    grads = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    if run.rank == 0:
        from safetensors.torch import save_file
        save_file({name: grad.contiguous() for name, grad in grads.items()}, f"{folder}/gradients.safetensors")
    print(json.dumps(clip_grad_norm(model, 1.0).item()))
elif what == "reductions":
    model = model_of(kind)
    told = []
    for micro_batches in (1, 3):
        sharded, copies = [], []
        with profile() as profiler:
            for number in range(micro_batches):
                backward(model, number, last=number == micro_batches - 1)
                sharded.append(all(hasattr(p, "device_mesh") and p.grad is not None for p in model.parameters()))
                copies.append(any(not hasattr(p, "device_mesh") for p in model.parameters()))
        events = profiler.key_averages()
        counts = [sum(event.count for event in events if event.key.startswith(f"c10d::{kind}"))
                  for kind in ("_reduce_scatter", "allreduce")]
        prefetched = any(event.key == "FSDP::forward_prefetch for head" for event in events)
        told.append({"reduce_scatter": counts[0], "all_reduce": counts[1], "sharded": sharded, "copies": copies,
                     "prefetched": prefetched})
        model.zero_grad()
    print(json.dumps(told))
elif what == "bf16":
    seen = {}
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    makers = {
        "neobert": lambda: neobert(**sizes, intermediate_size=30),
        "bert": lambda: bert(**sizes, intermediate_size=30),
        "gpt2": lambda: gpt2(**sizes, embd_pdrop=0, resid_pdrop=0.0),
        "llama": lambda: llama(**sizes, intermediate_size=30),
    }
    for name, make in makers.items():
        with torch.device("meta"):
            model = make().eval()
        parallelize(model, strategy, run.device, torch.bfloat16)
        init_on_device(model, run.device, 0)
        inputs = []
        model.blocks[-1].register_forward_pre_hook(lambda block, args: inputs.append(args[0]))
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model(torch.arange(24).view(2, 12))
        alone = make().eval()
        with torch.autocast("cpu", torch.bfloat16):
            expected = alone(torch.arange(24).view(2, 12))
        hidden.square().sum().backward()
        seen[name] = [str(inputs[0].dtype), ((hidden - expected).norm() / expected.norm()).item()]
    print(json.dumps(seen))
elif what == "talk":
    said = [collectives.all_reduce_sum(run.rank + 1), collectives.all_reduce_max(run.rank),
    collectives.all_reduce_min(run.rank), collectives.all_gather_object(run.rank * 10)]
    said.append(collectives.all_reduce_sum_(torch.tensor([1.0, run.rank])).tolist())
    order = []
    with collectives.rank0_first("first"):
        open(f"{folder}/made", "a").write(str(run.rank))
        order.append(open(f"{folder}/made").read()[0])
    said.append(order)
    for error in (UserError("a mistake of rank 0"), ValueError("a bug of rank 0")):
        for call in ("from_main", "main_first"):
            try:
                if call == "from_main" and isinstance(error, UserError):
                    def fail():
                        raise error
                    collectives.run_on_rank0_and_broadcast(fail)
                elif call == "main_first":
                    with collectives.rank0_first(f"{call} {type(error).__name__}"):
                        raise error if run.rank == 0 else AssertionError("not reached")
            except Exception as caught:
                said.append(f"{type(caught).__name__}: {caught}")
    sys.stderr.write(json.dumps(said) + "\\n")
collectives.all_reduce_sum(0)
hard_exit(0)
"""


@pytest.fixture
def script(tmp_path):
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    return file


def gradients_alone(kind):
    """Those of one process in float64, by plain autograd."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 30}
    makers = {"neobert": neobert, "bert": bert, "untied": partial(neobert, tie_word_embeddings=False)}
    model = makers[kind](vocab_size=50, **sizes, seed=3).double()
    for row in range(4):
        ids = (torch.arange(24).view(2, 12) + 7 * row) % 50
        rows = model(ids).flatten(0, 1)[[1, 5, 14]]
        labels = torch.tensor([1, 5, 14]) + row
        (nn.functional.cross_entropy(model.head(rows), labels, reduction="sum") / 12).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("strategy", "kind", "choice"),
    [("fsdp", "untied", "auto"), ("fsdp", "neobert", "last_micro_batch"), ("ddp", "bert", "auto")],
)
def test_gradients_are_those_of_one_process_the_heads_among_them(tmp_path, script, strategy, kind, choice):
    """The head is used outside of forward; sizes are not divided by the ranks; two micro-batches each."""
    from safetensors.torch import load_file

    outputs = ranks.run(script, 2, "gradients", tmp_path, strategy, kind, choice)
    norms = [float(out.splitlines()[-1]) for out in outputs[:1]]
    expected = gradients_alone(kind)
    found = load_file(tmp_path / "gradients.safetensors")
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name].double(), gradient, atol=1e-6, rtol=1e-4)
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm().item()
    assert norms == pytest.approx([whole], rel=1e-5)


@pytest.mark.parametrize(
    ("strategy", "kind", "choice", "every"),
    [
        ("fsdp", "untied", "auto", True),
        ("fsdp", "neobert", "last_micro_batch", False),
        ("hsdp", "neobert", "auto", True),
        ("hsdp", "untied", "last_micro_batch", False),
        ("ddp", "neobert", "auto", False),
    ],
)
def test_shards_reduce_in_every_micro_batch_and_replicas_in_the_last(tmp_path, script, strategy, kind, choice, every):
    processes = {"local_world_size": 2} if strategy == "hsdp" else {}
    outputs = ranks.run(
        script, 4 if strategy == "hsdp" else 2, "reductions", tmp_path, strategy, kind, choice, **processes
    )
    one, three = json.loads(outputs[0].splitlines()[-1])
    units = 3 + (kind == "untied")  # two blocks and the root; a head
    assert one["prefetched"] == three["prefetched"] == (kind == "untied")
    scatters, all_reduces = (0 if strategy == "ddp" else units), (0 if strategy == "fsdp" else units)
    assert (one["reduce_scatter"], one["all_reduce"]) == (scatters, all_reduces)
    assert (three["reduce_scatter"], three["all_reduce"]) == (scatters * (3 if every else 1), all_reduces)
    # Replicas add up elsewhere until the last micro-batch.
    assert three["sharded"] == [every and strategy == "fsdp"] * 2 + [True]
    assert three["copies"] == [strategy == "ddp"] * 2 + [False]  # of weights, in bf16 where blocks compute in it


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_what_blocks_add_to_is_in_fp32_as_on_one_process(tmp_path, script, strategy):
    seen = json.loads(ranks.run(script, 2, "bf16", tmp_path, strategy, "none", "auto")[0].splitlines()[-1])
    assert len(seen) == 4
    for name, (dtype, difference) in seen.items():
        assert dtype == "torch.float32", name
        assert difference < 0.01, name  # the rounding of embeddings and norms' weights


def test_ranks_hear_of_each_others_numbers_and_of_the_firsts_mistakes(tmp_path, script):
    results = ranks.finish(ranks.start(script, 2, "talk", tmp_path, "none", "none", "auto"))
    first, second = (json.loads(err.splitlines()[-1]) for _, _, err in results)
    assert first[:5] == second[:5] == [3, 1, 0, [0, 10], [2.0, 1.0]]
    assert first[5] == second[5] == ["0"]  # rank 0 was there first
    assert first[6:] == ["UserError: a mistake of rank 0"] * 2 + ["ValueError: a bug of rank 0"]
    assert second[6:8] == ["UserError: a mistake of rank 0"] * 2
    assert second[8].startswith("DistNetworkError: rank 0 has ended: a bug")
    assert results[1][1] == ""  # only rank 0 is heard on stdout


def test_a_model_is_on_the_meta_device_as_a_whole_or_not_at_all():
    model = neobert(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16)
    with torch.device("meta"):
        model.embedding = nn.Embedding(32, 16)
    with pytest.raises(UserError) as error:
        init_on_device(model, CPU, 0)
    assert error.value.code == "partly_on_meta" and "1 of the model's" in str(error.value)


def test_a_foreign_model_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = nn.Linear(3, 3)
    with pytest.raises(UserError) as error:
        init_on_device(model, CPU, 0)
    assert error.value.code == "no_init_weights"


@pytest.mark.parametrize(
    ("strategy", "ranks", "code"),
    [
        ("none", (2, 2), "strategy_needs_other_processes"),
        ("hsdp", (2, 2), "strategy_needs_other_processes"),
        ("hsdp", (2, 1), "strategy_needs_other_processes"),
        ("zero", (1, 1), "unknown_name"),
    ],
)
def test_strategies_that_do_not_suit_the_processes_are_refused(strategy, ranks, code):
    with pytest.raises(UserError) as error:
        choose_strategy(nn.Linear(4, 4), strategy, 1 << 40, *ranks)
    assert (error.value.key, error.value.code) == ("compute.strategy", code)


@pytest.mark.parametrize(
    ("memory", "ranks", "strategy"),
    [
        (64 * 16, (1, 1), "none"),
        (64 * 16 + 16, (2, 2), "ddp"),  # 16 parameters take a quarter of 1024 bytes per process
        (64 * 16 - 16, (2, 2), "fsdp"),
        (64 * 16 - 16, (4, 2), "hsdp"),
        (64 * 16 - 16, (4, 1), "fsdp"),
    ],
)
def test_auto_shards_what_takes_more_than_a_quarter_of_a_device(memory, ranks, strategy):
    assert choose_strategy(nn.Linear(4, 4, bias=False), "auto", memory, *ranks) == strategy


def test_processes_of_a_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(fsdp.os, "sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else 100)
    assert fsdp.device_memory(CPU, 4) == 4096 * 25


def test_a_parameter_without_dimensions_is_refused_by_name():
    model = nn.ParameterDict({"scale": torch.ones(())})
    assert choose_strategy(model, "auto", 2**40, 1, 1) == "none"
    with pytest.raises(UserError) as error:
        choose_strategy(model, "auto", 2**40, 2, 2)
    assert (error.value.code, error.value.key) == ("scalar_parameter", "model")
    assert "scale" in str(error.value)


def test_one_process_needs_none_of_it():
    with torch.device("meta"):
        model = neobert(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16)
    assert parallelize(model, "auto", CPU, torch.float32) == "none"
    init_on_device(model, CPU, seed=5)
    for (name, parameter), expected in zip(
        model.named_parameters(),
        neobert(
            vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, seed=5
        ).parameters(),
        strict=True,
    ):
        assert torch.equal(parameter, expected), name
    set_grad_sync(model, last=True)
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    assert clip_grad_norm(model, 1.0) > 0


FOREIGN = """
import json, sys
import torch
from torch import nn
from torchrecipes.error_file import hard_exit
from torchrecipes.distributed.fsdp import clip_grad_norm, init_on_device, parallelize

class WithLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.embed, self.out = nn.Embedding(9, 6), nn.Linear(6, 9)
        self.embed.requires_grad_(False)

    def forward(self, ids):
        hidden = self.embed(ids)
        for layer in self.model.layers:
            hidden = hidden + layer(hidden).tanh()
        return self.out(hidden)

def plain(): return nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 9))

strategy, cpu = sys.argv[1], torch.device("cpu")
torch.distributed.init_process_group("gloo")
rank, ids = torch.distributed.get_rank(), torch.arange(18).view(2, 9) % 9
norms = []
for make in (WithLayers, plain):
    grads = []
    for ranks in (1, 2):
        torch.manual_seed(0)
        model = make()
        if ranks == 2:
            parallelize(model, strategy, cpu, torch.float32)
            init_on_device(model, cpu, 0)
        mine = ids if ranks == 1 else ids[rank : rank + 1]
        (model(mine).logsumexp(-1).sum() * ranks / 18).backward()
        norms.append(clip_grad_norm(model, 1e9).item())
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        grads.append({n: g.full_tensor() if ranks == 2 else g for n, g in found.items()})
    assert grads[0].keys() == grads[1].keys() and ("embed.weight" in grads[0]) is False
    for name, gradient in grads[0].items():
        torch.testing.assert_close(gradient, grads[1][name])
print(json.dumps(norms))
torch.distributed.barrier()
hard_exit(0)
"""


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_models_of_any_class_are_sharded_with_frozen_parameters_too(tmp_path, strategy):
    (tmp_path / "script.py").write_text(FOREIGN)
    norms = json.loads(ranks.run(tmp_path / "script.py", 2, strategy)[0].splitlines()[-1])
    assert norms[0::2] == pytest.approx(norms[1::2])
