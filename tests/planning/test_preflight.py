import json
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from torchrecipes.checkpoint.checkpointer import CheckpointConfig
from torchrecipes.cli.run import load_recipe
from torchrecipes.config import Component, load
from torchrecipes.config.catalog import find_recipe
from torchrecipes.errors import UserError
from torchrecipes.planning import preflight_checks as module

GIB = 2**30


@pytest.mark.parametrize(("free", "status"), [(100, "failed"), (101, "passed")])
def test_the_disk_needs_room_for_the_checkpoints_existing_ones_included(tmp_path, monkeypatch, free, status):
    there = tmp_path / "checkpoints" / "step-00000001"
    there.mkdir(parents=True)
    (there / "model.safetensors").write_bytes(bytes(200))
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    check = module._writable(tmp_path, {"checkpoint_bytes": 301}, 1)
    assert check.status == status and ("checkpoint.keep_last" in check.reason) == (status == "failed")
    assert module._room("disk", tmp_path, 301, 1, freed=1).status == "passed"


def test_a_folder_in_use_fails(tmp_path, monkeypatch):
    (tmp_path / ".lock").touch()

    def locked(_):
        raise UserError("another process", code="locked")

    monkeypatch.setattr(module, "lock_folder", locked)
    check = module._writable(tmp_path, {}, 4)
    assert check.status == "failed" and "another process" in check.reason


def duration_config(**more):
    keys = {"global_batch_size": 4, "max_steps": None, "total_tokens": None, "epochs": None, "seq_len": 8}
    return SimpleNamespace(**keys | {"lr_scheduler": Component("torchrecipes.optim.cosine", {})} | more)


@pytest.mark.parametrize(("num_rows", "warned"), [(100, False), (10, False), (9, True)])
def test_more_than_four_epochs_give_a_warning(num_rows, warned):
    rows = SimpleNamespace(num_rows=num_rows, tokens_per_row=5.0)
    for budget in ({"max_steps": 10}, {"total_tokens": 200}):  # 10 steps of 4 rows of 5 tokens that are no padding
        check, steps = module._duration(duration_config(**budget), rows, 1.0)
        assert (check.status, steps) == ("passed", 10) and f" {40 / num_rows:.2f} times" in check.reason
        assert ("Warning" in check.reason) == warned


def test_minutes_are_planned_by_the_steps_of_the_dry_run():
    rows = SimpleNamespace(num_rows=100, tokens_per_row=5.0)
    more = {"checkpoint": CheckpointConfig(resume="never"), "output_dir": "x", "eval_every": None}
    check, steps = module._duration(duration_config(max_minutes=1, **more), rows, 0.1)
    assert check.status == "passed" and 500 < steps < 600 and "about" in check.reason


def test_the_dry_run_has_no_minutes_beside_its_steps(tmp_path, monkeypatch):
    class Tried(Exception):
        """Ends the preflight."""

    def steps(dry_run):
        raise Tried(*dry_run.command, *dry_run._settings("auto"))

    monkeypatch.setattr(module.DryRun, "steps", steps)
    keys = {"output_dir": tmp_path, "checkpoint": CheckpointConfig(), "max_minutes": 4}
    keys |= {"log": SimpleNamespace(loggers=[]), "data": SimpleNamespace(corpus_dir=None)}
    with pytest.raises(Tried) as tried:
        list(
            module.preflight(
                None, SimpleNamespace(**keys, compute=SimpleNamespace(device="cpu")), ["run", "max_minutes=4"]
            )
        )
    given = dict(word.split("=", 1) for word in tried.value.args if "=" in word)
    budgets = ("max_steps", "total_tokens", "epochs", "max_minutes")
    assert [name for name in budgets if given[name] != "null"] == ["max_steps"]


def test_a_scheduler_that_does_not_fit_the_duration_fails():
    schedule = Component("torchrecipes.optim.cosine", {"warmup_steps": 20})
    rows = SimpleNamespace(num_rows=100, tokens_per_row=5.0)
    check, steps = module._duration(duration_config(max_steps=10, lr_scheduler=schedule), rows, 1.0)
    assert (check.status, steps) == ("failed", None) and "warmup_steps" in check.reason


def lines(*seconds, **more):
    line = {"loss": 2.0, "grad_norm": 1.0, "peak_memory_gib": 1.5}
    return [
        line | {"step": n, "tokens": 100 * n, "tokens_per_second": 100 / s} | more for n, s in enumerate(seconds, 1)
    ]


def test_the_time_is_that_of_the_median_step():
    typical = module._typical(lines(1, 2, 30, 3, 1.5))
    assert typical["step"] == 4
    assert "1.0 hours" in module._time(1200, typical).reason
    reason = module._time(10, typical | {"mfu": 0.5}).reason
    assert "0.5 minutes" in reason and "50.0%" in reason


@pytest.mark.parametrize("key", ["loss", "grad_norm"])
def test_a_loss_or_gradient_that_is_not_finite_fails(key):
    made = lines(1, 1, 1, 1, 1)
    assert module._step(made, 24 * GIB).status == "passed" and "1.50 of 24 GiB" in module._step(made, 24 * GIB).reason
    made[3][key] = None
    check = module._step(made, None)
    assert check.status == "failed" and "step 4" in check.reason


def test_gradients_may_overflow_in_fp16_but_the_loss_may_not():
    made = [line | {"grad_norm": None, "loss_scale": 2.0**15} for line in lines(1, 1, 1, 1, 1)]
    assert module._step(made, None).status == "passed"
    made[0]["loss"] = None
    assert module._step(made, None).status == "failed"


