"""Training on a stream, of which the trainer, the tokenizer or both are killed at any instant, again and again, ends
with the weights of the run that was never killed.

`KILLS=30 python -m pytest tests/resilience/test_killed_stream.py` tries harder than the suite does.
"""

import json
import os
import random

import pytest
import torch
from safetensors.torch import load_file

from tests import ranks
from torchrecipes.checkpoint import verify

STEPS = 24
SETTINGS = f"""
tokenizer: {{_component_: torchrecipes.data.tokenizers.train_char}}
data:
  source: {{_component_: torchrecipes.data.sources.files, path: TEXT}}
  mode: streaming
  corpus_dir: CORPUS
  cache_dir: CACHE
  block_rows: 128
  tokenizer_threads: 1
  validation_fraction: 0.01
model:
  _component_: torchrecipes.models.bert
  hidden_size: 16
  num_hidden_layers: 1
  num_attention_heads: 2
  intermediate_size: 16
  max_position_embeddings: 64
seq_len: 64
global_batch_size: 64
micro_batch_size: 64
max_steps: {STEPS}
compute:
  precision: fp32
log:
  log_every: 1
checkpoint:
  save_every: 3
  keep_last: 2
eval_every: 8
eval_sequences: 16
"""
# Forks the training, which costs milliseconds where starting Python and torch costs seconds, and kills it at random.
DRIVER = """
import os, random, select, shutil, signal, sys, time, traceback
from pathlib import Path
from torchrecipes.checkpoint import verify
from torchrecipes.cli.run import load_recipe
from torchrecipes.config import load
from torchrecipes.config.catalog import find_recipe
from torchrecipes.data.batching import streamed
from torchrecipes.data.corpus import stream
import torch.distributed.checkpoint, torch.distributed.fsdp, torch.distributed.tensor  # once, not in every fork

config, runs, kills, seed = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:])
draw, path = random.Random(seed), find_recipe("mlm_pretrain")
recipe = load_recipe(path)
stream.SHARD_TOKENS = 10_000
# So that the tokenizer works as long as the training does.
stream.SHARDS_AHEAD = streamed.SHARDS_AHEAD = streamed.BLOCKS_AHEAD = 1

def start(output_dir):
    child = os.fork()
    if child:
        return child
    try:
        with open(runs / "log.txt", "w") as log:
            os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
        recipe.main(load(recipe.Config, config, [f"output_dir={output_dir}", f"data.corpus_dir={output_dir}/corpus",
                         f"data.cache_dir={output_dir}/cache"], recipe=path))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)

def ended(pid, seconds):
    poll = select.poll()
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    poll.register(process, select.POLLIN)
    found = poll.poll(seconds * 1000)
    os.close(process)
    return bool(found)

def tokenizer_of(trainer):
    for task in Path(f"/proc/{trainer}/task").glob("*/children"):
        for pid in task.read_text().split():
            if b"tokenizer_process" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return int(pid)

def finish(trainer):
    assert ended(trainer, 120)
    code = os.waitstatus_to_exitcode(os.waitpid(trainer, 0)[1])
    assert code in (0, -signal.SIGKILL), Path(runs / "log.txt").read_text()
    return code == 0

begin = time.monotonic()
assert finish(start(runs / "uninterrupted"))
usual = time.monotonic() - begin
counts, number, trainer = {"trainer": 0, "tokenizer": 0, "both": 0}, 0, None
while sum(counts.values()) < kills or len({count > 0 for count in counts.values()}) > 1:
    output_dir = runs / f"killed-{number}"
    trainer = trainer or start(output_dir)
    if ended(trainer, draw.uniform(0.05, 0.5) * usual):
        assert finish(trainer)
        number, trainer = number + 1, None
        continue
    what, tokenizer = draw.choice(list(counts)), tokenizer_of(trainer)
    if what != "trainer":
        if tokenizer is None:  # it has done its work
            continue
        os.kill(tokenizer, signal.SIGKILL)
    counts[what] += 1
    if what != "tokenizer":
        os.kill(trainer, signal.SIGKILL)
        finish(trainer)
        trainer = None
        assert tokenizer is None or ended(tokenizer, 20), "the tokenizer outlives the trainer"
        for folder in (output_dir / "checkpoints").glob("step-*"):
            assert verify(folder) == [], folder
trainer = trainer or start(output_dir)
assert finish(trainer)
print(counts, number + 1)
"""


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")
def test_every_restart_continues_and_the_end_is_the_same_to_the_last_bit(tmp_path):
    draw = random.Random(0)
    words = "the cat dog fox owl sees hears finds likes a river house garden and goes home".split()
    with (tmp_path / "text.jsonl").open("w") as file:
        for _ in range(2000):
            file.write(json.dumps({"text": " ".join(draw.choices(words, k=draw.randint(3, 40)))}) + "\n")
    config, driver, runs = tmp_path / "config.yaml", tmp_path / "driver.py", tmp_path / "runs"
    config.write_text(SETTINGS.replace("TEXT", str(tmp_path / "text.jsonl")))
    driver.write_text(DRIVER)
    runs.mkdir()
    kills = int(os.environ.get("KILLS", "3"))
    processes = ranks.start(driver, 1, config, runs, kills, int(os.environ.get("SEED", "0")))
    ((code, out, err),) = ranks.finish(processes, timeout=120 + 20 * kills)
    assert code == 0, err + out
    print(out)

    def content(run):
        return {path.relative_to(run): path.read_bytes() for path in (run / "cache").rglob("shard-*")}

    def losses(run):
        return [json.loads(line).get("loss") for line in (run / "metrics.jsonl").read_text().splitlines()]

    whole, last = runs / "uninterrupted", f"checkpoints/step-{STEPS:08d}"
    expected, shards = load_file(whole / last / "model.safetensors"), content(whole)
    killed = list(runs.glob("killed-*"))
    assert killed and len(shards) > 10
    for run in killed:
        assert verify(run / last) == []
        for name, tensor in load_file(run / last / "model.safetensors").items():
            assert torch.equal(tensor, expected[name]), name
        assert losses(run) == losses(whole)
        assert all(shards.get(name, data) == data for name, data in content(run).items())
