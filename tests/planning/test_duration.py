import json
import math
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests import ranks
from torchrecipes.checkpoint import CheckpointConfig
from torchrecipes.cli.run import load_recipe
from torchrecipes.config import load
from torchrecipes.config.catalog import find_recipe
from torchrecipes.data import load_text
from torchrecipes.errors import UserError
from torchrecipes.planning import duration
from torchrecipes.planning.duration import describe_epochs, planned_steps, seconds_per_step
from torchrecipes.training import start_run

TRAIN = SimpleNamespace(num_rows=1000, tokens_per_row=250.0)
VALIDATION = SimpleNamespace(num_rows=100)


def config(output_dir="nowhere", resume="auto", **keys):
    budgets = dict.fromkeys(duration.BUDGETS)
    options = {"output_dir": output_dir, "checkpoint": CheckpointConfig(resume=str(resume)), "global_batch_size": 16}
    evaluation = {"eval_every": None, "eval_sequences": None, "ema": None}
    return SimpleNamespace(**budgets | options | evaluation | keys)


def must_not_be_timed():
    raise AssertionError


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        ({"max_steps": 7}, 7),
        ({"total_tokens": 4000}, 1),
        ({"total_tokens": 4001}, 2),
        ({"epochs": 1}, 63),  # 62.5 steps see every row once
        ({"epochs": 0.5}, 32),
    ],
)
def test_a_budget_is_rounded_up(budget, steps):
    assert planned_steps(config(**budget), TRAIN, {}, must_not_be_timed) == steps


def test_epochs_of_a_stream_that_has_not_ended_are_refused():
    class Stream:
        tokens_per_row = 4.0

        @property
        def num_rows(self):
            raise UserError("not known", key="epochs", code="unfinished_stream")

    assert planned_steps(config(total_tokens=4001), Stream(), {}, must_not_be_timed) > 1
    assert describe_epochs(Stream(), 100) == "" and "1.50" in describe_epochs(SimpleNamespace(num_rows=10), 15)
    with pytest.raises(UserError) as error:
        planned_steps(config(epochs=1), Stream(), {}, must_not_be_timed)
    assert error.value.code == "unfinished_stream"


@pytest.mark.parametrize(
    ("budget", "key"),
    [
        ({}, "max_steps, total_tokens, epochs, max_minutes"),
        ({"max_steps": 5, "epochs": 1}, "max_steps, total_tokens, epochs, max_minutes"),
        ({"max_steps": 5, "max_minutes": 1}, "max_steps, total_tokens, epochs, max_minutes"),
        ({"total_tokens": 0}, "total_tokens"),
        ({"max_minutes": 0}, "max_minutes"),
    ],
)
def test_a_budget_that_is_missing_or_given_twice_is_refused(budget, key):
    with pytest.raises(UserError) as error:
        planned_steps(config(**budget), TRAIN, {}, must_not_be_timed)
    assert (error.value.code, error.value.key) == ("budget", key)


@pytest.mark.parametrize(
    ("keys", "evaluation", "every"),
    [
        ({}, 0, 1),
        ({"eval_every": 10}, 100, 10),
        ({"eval_every": 50, "eval_sequences": 32}, 32, 50),
        ({"eval_every": 50, "eval_sequences": 1000, "ema": "averages"}, 200, 50),
    ],
)
def test_minutes_have_room_for_evaluations(keys, evaluation, every):
    steps = planned_steps(config(max_minutes=2, **keys), TRAIN, {"validation": VALIDATION}, lambda: 0.1)
    evaluations = 2 + steps // every
    spent = 0.1 * (steps + evaluations * evaluation / 16 / 3)  # rows / rows of a step, forward passes alone
    assert 0.93 * 120 < spent < 0.96 * 120


def test_a_step_that_takes_longer_than_the_budget_is_taken_once():
    assert planned_steps(config(max_minutes=0.1), TRAIN, {}, lambda: 60.0) == 1


