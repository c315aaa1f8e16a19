"""Training that is killed at any instant, again and again, ends with the weights of the run that was never killed.

`KILLS=500 python -m pytest tests/resilience/test_killed_training.py` tries harder than the suite does.
"""

import json
import os
import random

import pytest
import torch
from safetensors.torch import load_file

from tests import ranks
from torchrecipes.checkpoint import verify

STEPS = 30
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
  num_hidden_layers: 1
  num_attention_heads: 2
  intermediate_size: 16
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
from torchrecipes.checkpoint import verify

config, runs, kills, world_size, seed = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:])
draw, path = random.Random(seed), find_recipe("mlm_pretrain")
strategy = "fsdp" if world_size > 1 else "none"
recipe = load_recipe(path)
recipe.flops_per_token = lambda *_: 1.0  # a third of the time to start, and MFU is not compared
# Once, not in every fork.
import torch._dynamo, torch.distributed.checkpoint, torch.distributed.fsdp, torch.distributed.tensor

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
        recipe.main(load(recipe.Config, config, [f"output_dir={output_dir}", f"compute.strategy={strategy}"],
                         recipe=path))
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
assert [wait(child, 120) for child in start(runs / "uninterrupted")] == [0] * world_size
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
    # The others end by themselves, of the broken connection. While the group is being made, no connection is there to
    # break: they wait until a launcher ends them.
    others = []
    for child in children:
        if child != victim:
            others.append(wait(child, 5))
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
@pytest.mark.parametrize(("world_size", "kills"), [(1, 24), (2, 6)])
def test_every_restart_continues_and_the_end_is_the_same_to_the_last_bit(tmp_path, world_size, kills):
    draw = random.Random(0)
    words = "the cat dog fox owl sees hears finds likes a river house garden and goes home".split()
    with (tmp_path / "text.jsonl").open("w") as file:
        for _ in range(200):
            file.write(json.dumps({"text": " ".join(draw.choices(words, k=draw.randint(3, 40)))}) + "\n")
    config, driver, runs = tmp_path / "config.yaml", tmp_path / "driver.py", tmp_path / "runs"
    config.write_text(
        SETTINGS.replace("TEXT", str(tmp_path / "text.jsonl")).replace("CORPUS", str(tmp_path / "corpus"))
    )
    driver.write_text(DRIVER)
    runs.mkdir()
    kills = int(os.environ.get("KILLS", kills))
    processes = ranks.start(driver, 1, config, runs, kills, world_size, 0)
    ((code, out, err),) = ranks.finish(processes, timeout=120 + 20 * kills)
    logs = "\n".join(file.read_text() for file in sorted(runs.glob("rank-*.txt")))
    assert code == 0, err + logs
    assert int(out) >= kills
    expected = load_file(runs / "uninterrupted" / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors")

    def losses(run):
        return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]

    killed = list(runs.glob("killed-*"))
    assert killed
    for run in killed:
        last = run / "checkpoints" / f"step-{STEPS:08d}"
        assert verify(last) == []
        for name, tensor in load_file(last / "model.safetensors").items():
            assert torch.equal(tensor, expected[name]), name
        assert losses(run) == losses(runs / "uninterrupted")
