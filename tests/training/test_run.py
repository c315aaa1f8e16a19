import os
import random
import subprocess
import sys
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from torchrecipes.checkpoint import CheckpointConfig
from torchrecipes.config import Component, component
from torchrecipes.errors import UserError
from torchrecipes.training import ComputeConfig, LogConfig, start_run


@dataclass
class Config:
    output_dir: str = ""
    seed: int = 1
    max_grad_norm: float = 1.0
    optimizer: Component = component("torch.optim.AdamW", lr=1e-3)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)


def config(folder, resume="auto", log_every=10, **changes):
    config = Config(str(folder), checkpoint=CheckpointConfig(resume=resume), log=LogConfig(log_every=log_every))
    return replace(config, **changes)


def refused(code, folder, **changes):
    """The error with which a start is refused."""
    with pytest.raises(UserError) as error:
        start_run(config(folder, **changes))
    assert error.value.code == code
    return error.value


@pytest.fixture
def started(tmp_path):
    """The folder of a run that has a checkpoint."""
    start_run(config(tmp_path))
    (tmp_path / "checkpoints" / "step-00000010").mkdir(parents=True)
    return tmp_path


def test_every_generator_is_seeded(tmp_path):
    def draw():
        start_run(config(tmp_path))
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw() == draw()


def test_the_config_is_kept_in_the_folder(tmp_path):
    run = start_run(config(tmp_path / "new" / "run"))
    assert run.output_dir == tmp_path / "new" / "run"
    text = (run.output_dir / "config.yaml").read_text()
    assert "max_grad_norm: 1.0" in text and "async_save" in text
    assert sorted(path.name for path in run.output_dir.iterdir()) == [".lock", "config.yaml"]


def test_the_first_lines_say_what_the_run_has(tmp_path, capsys):
    start_run(config(tmp_path, compute=ComputeConfig(precision="fp32")))
    out = capsys.readouterr().out
    for part in (str(tmp_path), "1 process", "CPU", "float32", "torch.optim.AdamW", "lr=0.001"):
        assert part in out


def test_another_runs_folder_is_refused_with_what_differs(started):
    before = (started / "config.yaml").read_text()
    error = str(refused("other_settings", started, max_grad_norm=2.0, log_every=20))
    assert "max_grad_norm: saved 1.0, current 2.0" in error and "log_every" not in error
    assert (started / "config.yaml").read_text() == before


def test_keys_that_may_change_change(started):
    start_run(config(started, log_every=20, compute=ComputeConfig(activation_checkpointing="full")))
    assert "log_every: 20" in (started / "config.yaml").read_text()


def test_a_folder_without_checkpoints_may_be_used_again(tmp_path):
    start_run(config(tmp_path))
    start_run(config(tmp_path, max_grad_norm=2.0))


def test_resume_never_does_not_overwrite_checkpoints(started):
    assert refused("would_overwrite", started, resume="never").key == "checkpoint.resume"


def test_a_run_in_the_place_of_a_checkpoint_is_refused_with_its_newest_one(started, tmp_path):
    error = refused("not_a_checkpoint", tmp_path / "other", resume=str(started))
    assert error.key == "checkpoint.resume" and "step-00000010" in error.hint
    refused("not_a_checkpoint", tmp_path / "other", resume=str(tmp_path / "none"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    tmp_path.chmod(0o500)
    assert refused("not_writable", tmp_path / "run").key == "output_dir"


def test_a_file_in_the_folders_place_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    error = refused("not_writable", tmp_path / "run")
    assert error.key == "output_dir" and str(tmp_path / "run") in str(error)


def test_two_processes_do_not_train_into_one_folder(tmp_path):
    script = (
        "import sys\nfrom pathlib import Path\nfrom torchrecipes.errors import UserError\n"
        "from torchrecipes.file_lock import lock_folder\n"
        "try:\n    lock_folder(Path(sys.argv[1]))\nexcept UserError as error:\n    print(error.code)"
    )

    def other():
        return subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)

    run = start_run(config(tmp_path))
    assert other().stdout == "locked\n"
    del run
    assert other().stdout == ""