def checkpoint(folder, step, max_steps):
    path = folder / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "state.json").write_text(json.dumps({"step": step, "max_steps": max_steps}))
    return path


def test_a_resumed_run_has_the_length_that_it_was_given(tmp_path):
    checkpoint(tmp_path, 10, 321)
    newest = checkpoint(tmp_path, 20, 321)
    settings = config(tmp_path, max_minutes=1)
    assert planned_steps(settings, TRAIN, {}, must_not_be_timed) == 321
    (newest / "state.json").write_text("{")
    assert planned_steps(settings, TRAIN, {}, must_not_be_timed) == 321
    assert planned_steps(config(tmp_path, newest, max_minutes=1), TRAIN, {}, must_not_be_timed) == 321


def test_minutes_come_on_top_of_another_runs_steps(tmp_path, monkeypatch):
    path = checkpoint(tmp_path / "first", 300, 321)
    monkeypatch.setattr("torchrecipes.checkpoint.find.verify", lambda _: [])
    settings = {"max_minutes": 1, "output_dir": tmp_path / "second"}
    alone = planned_steps(config(**settings), TRAIN, {}, lambda: 0.1)
    assert planned_steps(config(resume=path, **settings), TRAIN, {}, lambda: 0.1) == 300 + alone


TINY = """
tokenizer: {_component_: torchrecipes.data.tokenizers.train_wordpiece, vocab_size: 300}
data:
  source: {_component_: torchrecipes.data.sources.files, path: TEXT, sample_by: line}
  tokenizer_threads: 0
  validation_fraction: 0.1
model:
  _component_: torchrecipes.models.neobert
  hidden_size: 32
  num_hidden_layers: 1
  num_attention_heads: 2
  intermediate_size: 64
  max_position_embeddings: 64
seq_len: 32
global_batch_size: 8
micro_batch_size: MICRO
max_minutes: 0.01
compute: {precision: fp32, strategy: auto}
"""


def write_tiny(folder, micro_batch_size="2"):
    words = random.Random(0).choices("the cat dog fox owl sees hears finds likes a river house".split(), k=4000)
    (folder / "text.txt").write_text("\n".join(" ".join(words[i : i + 20]) for i in range(0, 4000, 20)))
    text = TINY.replace("TEXT", str(folder / "text.txt")).replace("MICRO", micro_batch_size)
    (folder / "tiny.yaml").write_text(text)


def time_steps(folder):
    """The seconds of a step, and whether random numbers, files and memory are as before."""
    duration.TIMED = 0.05
    recipe = load_recipe(find_recipe("mlm_pretrain"))
    settings = load(recipe.Config, f"{folder}/tiny.yaml", [f"output_dir={folder}/run"])
    built = []

    def build_model(*args):
        built.append(recipe.build_model(*args))
        return built[-1]

    stdout = sys.stdout
    run, text = start_run(settings), load_text(settings, causal=False)

    def now():
        files = {str(path): path.stat().st_mtime_ns for path in run.output_dir.rglob("*")}
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), files

    before = now()
    objective = (settings, text.tokenizer, build_model, recipe.build_collator, recipe.compute_loss)
    seconds = seconds_per_step(*objective, run, text.train)
    sys.stdout = stdout  # `start_run` silences the other ranks
    return seconds, before == now(), len(built) > 0


@pytest.mark.parametrize("micro_batch_size", ["2", "auto"])
def test_timing_steps_changes_nothing(tmp_path, monkeypatch, micro_batch_size):
    monkeypatch.setattr(duration, "TIMED", duration.TIMED)  # restores it
    write_tiny(tmp_path, micro_batch_size)
    seconds, unchanged, is_the_recipes = time_steps(str(tmp_path))
    assert 0 < seconds < math.inf and unchanged and is_the_recipes


def test_ranks_agree_on_the_time_of_a_step(tmp_path):
    write_tiny(tmp_path)
    (first, *_), (second, *_) = ranks.call(time_steps, str(tmp_path))
    assert first == second > 0
