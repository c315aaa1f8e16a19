"""The recipe on several processes: the same run as on one, to rounding."""

import json
import random
import signal

import pytest
import torch
from safetensors.torch import load_file

from tests import ranks
from torchrecipes.checkpoint import verify
from torchrecipes.cli.run import load_recipe
from torchrecipes.config import load
from torchrecipes.config.catalog import find_recipe

RECIPE = find_recipe("mlm_pretrain")
STEPS = 30
SETTINGS = f"""
tokenizer: {{_component_: torchrecipes.data.tokenizers.train_wordpiece, vocab_size: 300}}
data:
  source: {{_component_: torchrecipes.data.sources.files, path: TEXT, sample_by: line}}
  corpus_dir: CORPUS
  validation_fraction: 0.1
  tokenizer_threads: 0
model:
  _component_: torchrecipes.models.neobert
  hidden_size: 32
  num_hidden_layers: 2
  num_attention_heads: 2
  intermediate_size: 64
  max_position_embeddings: 64
seq_len: 32
global_batch_size: 12
micro_batch_size: 3
max_steps: {STEPS}
optimizer: {{_component_: torchrecipes.optim.adamw, lr: 5e-3}}
compute:
  precision: fp32
log:
  log_every: 1
checkpoint:
  save_every: 10
eval_every: 15
eval_sequences: 7
"""
MAIN = """
from torchrecipes.cli.main import _as_process
_as_process()
"""


class Folder:
    """A config, a text and a corpus that all runs share; `train` runs on W ranks, by default in this process."""

    def __init__(self, path):
        self.path = path
        sample = random.Random(0)
        words = "the cat dog fox owl sees hears finds likes a river house garden and goes home".split()
        text = path / "text.jsonl"
        with text.open("w") as file:
            for _ in range(300):
                file.write(json.dumps({"text": " ".join(sample.choices(words, k=sample.randint(3, 40)))}) + "\n")
        self.config, self.script = path / "config.yaml", path / "start.py"
        self.config.write_text(SETTINGS.replace("TEXT", str(text)).replace("CORPUS", str(path / "corpus")))
        self.script.write_text(MAIN)

    def arguments(self, name, *overrides):
        return ["run", "mlm_pretrain", "--config", self.config, f"output_dir={self.path / name}", *overrides]

    def train(self, name, *overrides, world_size=1, local_world_size=None):
        if world_size == 1:
            recipe = load_recipe(RECIPE)
            recipe.main(load(recipe.Config, self.config, [f"output_dir={self.path / name}", *overrides], recipe=RECIPE))
        else:
            arguments = self.arguments(name, *overrides)
            ranks.run(self.script, world_size, *arguments, local_world_size=local_world_size)
        return self.path / name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return Folder(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone(folder):
    return folder.train("alone")


def logged(run, key="loss"):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def assert_same_losses(run, other, tolerance):
    for key, count in (("loss", STEPS), ("grad_norm", STEPS), ("eval/validation/loss", 3)):
        ours, theirs = logged(run, key), logged(other, key)
        assert ours.keys() == theirs.keys() and len(ours) == count
        assert ours == pytest.approx(theirs, abs=tolerance, rel=0), key


def weights(run, step=STEPS):
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


@pytest.mark.parametrize(
    ("world_size", "strategy", "local_world_size"),
    [(2, "ddp", None), (3, "fsdp", None), (4, "hsdp", 2), (2, "fsdp", None)],
)
def test_losses_are_those_of_one_process(folder, alone, world_size, strategy, local_world_size):
    name = f"{strategy}-{world_size}"
    run = folder.train(name, f"compute.strategy={strategy}", world_size=world_size, local_world_size=local_world_size)
    assert_same_losses(run, alone, 1e-4)
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(run)[name], tensor, atol=1e-4, rtol=0)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"step-{s:08d}" for s in (10, 20, 30)]


@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 1), (1, 3)])
def test_a_checkpoint_resumes_on_another_number_of_ranks(folder, alone, before, after):
    def settings(count):
        return ["max_steps=30", "checkpoint.save_every=10"] + (["compute.strategy=fsdp"] if count > 1 else [])

    run = folder.train(f"{before}-then-{after}", *settings(before), world_size=before)
    for step in (20, 30):  # it comes to step 10 again
        path = run / "checkpoints" / f"step-{step:08d}"
        for file in sorted(path.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        path.rmdir()
    folder.train(run.name, *settings(after), world_size=after)
    assert_same_losses(run, alone, 1e-4)


def test_a_signal_saves_one_checkpoint_and_the_resumed_run_is_exact(folder):
    settings = ["compute.strategy=fsdp", "max_steps=100", "checkpoint.save_every=null", "eval_every=null"]
    uninterrupted = folder.train("uninterrupted", *settings, world_size=2)
    processes = ranks.start(folder.script, 2, *folder.arguments("stopped", *settings))
    for line in processes[0].stdout:
        if line.startswith("step 5/"):
            break
    processes[1].send_signal(signal.SIGTERM)  # this one passes it on
    assert [code for code, _, _ in ranks.finish(processes)] == [143, 143]
    (path,) = (folder.path / "stopped" / "checkpoints").iterdir()
    assert verify(path) == []
    stopped = folder.train("stopped", *settings, world_size=2)
    assert logged(stopped) == logged(uninterrupted)
    assert all(torch.equal(weights(uninterrupted, 100)[name], tensor) for name, tensor in weights(stopped, 100).items())
