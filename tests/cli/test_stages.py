"""Stages of a config, with a recipe that trains nothing: what runs, from what, in which order."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests import ranks
from torchrecipes.cli import stages
from torchrecipes.cli.main import main
from torchrecipes.config import load, read_stages
from torchrecipes.errors import UserError

RECIPE = '''
"""A recipe without training: it notes its config, and saves a checkpoint of each step."""
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from torchrecipes.checkpoint import CheckpointConfig, Checkpointer, KeepBest
from torchrecipes.config import MISSING, Component, MayChange, component, to_yaml
from torchrecipes.training.run import start_run, ComputeConfig


@dataclass
class Data:
    corpus_dir: str | None = None


@dataclass
class Config:
    output_dir: MayChange[str] = MISSING
    init_from: str | None = None
    seed: int = 0
    max_steps: int = 2
    ends: MayChange[bool] = False
    interrupted: MayChange[bool] = False
    best: int | None = None
    data: Data = field(default_factory=Data)
    optimizer: Component = component("torchrecipes.optim.adamw", injected=("model", "params"), lr=1e-3)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


def main(config):
    run = start_run(config)
    if config.init_from:
        assert (Path(config.init_from) / "model.safetensors").is_file(), config.init_from
    if config.interrupted:
        raise SystemExit(143)
    model = torch.nn.Linear(2, 2)
    options = CheckpointConfig(keep_last=9, keep_best=config.checkpoint.keep_best)
    saver = Checkpointer(run.output_dir, options, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0))
    with saver:
        for step in range(saver.resume() + 1, config.max_steps + 1):
            saver.save(step)
            loss = abs(step - config.best) if config.best else float("nan")
            saver.record_metrics(step, {"eval/domain/loss": loss})
    if run.is_main:
        with open(run.output_dir.parent / "log.jsonl", "a") as log:
            line = {"stage": run.output_dir.name, "from": config.init_from, "lr": config.optimizer.args["lr"]}
            log.write(json.dumps(line | {"seed": config.seed, "corpus": config.data.corpus_dir}) + "\\n")
    if config.ends:
        raise SystemExit(4)
'''

CONFIG = """
output_dir: OUT
seed: 1
data: {corpus_dir: "${output_dir}/corpus"}
stages:
  foundation: {optimizer.lr: 3e-5}
  left: {from: foundation, optimizer.lr: 5e-5}
  right:
    from: foundation
    optimizer: {lr: 7e-5}
  last: {from: right, optimizer.lr: 9e-5, max_steps: 3}
