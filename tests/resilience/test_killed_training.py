"""Training that is killed at any instant, again and again, ends with the weights of the run that was never killed.

`KILLS=500 python -m pytest tests/resilience/test_killed_training.py` tries harder than the suite does.
"""

import json
import os
import random
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from torchrecipes.checkpoint.checkpointer import verify

STEPS = 60
SETTINGS = f"""
tokenizer: {{_component_: torchrecipes.data.tokenizers.train_wordpiece, vocab_size: 300}}
data:
  source: {{_component_: torchrecipes.data.sources.files, path: TEXT, sample_by: line}}
  corpus_dir: CORPUS
  validation_fraction: 0
  tokenizer_threads: 0
model:
  _component_: torchrecipes.models.bert
  hidden_size: 16
  num_hidden_layers: 2
  num_attention_heads: 2
  intermediate_size: 32
  max_position_embeddings: 32
seq_len: 32
global_batch_size: 4
max_steps: {STEPS}
compute:
  precision: fp32
log:
  log_every: 1
checkpoint:
  save_every: 2
  keep_last: 2
eval_every: null
"""
# Forks the training, which costs milliseconds where starting Python and torch costs seconds, and kills it at random.
DRIVER = """
import os, random, select, signal, socket, sys, time, traceback
from pathlib import Path
from torchrecipes.cli.run import load_recipe
from torchrecipes.config import load
from torchrecipes.config.catalog import find_recipe
from torchrecipes.checkpoint.checkpointer import verify

config, runs, kills, world_size, seed = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:])
draw, path = random.Random(seed), find_recipe("mlm_pretrain")
recipe = load_recipe(path)
import torch.distributed.checkpoint, torch.distributed.fsdp, torch.distributed.tensor  # once, not in every fork

def start(output_dir):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [fork(output_dir, rank, port) for rank in range(world_size)]

def fork(output_dir, rank, port):
    child = os.fork()
    if child:
        return child
    try:
        with open(runs / f"rank-{rank}.txt", "w") as log:
            os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
        if world_size > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size),
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        recipe.main(load(recipe.Config, config, [f"output_dir={output_dir}"], recipe=path))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)

def wait(child, seconds):
    poll, ended = select.poll(), os.pidfd_open(child)
    poll.register(ended, select.POLLIN)
    found = poll.poll(seconds * 1000)
    os.close(ended)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if found else None

begin = time.monotonic()
assert [wait(child, 120) for child in start(runs / "whole")] == [0] * world_size
usual = time.monotonic() - begin
killed = number = 0
while killed < kills:
    output_dir = runs / f"killed-{number}"
    children = start(output_dir)
    victim = draw.choice(children)
    code = wait(victim, draw.uniform(0.1, 0.7) * usual)
    if code is None:
        os.kill(victim, signal.SIGKILL)
        code = wait(victim, 60)
        killed += code == -signal.SIGKILL
    # The others end by themselves, of the broken connection. While the group is being made nothing is broken yet: there
    # they wait, until a launcher ends them.
    others = []
    for child in children:
        if child != victim:
            others.append(wait(child, 10))
            if others[-1] is None:
                os.kill(child, signal.SIGKILL)
                wait(child, 60)
    if code == 0:
        assert set(others) <= {0}, others
        number += 1
    else:
        assert code == -signal.SIGKILL, (code, Path(runs / "rank-0.txt").read_text())
        for folder in (output_dir / "checkpoints").glob("step-*"):
            assert verify(folder) == [], folder
if output_dir.exists():
    assert [wait(child, 120) for child in start(output_dir)] == [0] * world_size
print(killed)
"""


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")
@pytest.mark.parametrize(("world_size", "kills"), [(1, 30), (2, 8)])
def test_every_restart_goes_on_and_the_end_is_the_same_to_the_last_bit(tmp_path, world_size, kills):
    draw = random.Random(0)
    words = "the cat dog fox owl sees hears finds likes a river house garden and goes home".split()
    with (tmp_path / "text.jsonl").open("w") as file:
        for _ in range(200):
            file.write(json.dumps({"text": " ".join(draw.choices(words, k=draw.randint(3, 40)))}) + "\n")
    config = tmp_path / "config.yaml"
    settings = SETTINGS.replace("TEXT", str(tmp_path / "text.jsonl")).replace("CORPUS", str(tmp_path / "corpus"))
    config.write_text(settings + ("parallel: {strategy: fsdp}\n" if world_size > 1 else ""))
    runs = tmp_path / "runs"
    runs.mkdir()
    kills = int(os.environ.get("KILLS", kills))
    result = subprocess.run(
        [sys.executable, "-c", DRIVER, str(config), str(runs), str(kills), str(world_size), "0"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    logs = "\n".join(file.read_text() for file in sorted(runs.glob("rank-*.txt")))
    assert result.returncode == 0, result.stderr + logs
    assert int(result.stdout) >= kills
    whole, *killed = sorted(runs.glob("*/checkpoints"), key=lambda path: path.parent.name != "whole")
    expected = load_file(whole / f"step-{STEPS:08d}" / "model.safetensors")
    losses = (whole.parent / "metrics.jsonl").read_text().splitlines()
    assert killed
    for run in killed:
        last = run / f"step-{STEPS:08d}"
        assert verify(last) == []
        for name, tensor in load_file(last / "model.safetensors").items():
            assert torch.equal(tensor, expected[name]), name
        again = (run.parent / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["loss"] for line in again] == [json.loads(line)["loss"] for line in losses]