@pytest.mark.parametrize("factor, status", [(1.0, "passed"), (1.5, "failed")])
def test_a_device_with_other_gradients_than_the_cpu_fails(monkeypatch, factor, status):
    """A device whose kernels are wrong is a loss whose gradients are wrong the second time."""
    recipe = load_recipe(find_recipe("mlm_pretrain"))
    overrides = ["output_dir=nowhere", "data.source.path=nowhere", "model.hidden_size=32", "model.num_hidden_layers=1"]
    overrides += ["model.num_attention_heads=2", "model.intermediate_size=64", "tokenizer.vocab_size=300"]
    config = load(recipe.Config, None, [*overrides, "max_steps=1", "seq_len=16", "compute.precision=fp32"])
    real, calls = recipe.compute_loss, []

    def compute_loss(model, batch, config):
        loss, sums = real(model, batch, config)
        calls.append(1)
        return loss * (factor if len(calls) == 2 else 1.0), sums

    monkeypatch.setattr(recipe, "compute_loss", compute_loss)
    monkeypatch.setattr(module, "choose_device", lambda _: torch.device("cpu"))
    check = module._gradients(recipe, config)
    assert check.status == status, check.reason


class Repeats:
    """Stands for a dry run: what differs without and with deterministic=true."""

    def __init__(self, without, with_it):
        self.answers, self.past = {False: without, True: with_it}, 0

    def repeat(self, deterministic=False):
        if isinstance(self.answers[deterministic], Exception):
            raise self.answers[deterministic]
        return self.answers[deterministic]


@pytest.mark.parametrize(
    ("without", "with_it", "config", "status", "said"),
    [
        ([], None, False, "passed", "step 5"),
        (["w"], [], False, "passed", "compute.deterministic=true"),
        (["w"], ["w"], False, "failed", "compute.deterministic=true"),
        (["w"], UserError("no such kernel"), False, "failed", "no such kernel"),
        (["a", "b", "c", "d"], None, True, "failed", "a; b; c"),
        (UserError("broken"), None, False, "failed", "broken"),
    ],
)
def test_nondeterministic_kernels_are_told_from_incomplete_checkpoints(
    tmp_path, monkeypatch, without, with_it, config, status, said
):
    def repeat(dry_run):
        return Repeats(without, with_it).repeat(dry_run.deterministic)

    monkeypatch.setattr(module.DryRun, "steps", lambda dry_run: folders.append(dry_run.folder))
    monkeypatch.setattr(module.DryRun, "repeat", repeat)
    folders = []
    check = module._repeated(module.DryRun([], tmp_path / "run", tmp_path), 2**20, config, lambda _: None)
    assert (check.name, check.status) == ("checkpoint", status) and said in check.reason
    assert folders == ([tmp_path / "deterministic"] if with_it is not None else [])


@pytest.mark.parametrize("error", [ConnectionError("no server"), SystemExit("log in"), UserError("no package")])
def test_a_logger_that_fails_is_named_with_its_message(monkeypatch, error):
    def build(*_, **__):
        raise error

    monkeypatch.setattr(module, "build", build)
    check = module._logger(1, Component("here.Writer", {}))
    assert (check.name, check.status) == ("loggers.1", "failed") and str(error) in check.reason
    assert "here.Writer" in check.reason


def test_a_logger_leaves_nothing_in_the_runs_folder(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    board = Component("torchrecipes.training.loggers.TensorBoard", {"folder": str(tmp_path / "board")})
    assert module._logger(0, board).status == "passed" and not (tmp_path / "board").exists()


def test_weights_and_biases_is_tried_offline(monkeypatch):
    begun, logged = {}, []

    def init(**given):
        begun.update(given)
        return SimpleNamespace(log=lambda values, step: logged.append(values), finish=lambda: logged.append("end"))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    check = module._logger(0, Component("torchrecipes.training.loggers.WandB", {"project": "p"}))
    assert check.status == "passed"
    assert begun["mode"] == "offline" and logged == [{"step": 0, "preflight": 1.0}, "end"]


def test_the_folder_of_a_killed_preflight_is_removed_and_a_running_ones_is_not(tmp_path, monkeypatch):
    (tmp_path / ".preflight-dead").mkdir()
    (tmp_path / ".preflight-busy").mkdir()
    lock = module.lock_folder

    def answers(folder):
        if folder.name == ".preflight-busy":
            raise UserError("locked")
        return lock(folder)

    monkeypatch.setattr(module, "lock_folder", answers)
    with module._own_folder(tmp_path) as folder:
        assert folder.is_dir() and not (tmp_path / ".preflight-dead").exists()
    assert [path.name for path in tmp_path.iterdir()] == [".preflight-busy"]


@dataclass
class Config:
    output_dir: str
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    seed: int = 1


def test_corrupt_checkpoints_and_other_settings_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "to_yaml", lambda config: "seed: 1\n")
    config = Config(str(tmp_path))
    assert module._resume(config)[0].status == "passed"
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    check, found = module._resume(config)
    assert check.status == "failed" and found is None
    (tmp_path / "config.yaml").write_text(json.dumps({"seed": 0}))
    assert "seed: saved 0, current 1" in module._resume(config)[0].reason
    config.checkpoint.resume = "never"
    assert module._resume(config)[0].status == "failed"
