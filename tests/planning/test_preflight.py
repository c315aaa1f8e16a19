import json
import sys
from types import SimpleNamespace

import pytest

from torchrecipes.config import Component
from torchrecipes.errors import UserError
from torchrecipes.planning import preflight_checks as module
from torchrecipes.planning.preflight_checks import preflight

GIB = 2**30


@pytest.mark.parametrize(("free", "status"), [(100, "failed"), (101, "passed")])
def test_the_disk_needs_room_for_the_checkpoints_that_are_kept_those_that_are_there_counted(
    tmp_path, monkeypatch, free, status
):
    there = tmp_path / "checkpoints" / "step-00000001"
    there.mkdir(parents=True)
    (there / "model.safetensors").write_bytes(bytes(200))
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    check = module._writable(tmp_path, {"checkpoint_bytes": 301}, 1)
    assert check.status == status and ("lower keep_last" in check.reason) == (status == "failed")
    assert module._room("disk", tmp_path, 301, 1, freed=1).status == "passed"


def test_a_folder_that_another_run_trains_into_is_told(tmp_path, monkeypatch):
    (tmp_path / ".lock").touch()

    def locked(_):
        raise UserError("another process trains into it")

    monkeypatch.setattr(module, "_lock", locked)
    assert module._writable(tmp_path, {}, 4).reason == "another process trains into it"


def budget_config(**more):
    keys = {"global_batch_size": 4, "max_steps": None, "total_tokens": None, "epochs": None, "seq_len": 8}
    return SimpleNamespace(**keys | {"lr_scheduler": Component("torchrecipes.optim.cosine", {})} | more)


@pytest.mark.parametrize(("num_rows", "warned"), [(100, False), (10, False), (9, True)])
def test_more_than_four_epochs_are_warned_of(num_rows, warned):
    rows = SimpleNamespace(num_rows=num_rows, tokens_per_row=5.0)
    for budget in ({"max_steps": 10}, {"total_tokens": 200}):  # 10 steps of 4 rows of 5 tokens that are no padding
        check, steps = module._budget(budget_config(**budget), rows)
        assert (check.status, steps) == ("passed", 10) and f" {40 / num_rows:.2f} times" in check.reason
        assert ("Warning" in check.reason) == warned


def test_a_schedule_that_does_not_fit_the_budget_fails_though_the_trial_has_another():
    schedule = Component("torchrecipes.optim.cosine", {"warmup_steps": 20})
    rows = SimpleNamespace(num_rows=100, tokens_per_row=5.0)
    check, steps = module._budget(budget_config(max_steps=10, lr_scheduler=schedule), rows)
    assert (check.status, steps) == ("failed", None) and "warmup_steps: 20" in check.reason


def lines(*seconds, **more):
    line = {"loss": 2.0, "grad_norm": 1.0, "peak_memory_gib": 1.5}
    return [
        line | {"step": n, "tokens": 100 * n, "tokens_per_second": 100 / s} | more for n, s in enumerate(seconds, 1)
    ]


def test_the_time_is_that_of_the_middle_step_without_the_first_and_the_last():
    typical = module._typical(lines(1, 2, 30, 3, 1.5))
    assert typical["step"] == 4
    assert module._time(1200, typical).reason.startswith("1,200 steps of 3.00 s: 1.0 hours; ")
    assert module._time(10, typical | {"mfu": 0.5}).reason.startswith("10 steps of 3.00 s: 0.5 minutes, MFU 50.0%")


@pytest.mark.parametrize("key", ["loss", "grad_norm"])
def test_a_loss_or_gradient_that_is_not_finite_fails(key):
    made = lines(1, 1, 1, 1, 1)
    assert module._step(made, 24 * GIB).status == "passed" and "1.50 of 24 GiB" in module._step(made, 24 * GIB).reason
    made[3][key] = None
    check = module._step(made, None)
    assert check.status == "failed" and check.reason.startswith("step 4: ")


class Repeats:
    """Stands for a trial: what differs without and with deterministic=true."""

    def __init__(self, without, with_it):
        self.answers, self.past = {False: without, True: with_it}, 0

    def repeat(self, deterministic=False):
        if isinstance(self.answers[deterministic], Exception):
            raise self.answers[deterministic]
        return self.answers[deterministic]


