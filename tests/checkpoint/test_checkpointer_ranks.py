"""Checkpoints that several ranks write together."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests import ranks
from torchrecipes.checkpoint.checkpointer import verify

SCRIPT = """
import json, os, resource, sys
from pathlib import Path
import torch
from torchrecipes.data.sources.records import Document
from torchrecipes.data.tokenizers.load import train_wordpiece
from torchrecipes.errors import UserError
from torchrecipes.models import bert, neobert
from torchrecipes.distributed.error_file import hard_exit
from torchrecipes.distributed import collectives
from torchrecipes.optim import adamw
from torchrecipes.checkpoint import checkpointer as module
from torchrecipes.checkpoint.checkpointer import Checkpointer
from torchrecipes.distributed.fsdp import clip_grad_norm, init_on_device, parallelize, set_grad_sync
from torchrecipes.training.run import start_run

what, folder, strategy = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
run = start_run(folder, seed=0, config_yaml="", resume="auto")
tokenizer = train_wordpiece([Document("a small text for a small tokenizer, " * 3, "here")], vocab_size=60)

def make(kind=neobert, seed=0, hidden_size=24, layers=2):
    with torch.device("meta"):
        model = kind(vocab_size=62, hidden_size=hidden_size, num_hidden_layers=layers, num_attention_heads=2,
                     intermediate_size=2 * hidden_size - 1)  # sizes that 2 and 3 ranks do not divide
    parallelize(model, strategy, run.device, torch.float32)
    init_on_device(model, run.device, seed)
    return model, adamw(model, lr=1e-2)

def train(model, optimizer, steps):
    for step in range(steps):
        ids = torch.arange(step, step + 24).view(2, 12) % 60
        model.head(model(ids)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

def save(checkpointer, step, model, optimizer):
    return checkpointer.save(step, model=model, optimizer=optimizer, tokenizer=tokenizer, state={}, config_yaml="",
                             recipe_source="")

def parts(model, optimizer):
    for name, parameter in model.named_parameters():
        yield name, parameter
        for kind, value in optimizer.state.get(parameter, {}).items():
            yield f"{kind}.{name}", value

def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

def sums(model, optimizer):
    return {name: full(tensor).double().abs().sum().item() for name, tensor in parts(model, optimizer)}

if what == "save":
    if len(sys.argv) > 4:
        module.MODEL_FILE_BYTES = int(sys.argv[4])
    with Checkpointer(folder, asynchronous=True) as checkpointer:
        model, optimizer = make()
        train(model, optimizer, 3)
        save(checkpointer, 3, model, optimizer)
        before = sums(model, optimizer)
        train(model, optimizer, 2)  # while it is written
    print(json.dumps(before))
elif what == "load":
    model, optimizer = make(seed=9)
    checkpoint = Checkpointer(folder).resume("auto")
    checkpoint.load_model(model)
    checkpoint.load_optimizer(model, optimizer)
    print(json.dumps(sums(model, optimizer)), file=sys.stderr if run.rank else sys.stdout)
    train(model, optimizer, 1)  # what was loaded is of a kind that training goes on with
elif what == "full":
    told = []
    with Checkpointer(folder, keep_last=2, on_error=sys.argv[4]) as checkpointer:
        model, optimizer = make()
        train(model, optimizer, 1)
        save(checkpointer, 1, model, optimizer)
        no_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        if run.rank == 1:  # one rank's disk is full
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, no_limit[1]))
        try:
            save(checkpointer, 2, model, optimizer)
        except UserError as error:
            told.append(str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, no_limit)
        names = sorted(path.name for path in (folder / "checkpoints").iterdir())
        collectives.all_reduce_sum(0)  # all have looked
        try:
            checkpointer.wait(final=True)
        except UserError as error:
            told.append(str(error))
        save(checkpointer, 3, model, optimizer)
        checkpointer.wait(final=True)
    sys.stderr.write(json.dumps([told, names]))
hard_exit(0)
"""


def said(outputs):
    """The last line of rank 0."""
    return json.loads(outputs[0].splitlines()[-1])


@pytest.fixture
def script(tmp_path):
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    return file


@pytest.mark.parametrize(
    ("before", "after"), [((3, "fsdp"), (2, "fsdp")), ((2, "ddp"), (3, "fsdp")), ((2, "fsdp"), (1, "none"))]
)
def test_what_some_ranks_saved_others_load(tmp_path, script, before, after):
    saved = said(ranks.run(script, before[0], "save", tmp_path / "run", before[1]))
    loaded = said(ranks.run(script, after[0], "load", tmp_path / "run", after[1]))
    assert loaded == saved
    assert any(name.startswith("exp_avg_sq.") for name in saved)


def test_transformers_loads_what_several_ranks_wrote_into_several_files(tmp_path, script):
    transformers = pytest.importorskip("transformers")
    saved = said(ranks.run(script, 2, "save", tmp_path / "run", "fsdp", 8000))
    (path,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert len(list(path.glob("model-*-of-*.safetensors"))) > 2 and verify(path) == []
    assert {file.stat().st_mode for file in path.rglob("*.safetensors")} == {(path / "state.json").stat().st_mode}
    model = transformers.AutoModelForMaskedLM.from_pretrained(path)
    theirs = sum(p.detach().double().abs().sum().item() for p in model.parameters())
    assert theirs == pytest.approx(sum(value for name, value in saved.items() if not name.startswith(("exp", "step"))))
    loaded = said(ranks.run(script, 1, "load", tmp_path / "run", "none"))
    assert loaded == saved


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_a_disk_that_is_full_for_one_rank_is_told_by_all_and_costs_one_save(tmp_path, script, on_error):
    results = ranks.finish(ranks.start(script, 2, "full", tmp_path / "run", "fsdp", on_error))
    assert [code for code, _, _ in results] == [0, 0], results
    for _, _, err in results:
        told, names = json.loads(err.splitlines()[-1])
        assert len(told) == 1 and "File too large" in told[0]
        assert names == ["step-00000001"]
    assert ("training goes on" in results[0][1]) == (on_error == "continue")
    paths = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name[-1] for path in paths] == ["1", "3"] and all(verify(path) == [] for path in paths)


def test_the_weights_of_a_sharded_model_are_those_of_a_whole_one(tmp_path, script):
    ranks.run(script, 3, "save", tmp_path / "run", "fsdp")
    ranks.run(script, 1, "save", tmp_path / "alone", "none")
    (ours,), (alone,) = ((tmp_path / name / "checkpoints").iterdir() for name in ("run", "alone"))
    expected = load_file(alone / "model.safetensors")
    for name, tensor in load_file(ours / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-5)
