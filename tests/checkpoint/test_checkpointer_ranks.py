"""Checkpoints that several ranks write together."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests import ranks
from torchrecipes.checkpoint import verify

SCRIPT = """
import json, random, resource, sys
from pathlib import Path
import numpy
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torchrecipes.checkpoint import CheckpointConfig, Checkpointer, tensor_files
from torchrecipes.data.sources.records import Document
from torchrecipes.data.tokenizers.load import train_wordpiece
from torchrecipes.distributed import collectives
from torchrecipes.error_file import hard_exit
from torchrecipes.distributed.fsdp import init_on_device, parallelize
from torchrecipes.errors import UserError
from torchrecipes.models import neobert
from torchrecipes.optim import adamw
from torchrecipes.training.ema import EMA

what, folder, strategy = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo")
rank = dist.get_rank()
tokenizer = train_wordpiece([Document("a small text for a small tokenizer, " * 3, "here")], vocab_size=60)

class Held:
    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state

class Training:
    def __init__(self, seed, **options):
        with torch.device("meta"):  # sizes that 2 and 3 ranks do not divide
            self.model = neobert(vocab_size=62, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
                                 intermediate_size=47)
        parallelize(self.model, strategy, torch.device("cpu"), torch.float32)
        init_on_device(self.model, torch.device("cpu"), seed)
        self.optimizer = adamw(self.model, lr=1e-2)
        self.ema = EMA(self.model, 0.5)
        embedding = self.model.embedding.weight.detach()
        self.held = Held({
            "plain": torch.arange(7.0) + seed,
            "scalar": torch.tensor(seed + 0.5),
            "bf16": torch.full((3, 5), seed + 0.25, dtype=torch.bfloat16),
            "sharded": embedding * 2,
            "sharded_bf16": embedding.bfloat16(),
            "number": seed,
        })
        self.checkpointer = Checkpointer(folder, CheckpointConfig(**options), model=self.model,
                                         optimizer=self.optimizer, tokenizer=tokenizer,
                                         state={"ema": self.ema, "held": self.held})

    def train(self, steps):
        for step in range(steps):
            ids = torch.arange(step, step + 24).view(2, 12) % 60
            self.model.head(self.model(ids)).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ema.update()

    def sums(self):
        tensors = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            for kind, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{kind}.{name}"] = value
        tensors |= {f"ema.{name}": value for name, value in self.ema.averages.items()}
        tensors |= {f"held.{name}": value for name, value in self.held.state.items() if name != "number"}
        full = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in tensors.items()}
        sums = {name: x.double().abs().sum().item() for name, x in full.items()}
        sharded = sum(isinstance(x, DTensor) for x in tensors.values())
        dtypes = {name: str(x.dtype) for name, x in tensors.items()}
        return {"sums": sums, "dtypes": dtypes, "sharded": sharded, "number": self.held.state["number"]}

if what == "save":
    if len(sys.argv) > 4:
        tensor_files.MODEL_FILE_BYTES = int(sys.argv[4])
    training = Training(seed=0)
    with training.checkpointer as checkpointer:
        training.train(3)
        random.seed(rank), numpy.random.seed(rank), torch.manual_seed(rank)
        checkpointer.save(3)
        before = training.sums() | {"drawn": [random.random(), numpy.random.rand(), torch.rand(1).item()]}
        training.train(2)  # while it is written
    print(json.dumps(before))
elif what == "load":
    training = Training(seed=9)
    assert training.checkpointer.resume() == 3
    drawn = [random.random(), numpy.random.rand(), torch.rand(1).item()]
    print(json.dumps(training.sums() | {"drawn": drawn}))
    training.train(1)  # what was loaded is of a kind that training continues with
elif what == "full":
    codes = []
    training = Training(seed=0, keep_last=2, on_save_error=sys.argv[4], async_save=False)
    with training.checkpointer as checkpointer:
        training.train(1)
        checkpointer.save(1)
        no_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == 1:  # one rank's disk is full
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, no_limit[1]))
        try:
            checkpointer.save(2)
        except UserError as error:
            codes.append(error.code)
        resource.setrlimit(resource.RLIMIT_FSIZE, no_limit)
        names = sorted(path.name for path in (folder / "checkpoints").iterdir())
        collectives.all_reduce_sum(0)  # all have listed them
        try:
            checkpointer.wait(final=True)
        except UserError as error:
            codes.append(error.code)
        last = checkpointer.saved.name
        checkpointer.save(3)
        checkpointer.wait(final=True)
    print(json.dumps([codes, names, last]))