@pytest.mark.parametrize(
    ("without", "with_it", "config", "status", "said"),
    [
        ([], None, False, "passed", "step 5 repeated to the last bit"),
        (["w"], [], False, "passed", "to the last bit with deterministic=true"),
        (["w"], ["w"], False, "failed", "with deterministic=true, too"),
        (["w"], UserError("no such kernel"), False, "failed", "ends: no such kernel"),
        (["a", "b", "c", "d"], None, True, "failed", "differs: a; b; c; and 1 more"),
        (UserError("broken"), None, False, "failed", "does not resume: broken"),
    ],
)
def test_kernels_that_round_at_random_are_told_from_checkpoints_that_lack_something(
    tmp_path, monkeypatch, without, with_it, config, status, said
):
    def repeat(trial):
        return Repeats(without, with_it).repeat(trial.deterministic)

    monkeypatch.setattr(module.Trial, "steps", lambda trial: folders.append(trial.folder))
    monkeypatch.setattr(module.Trial, "repeat", repeat)
    folders = []
    check = module._repeated(module.Trial([], tmp_path / "run", tmp_path), 2**20, config, lambda _: None)
    assert (check.name, check.status) == ("checkpoint", status) and said in check.reason
    assert folders == ([tmp_path / "deterministic"] if with_it is not None else [])


@pytest.mark.parametrize("error", [ConnectionError("no server"), SystemExit("log in"), UserError("no package")])
def test_a_writer_that_fails_is_named_with_its_message(monkeypatch, error):
    def build(*_, **__):
        raise error

    monkeypatch.setattr(module, "build", build)
    check = module._writer(1, Component("here.Writer", {}))
    assert (check.name, check.status) == ("loggers.1", "failed") and str(error) in check.reason
    assert check.reason.startswith("here.Writer: ")


def test_a_writer_takes_its_value_away_from_the_run_and_from_the_network(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    board = Component("torchrecipes.training.loggers.TensorBoard", {"folder": str(tmp_path / "board")})
    assert module._writer(0, board).status == "passed" and not (tmp_path / "board").exists()


def test_weights_and_biases_is_tried_offline_and_says_so(monkeypatch):
    begun, logged = {}, []

    def init(**given):
        begun.update(given)
        return SimpleNamespace(log=lambda values, step: logged.append(values), finish=lambda: logged.append("end"))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    check = module._writer(0, Component("torchrecipes.training.loggers.WandB", {"project": "p"}))
    assert check.status == "passed" and "not tried" in check.reason
    assert begun["mode"] == "offline" and logged == [{"step": 0, "preflight": 1.0}, "end"]


def test_the_folder_of_a_killed_preflight_is_removed_and_one_at_work_is_left(tmp_path, monkeypatch):
    (tmp_path / ".preflight-dead").mkdir()
    (tmp_path / ".preflight-busy").mkdir()
    lock = module._lock

    def answers(folder):
        if folder.name == ".preflight-busy":
            raise UserError("locked")
        return lock(folder)

    monkeypatch.setattr(module, "_lock", answers)
    with module._own_folder(tmp_path) as folder:
        assert folder.is_dir() and not (tmp_path / ".preflight-dead").exists()
    assert [path.name for path in tmp_path.iterdir()] == [".preflight-busy"]


def test_a_recipe_without_the_common_keys_is_told_and_not_tried(tmp_path):
    first, *rest = preflight(SimpleNamespace(output_dir=str(tmp_path), data=SimpleNamespace()), [])
    assert first.status == "failed" and "data.corpus_dir" in first.reason and "lr_scheduler" in first.reason
    assert {check.status for check in rest} == {"skipped"}


def resume_config(folder, **more):
    return SimpleNamespace(output_dir=str(folder), resume="auto", keep_last=3, **more)


def test_damaged_checkpoints_fail_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "to_yaml", lambda config: "seed: 1\n")
    assert module._resume(resume_config(tmp_path))[0].reason.startswith("there is no checkpoint")
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    check, found = module._resume(resume_config(tmp_path))
    assert check.status == "failed" and "is damaged" in check.reason and found is None
    (tmp_path / "config.yaml").write_text(json.dumps({"seed": 0}))
    assert "seed: 0 there, 1 now" in module._resume(resume_config(tmp_path))[0].reason


def test_another_corpus_than_the_checkpoints_fails(tmp_path):
    resumed = SimpleNamespace(path=tmp_path / "step-00000003", state={"corpus": "old"})
    corpus = SimpleNamespace(fingerprint="new", folder=tmp_path, num_documents=1, num_tokens=2)
    config = SimpleNamespace(resume="auto")
    assert "Bring the old corpus back" in module._data(config, corpus, resumed).reason
    resumed.state["corpus"] = "new"
    assert module._data(config, corpus, resumed).status == "passed"
