"""`tune-style preflight` as a user runs it."""

import json
import os
import random
import select
import signal
import subprocess
import sys

import pytest

from torchrecipes.cli.main import main
from torchrecipes.data.batching.packing import PaddedDataset
from torchrecipes.data.corpus.corpus import open_corpus
from torchrecipes.planning.preflight_checks import ROWS

SETTINGS = """
tokenizer: {_component_: torchrecipes.data.tokenizers.train_wordpiece, vocab_size: 300}
data:
  source: {_component_: torchrecipes.data.sources.files, path: TEXT}
  validation_fraction: 0.1
  tokenizer_threads: 0
model: {_component_: torchrecipes.models.neobert, size: tiny, max_position_embeddings: 64}
seq_len: 32
global_batch_size: 8
max_steps: 1000
lr_scheduler: {_component_: torchrecipes.optim.cosine, warmup_steps: 100}
eval_every: 500
"""
ONE = ("max_steps=null", "seq_len=64", "lr_scheduler.warmup_steps=2")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preflight")
    draw = random.Random(0)
    words = "the cat dog fox owl sees hears finds likes a river house garden and goes home".split()
    with (folder / "text.jsonl").open("w") as file:
        for _ in range(200):
            file.write(json.dumps({"text": " ".join(draw.choices(words, k=draw.randint(3, 40)))}) + "\n")
    (folder / "config.yaml").write_text(SETTINGS.replace("TEXT", str(folder / "text.jsonl")))
    return folder / "config.yaml"


def preflight(config, *overrides, code):
    try:
        found = main(["preflight", "mlm_pretrain", "--config", str(config), *overrides])
    except SystemExit as error:
        found = error.code
    assert found == code


def rows(output):
    found = {
        line[9:23].strip(): (line.split()[0], line[25:])
        for line in output.splitlines()
        if line.startswith(("passed", "FAILED", "skipped"))
    }
    assert "Traceback" not in output
    return found


def test_a_run_that_is_ready_passes_and_leaves_nothing_but_its_corpus(config, tmp_path, capsys):
    output_dir = tmp_path / "my run"
    preflight(config, f"output_dir={output_dir}", "data.num_workers=1", "data.packing=none", "epochs=1", *ONE, code=0)
    out = capsys.readouterr().out
    found = rows(out)
    assert {name: status for name, (status, _) in found.items()} == {
        "config": "passed",
        "output_dir": "passed",
        "resume": "passed",
        "loggers": "skipped",
        "train step": "passed",
        "checkpoint": "passed",
        "loader workers": "passed",
        "data": "passed",
        "validation": "passed",
        "duration": "passed",
        "time": "passed",
        "disk": "passed",
    }
    assert "step 5" in found["checkpoint"][1]
    train = open_corpus(output_dir / "corpus" / "train")
    assert train.num_documents == PaddedDataset(train, 64, 0).num_rows  # each document has a row of its own
    steps = -(-train.num_documents // 8)
    for number in (steps, train.num_documents, f"{steps * 8 / train.num_documents:.2f}"):
        assert str(number) in found["duration"][1]
    assert f"\nready: tune-style run mlm_pretrain --config {config} 'output_dir={output_dir}'" in out
    assert [path.name for path in output_dir.iterdir()] == ["corpus"]


def test_a_resumed_run_is_tried_from_its_checkpoint_which_stays_as_it_is(config, tmp_path, capsys):
    run = f"output_dir={tmp_path / 'run'}"
    main(
        [
            "run",
            "mlm_pretrain",
            "--config",
            str(config),
            run,
            "max_steps=3",
            "eval_every=null",
            "lr_scheduler.warmup_steps=1",
        ]
    )
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000003"
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    capsys.readouterr()
    preflight(config, run, "max_steps=3", "eval_every=null", "lr_scheduler.warmup_steps=1", code=0)
    found = rows(capsys.readouterr().out)
    assert found["resume"][0] == "passed" and str(checkpoint) in found["resume"][1]
    assert found["checkpoint"][0] == "passed" and "step 8" in found["checkpoint"][1]
    assert found["time"][0] == "passed"
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_run_that_diverges_fails_with_the_remedy(config, tmp_path, capsys):
    preflight(config, f"output_dir={tmp_path / 'run'}", "optimizer.lr=1e30", code=1)
    status, reason = rows(capsys.readouterr().out)["train step"]
    assert status == "FAILED" and "optimizer.lr" in reason


def test_a_run_that_cannot_start_fails_with_its_message(config, tmp_path, capsys):
    preflight(
        config, f"output_dir={tmp_path / 'run'}", "init_from=/no/such/folder", "model=null", "tokenizer=null", code=1
    )
    found = rows(capsys.readouterr().out)
    assert found["train step"][0] == "FAILED" and "/no/such/folder" in found["train step"][1]
    assert found["checkpoint"][0] == found["disk"][0] == "skipped"
    assert not list((tmp_path / "run").glob(".preflight-*"))


def test_sigterm_ends_the_dry_run_and_removes_its_folder(config, tmp_path):
    os.mkfifo(tmp_path / "started")
    (tmp_path / "slow.py").write_text(
        "import os, pathlib, signal\n"
        "def source():\n"
        "    pathlib.Path('started').write_text(str(os.getpid()))\n"
        "    signal.pause()\n"
    )
    command = [sys.executable, "-P", "-m", "torchrecipes.cli.main", "preflight", "mlm_pretrain", "--config", config]
    started = os.open(tmp_path / "started", os.O_RDONLY | os.O_NONBLOCK)
    process = subprocess.Popen(
        [*command, "output_dir=run", "data.source={_component_: slow.source}"],
        cwd=tmp_path,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    ready, _, _ = select.select([started], [], [], 60)
    dry_run = int(os.read(started, 99)) if ready else None
    os.close(started)
    process.terminate()
    out, err = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in err
    assert "resume" in rows(out) and "train step" not in rows(out)
    with pytest.raises(ProcessLookupError):
        os.kill(dry_run, 0)
    assert not list((tmp_path / "run").glob(".preflight-*"))


def test_a_wrong_config_skips_all_else(config, tmp_path, capsys):
    preflight(config, f"output_dir={tmp_path / 'run'}", "optimizr.lr=1", "seed=x", code=1)
    out = capsys.readouterr().out
    found = rows(out)
    assert found.pop("config")[0] == "FAILED" and "'optimizer'" in out
    assert list(found) == list(ROWS) and {status for status, _ in found.values()} == {"skipped"}
    assert not (tmp_path / "run").exists()
    preflight(config, code=1)
    assert "output_dir" in capsys.readouterr().out


def test_an_unknown_recipe_fails_with_the_nearest_name(config, capsys):
    with pytest.raises(SystemExit, match="1"):
        main(["preflight", "mlm_pretrian", "--config", str(config)])
    status, reason = rows(capsys.readouterr().out)["config"]
    assert status == "FAILED" and "mlm_pretrain" in reason


def test_a_folder_that_cannot_be_written_fails(config, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    preflight(config, f"output_dir={tmp_path / 'file' / 'run'}", code=1)
    found = rows(capsys.readouterr().out)
    assert found["config"][0] == "FAILED" and found["train step"][0] == "skipped"


def test_one_process_of_many_does_not_start_it(config, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["preflight", "mlm_pretrain", "--config", str(config)]) == 2
    assert "WORLD_SIZE" in capsys.readouterr().err
