"""The readiness check as a user runs it."""

import json
import random

import pytest

from torchrecipes.cli.main import main

SETTINGS = """
tokenizer: {_component_: torchrecipes.data.tokenizers.train_wordpiece, vocab_size: 300}
data:
  source: {_component_: torchrecipes.data.sources.files, path: TEXT}
  validation_fraction: 0.1
  tokenize_workers: 0
model: {_component_: torchrecipes.models.neobert_tiny, max_position_embeddings: 64}
seq_len: 32
rows_per_step: 8
max_steps: 1000
schedule: {_component_: torchrecipes.optim.cosine, warmup_steps: 100}
eval_every: 500
"""


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
    return {
        line[9:27].strip(): (line.split()[0], line[27:])
        for line in output.splitlines()
        if line.startswith(("passed", "FAILED", "skipped"))
    }


def test_a_run_that_is_ready_passes_and_leaves_nothing_but_its_corpus(config, tmp_path, capsys):
    preflight(config, f"output_dir={tmp_path / 'run'}", "data.num_workers=1", code=0)
    out = capsys.readouterr().out
    found = rows(out)
    assert {name: status for name, (status, _) in found.items()} == {
        "config": "passed",
        "output_dir": "passed",
        "metrics writers": "skipped",
        "a real step": "passed",
        "checkpoint": "passed",
        "data": "passed",
        "budget": "passed",
        "loader workers": "passed",
        "time": "passed",
    }
    assert "1,000 steps see the" in found["budget"][1] and "to the last bit" in found["checkpoint"][1]
    assert f"ready: tune-style run mlm_pretrain --config {config}" in out
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["corpus"]


def test_a_run_that_diverges_at_once_fails_with_the_remedy(config, tmp_path, capsys):
    preflight(config, f"output_dir={tmp_path / 'run'}", "optimizer.lr=1e30", code=1)
    status, reason = rows(capsys.readouterr().out)["a real step"]
    assert status == "FAILED" and "not finite. Lower optimizer.lr" in reason


def test_a_run_that_cannot_start_fails_with_its_message(config, tmp_path, capsys):
    preflight(config, f"output_dir={tmp_path / 'run'}", "seq_len=100", code=1)
    found = rows(capsys.readouterr().out)
    assert found["a real step"][0] == "FAILED" and "max_position_embeddings=64" in found["a real step"][1]
    assert found["checkpoint"] == ("skipped", "because of the step")
    assert "Traceback" not in str(found)


def test_a_wrong_config_and_a_wrong_folder_fail_before_anything_runs(config, tmp_path, capsys):
    preflight(config, f"output_dir={tmp_path / 'run'}", "optimizr.lr=1", "seed=x", code=1)
    out = capsys.readouterr().out
    assert "FAILED   config" in out and "did you mean 'optimizer'?" in out and "skipped  all else" in out
    (tmp_path / "file").write_text("")
    preflight(config, f"output_dir={tmp_path / 'file' / 'run'}", code=1)
    found = rows(capsys.readouterr().out)
    assert found["output_dir"][0] == "FAILED" and found["a real step"] == ("skipped", "because of output_dir")