hard_exit(0)
"""


def printed(outputs):
    """The last line of every rank."""
    return [json.loads(out.splitlines()[-1]) for out in outputs]


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    file = tmp_path_factory.mktemp("ranks") / "script.py"
    file.write_text(SCRIPT)
    return file


@pytest.fixture(scope="module")
def pair(tmp_path_factory, script):
    """(folder, what the ranks printed) of a run that two ranks saved."""
    folder = tmp_path_factory.mktemp("pair")
    return folder, printed(ranks.run(script, 2, "save", folder, "fsdp", 8000))


def checkpoint(folder):
    (path,) = (folder / "checkpoints").iterdir()
    return path


def without(state, *names):
    return {name: value for name, value in state.items() if name not in names}


@pytest.mark.parametrize(("count", "strategy"), [(2, "fsdp"), (3, "ddp"), (1, "none")])
def test_others_load_what_two_ranks_saved(script, pair, count, strategy):
    folder, saved = pair
    loaded = printed(ranks.run(script, count, "load", folder, strategy))
    for rank, state in enumerate(loaded):
        assert without(state, "drawn", "sharded") == without(saved[0], "drawn", "sharded")
        assert state["sharded"] == (0 if strategy == "none" else saved[0]["sharded"])
        if rank < 2:  # each has its own generators
            assert state["drawn"] == saved[rank]["drawn"]
    draws = [tuple(state["drawn"]) for state in loaded]
    assert len(set(draws)) == count
    assert any(name.startswith("exp_avg_sq.") for name in saved[0]["sums"])


def test_ranks_load_what_replicas_and_more_ranks_saved(tmp_path, script):
    saved = printed(ranks.run(script, 3, "save", tmp_path / "fsdp", "fsdp"))
    loaded = printed(ranks.run(script, 2, "load", tmp_path / "fsdp", "ddp"))
    assert all(without(state, "drawn") == without(saved[0], "drawn") for state in loaded)
    ranks.run(script, 2, "save", tmp_path / "ddp", "ddp")
    ranks.run(script, 1, "save", tmp_path / "one", "none")
    expected = load_file(checkpoint(tmp_path / "one") / "model.safetensors")
    for folder in ("ddp", "fsdp"):
        for name, tensor in load_file(checkpoint(tmp_path / folder) / "model.safetensors").items():
            torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-5)


def test_transformers_loads_what_several_ranks_wrote_into_several_files(pair):
    transformers = pytest.importorskip("transformers")
    folder, saved = pair
    path = checkpoint(folder)
    assert len(list(path.glob("model-*-of-*.safetensors"))) > 2 and verify(path) == []
    assert {file.stat().st_mode for file in path.rglob("*.safetensors")} == {(path / "state.json").stat().st_mode}
    sums = saved[0]["sums"]
    for model_folder, prefix in ((path, ""), (path / "ema", "ema.")):
        model = transformers.AutoModelForMaskedLM.from_pretrained(model_folder)
        total = sum(p.detach().double().abs().sum().item() for p in model.parameters())
        names = [name.removeprefix("ema.") for name in sums if name.startswith("ema.")]
        assert total == pytest.approx(sum(sums[prefix + name] for name in names))


@pytest.mark.parametrize("on_save_error", ["stop", "continue"])
def test_a_disk_that_is_full_for_one_rank_is_reported_by_all_and_costs_one_save(tmp_path, script, on_save_error):
    results = ranks.finish(ranks.start(script, 2, "full", tmp_path, "fsdp", on_save_error))
    assert [code for code, _, _ in results] == [0, 0], results
    for _, out, _ in results:
        codes, names, last = json.loads(out.splitlines()[-1])
        assert codes == ["cannot_save"]
        assert names == ["step-00000001"] and last == "step-00000001"
    assert ("on_save_error=continue" in results[0][1]) == (on_save_error == "continue")
    paths = sorted((tmp_path / "checkpoints").iterdir())
    assert [path.name[-1] for path in paths] == ["1", "3"] and all(verify(path) == [] for path in paths)