"""


@pytest.fixture
def staged(tmp_path, monkeypatch):
    """run(*overrides) runs the tree, and returns the lines of what ran since the call before."""
    (tmp_path / "fake.py").write_text(RECIPE)
    config, out = tmp_path / "tree.yaml", tmp_path / "out"
    config.write_text(CONFIG.replace("OUT", str(out)))
    monkeypatch.setattr("torchrecipes.cli.compare.compare_runs", lambda *args: None)
    seen = 0

    def run(*words, code=0):
        nonlocal seen
        arguments = ["run", str(tmp_path / "fake.py"), "--config", str(config), *words]
        try:
            assert main(arguments) == code
        except SystemExit as end:
            assert end.code == code
        lines = (out / "log.jsonl").read_text().splitlines() if (out / "log.jsonl").exists() else []
        new, seen = [json.loads(line) for line in lines[seen:]], len(lines)
        return new

    run.config, run.out = config, out
    return run


def names(lines):
    return [line["stage"] for line in lines]


def test_a_tree_runs_in_order_each_stage_from_the_result_of_another(staged):
    lines = staged()
    step_2 = "checkpoints/step-00000002"
    assert [(line["stage"], line["from"], line["lr"]) for line in lines] == [
        ("foundation", None, 3e-5),
        ("left", str(staged.out / "foundation" / step_2), 5e-5),
        ("right", str(staged.out / "foundation" / step_2), 7e-5),
        ("last", str(staged.out / "right" / step_2), 9e-5),
    ]
    assert {line["corpus"] for line in lines} == {str(staged.out / "corpus")}
    assert (staged.out / "last" / "checkpoints" / "step-00000003").is_dir()


def test_what_is_done_is_skipped_and_what_was_interrupted_runs(staged):
    assert names(staged("stages.right.interrupted=true", code=143)) == ["foundation", "left"]
    assert names(staged()) == ["right", "last"]
    assert staged() == []
    staged("stages.left.optimizer.lr=1e-4", code=2)  # another setting: the run says so
    staged("seed=2", code=2)


def test_the_best_checkpoint_of_a_stage_is_where_the_next_one_starts(staged):
    keep = "checkpoint.keep_best={metric: eval/domain/loss}"
    lines = staged(keep, "max_steps=4", "best=3")
    assert [line["from"] and line["from"][-1] for line in lines] == [None, "3", "3", "3"]
    other = staged.out.parent / "other"
    staged(keep, "max_steps=4", "best=3", "stages.left.from_checkpoint=last", f"output_dir={other}")
    left = json.loads((other / "log.jsonl").read_text().splitlines()[1])
    assert left["from"][-1] == "4"


def test_a_stage_without_a_best_checkpoint_leaves_nothing_to_start_from(staged, capsys):
    lines = staged("stages.foundation.checkpoint.keep_best={metric: eval/domain/loss}")  # its losses are NaN
    assert names(lines) == ["foundation"]
    printed = capsys.readouterr().out
    assert printed.count("skipped") == 3 and "from_checkpoint: last" in printed
    lines = staged(
        "stages.foundation.checkpoint.keep_best={metric: eval/domain/loss}",
        "stages.left.from_checkpoint=last",
        "stages.right.from_checkpoint=last",
    )
    assert names(lines) == ["left", "right", "last"]


def test_a_stage_that_ended_itself_gives_its_exit_code_and_its_result(staged):
    assert names(staged("stages.right.ends=true", code=4)) == ["foundation", "left", "right", "last"]
    assert names(staged("stages.right.ends=true", code=4)) == ["right"]  # asked again whether it may go on
    assert names(staged()) == ["right"]


def test_one_stage_alone(staged, capsys):
    staged("--stage", "left", code=2)
    assert "foundation" in capsys.readouterr().err
    assert names(staged("--stage", "foundation")) == ["foundation"]
    assert names(staged("--stage", "left", "seed=1")) == ["left"]
    staged("--stage", "middle", code=2)
    assert names(staged()) == ["right", "last"]


def test_settings_come_last_and_a_stage_s_own_apply_to_it_alone(staged):
    lines = staged("seed=5", "stages.left.seed=6", "stages.left.optimizer.lr=1e-4")
    assert [line["seed"] for line in lines] == [5, 5, 5, 5]  # the command line wins
    assert lines[1]["lr"] == 1e-4


def test_a_stage_of_another_config(staged, tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text("seed: 7\noptimizer: {_component_: torchrecipes.optim.adamw, lr: 0.5}\n")
    staged.config.write_text(
        f"output_dir: {staged.out}\nstages:\n  base: {{config: {base}, max_steps: 1}}\n  next: {{from: base}}\n"
    )
    lines = staged("seed=3")
    assert [(line["seed"], line["lr"]) for line in lines] == [(7, 0.5), (3, 1e-3)]


@pytest.mark.parametrize(
    ("stages", "key", "code"),
    [
        ("{a: {from: b}, b: {}}", "stages.a.from", "unknown_stage"),
        ("{a: {}, b: {from: a, from_checkpoint: newest}}", "stages.b.from_checkpoint", "wrong_type"),
        ("{a: {from_checkpoint: last}}", "stages.a.from_checkpoint", "contradiction"),
        ("{a: {}, b: {from: a, init_from: x}}", "stages.b.init_from", "contradiction"),
        ("{a: {output_dir: x}}", "stages.a.output_dir", "contradiction"),
        ("{../a: {}}", "stages.../a", "bad_name"),
        ("{checkpoints: {}}", "stages.checkpoints", "bad_name"),
        ("[a, b]", "stages", "wrong_type"),
        ("{a: 3}", "stages.a", "wrong_type"),
    ],
)
def test_what_is_wrong_with_stages(tmp_path, stages, key, code):
    config = tmp_path / "tree.yaml"
    config.write_text(f"output_dir: out\nstages: {stages}\n")
    with pytest.raises(UserError) as error:
        read_stages(config)
    assert [(problem.key, problem.code) for problem in error.value.problems] == [(key, code)]
    assert "tree.yaml:2" in str(error.value)


def test_every_stage_is_checked_before_the_first_runs(staged, capsys):
    assert staged("stages.left.max_step=5", "stages.last.optimizer.learning_rate=1", code=2) == []
    message = capsys.readouterr().err
    assert all(text in message for text in ("stage left", "max_steps", "stage last", "learning_rate"))
    assert not staged.out.exists()
    command = ["validate", str(staged.out.parent / "fake.py"), "--config", str(staged.config)]
    assert main(command) == 0 and "4 stages" in capsys.readouterr().out
    assert main([*command, "stages.left.max_step=5"]) == 2


def test_a_config_with_stages_is_no_config_of_one_run(staged, capsys):
    from dataclasses import make_dataclass

    with pytest.raises(UserError) as error:
        load(make_dataclass("Config", [("output_dir", str), ("seed", int, 0), ("data", dict, None)]), staged.config)
    (problem,) = [problem for problem in error.value.problems if problem.code == "stages"]
    assert "--stage: foundation, " in problem.hint
    assert main(["run", str(staged.out.parent / "fake.py"), "--stage", "a", "output_dir=x"]) == 2


def test_two_processes_take_a_stage_together(staged, tmp_path):
    """With our launcher, whose exit code says that a stage has ended itself."""
    command = [sys.executable, "-m", "torchrecipes.cli.main", "run", "--nproc-per-node", "2", str(tmp_path / "fake.py")]
    staged.config.write_text(f"output_dir: {staged.out}\nstages: {{only: {{ends: true}}}}\n")
    done = subprocess.run([*command, "--config", str(staged.config)], capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stderr
    assert names([json.loads(line) for line in (staged.out / "log.jsonl").read_text().splitlines()]) == ["only"]
    assert json.loads((staged.out / "only" / "stage.json").read_text())["status"] == "ended"


def test_an_estimate_has_every_stage_also_those_whose_start_has_not_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["estimate", "domain_adapt", "--config", "domain_adapt/quickstart", "--json", "max_steps=7"]) == 0
    estimates = json.loads(capsys.readouterr().out)
    assert list(estimates) == ["base", "replay_0", "replay_20"]
    assert len({estimate["parameters"]["total"] for estimate in estimates.values()}) == 1
    assert [estimate["steps"] for estimate in estimates.values()] == [None, 7, 7]
    assert list(tmp_path.iterdir()) == []


def test_a_stage_with_a_config_refers_to_the_one_that_lists_it(tmp_path, monkeypatch):
    (tmp_path / "base.yaml").write_text("seed: 1\n")
    config = tmp_path / "tree.yaml"
    config.write_text(
        "output_dir: out\ninit_from: ${oc.env:PLACE}\ndata: {path: texts}\nstages:\n"
        f"  a: {{config: {tmp_path}/base.yaml, seed: '${{data.path}}'}}\n"
        f"  b: {{config: {tmp_path}/base.yaml, init_from: '${{init_from}}'}}\n  c: {{seed: '${{data.path}}'}}\n"
    )
    monkeypatch.setenv("PLACE", "secret")
    stages = read_stages(config, ["data.path=more"])
    assert stages["a"].tree == {"seed": "more"}
    assert stages["b"].tree == {"init_from": "${init_from}"}  # what the environment gives is not written to a file
    assert stages["c"].tree == {"seed": "${data.path}"}  # `load` resolves it


def test_ranks_of_another_launcher_take_all_stages_together(staged, tmp_path):
    script = tmp_path / "start.py"
    script.write_text("from torchrecipes.cli.main import _as_process\n_as_process()\n")
    staged.config.write_text(f"output_dir: {staged.out}\nstages: {{first: {{}}, second: {{from: first}}}}\n")
    ranks.run(script, 2, "run", tmp_path / "fake.py", "--config", staged.config)
    assert names([json.loads(line) for line in (staged.out / "log.jsonl").read_text().splitlines()]) == [
        "first",
        "second",
    ]


def test_a_problem_is_reported_once_and_not_for_the_stages_that_start_from_it(staged, capsys):
    staged("stages.foundation.max_step=5", code=2)
    message = capsys.readouterr().err
    assert message.count("max_step=5") == 1 and "has not ended" not in message and "stage left" not in message
    staged("max_step=5", code=2)  # in all stages
    assert capsys.readouterr().err.count("max_step=5") == 1
    assert not staged.out.exists()


def test_the_command_line_adds_no_stage(staged, capsys):
    assert staged("stages.fondation.max_steps=5", code=2) == []
    message = capsys.readouterr().err
    assert "there is no stage 'fondation'" in message and "Did you mean 'foundation'?" in message


def test_a_reference_to_a_key_without_a_value_names_the_stage_s_line(staged, tmp_path, capsys):
    (tmp_path / "base.yaml").write_text("seed: 7\ninit_from: null\n")
    staged.config.write_text(
        f"output_dir: {staged.out}\ninit_from: ???\nstages:\n"
        f"  base: {{config: {tmp_path / 'base.yaml'}, init_from: '${{init_from}}'}}\n  next: {{from: base}}\n"
    )
    staged(code=2)
    message = capsys.readouterr().err
    assert ":4: init_from: missing key" in message
    staged.config.write_text(staged.config.read_text().replace("${init_from}", "${init_form}"))
    staged(code=2)
    assert "init_form" in capsys.readouterr().err


def test_stages_that_are_not_compared_show_their_best_values(tmp_path, monkeypatch, capsys):
    values = {"classifier": 0.75, "all": 0.875}

    def best(folder):
        value = values.get(folder.parent.name)
        return value and {"metric": "eval/validation/macro_f1", "value": value, "checkpoint": "step-00000010"}

    monkeypatch.setattr("torchrecipes.checkpoint.best.best_checkpoint", best)
    names = ("encoder", *values)
    for name in names:
        (tmp_path / name).mkdir()
    stages._compare({name: SimpleNamespace(output_dir=str(tmp_path / name)) for name in names})
    assert capsys.readouterr().out.splitlines() == [
        "classifier: eval/validation/macro_f1 0.75 (step-00000010)",
        "all: eval/validation/macro_f1 0.875 (step-00000010)",
    ]
