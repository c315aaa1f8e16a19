import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from torchrecipes.errors import UserError
from torchrecipes.training.run import start_run

CONFIG = "output_dir: a\nseed: 1\noptimizer:\n  lr: 0.001\nlog_every: 10\n"


def start(folder, config=CONFIG, resume="auto", seed=1):
    return start_run(folder, seed=seed, config_yaml=config, resume=resume)


def test_every_generator_is_seeded(tmp_path):
    def draw():
        start(tmp_path)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw() == draw()


def test_the_config_is_kept_in_the_folder(tmp_path):
    start(tmp_path / "new" / "run")
    assert (tmp_path / "new" / "run" / "config.yaml").read_text() == CONFIG


def test_another_runs_folder_is_refused_with_what_differs(tmp_path):
    start(tmp_path)
    (tmp_path / "checkpoints" / "step-00000010").mkdir(parents=True)
    with pytest.raises(UserError, match=r"(?s)optimizer.lr: 0.001 there, 0.002 now.*output_dir=OTHER") as error:
        start(tmp_path, CONFIG.replace("0.001", "0.002").replace("log_every: 10", "log_every: 20"))
    assert "log_every" not in str(error.value)
    assert (tmp_path / "config.yaml").read_text() == CONFIG


def test_what_only_changes_how_a_run_is_watched_may_change(tmp_path):
    start(tmp_path)
    (tmp_path / "checkpoints" / "step-00000010").mkdir(parents=True)
    start(tmp_path, CONFIG.replace("log_every: 10", "log_every: 20"))


def test_a_folder_without_checkpoints_may_be_used_again(tmp_path):
    start(tmp_path)
    start(tmp_path, CONFIG.replace("0.001", "0.002"))


def test_resume_never_does_not_write_over_checkpoints(tmp_path):
    (tmp_path / "checkpoints" / "step-00000010").mkdir(parents=True)
    with pytest.raises(UserError, match="resume=never"):
        start(tmp_path, resume="never")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="output_dir: cannot write"):
        start(tmp_path / "run")


def test_a_file_in_the_folders_place_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="output_dir: cannot write"):
        start(tmp_path / "run")


def test_two_processes_do_not_train_into_one_folder(tmp_path):
    script = (
        "import sys\nfrom torchrecipes.training.run import start_run\n"
        "start_run(sys.argv[1], seed=0, config_yaml='', resume='auto')"
    )

    def other():
        return subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)

    run = start(tmp_path)
    refused = other()
    assert refused.returncode == 1 and f"another process trains into {tmp_path}" in refused.stderr
    del run
    assert other().returncode == 0
