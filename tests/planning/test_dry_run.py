import os
import signal
import sys

import pytest
import torch
from safetensors.torch import save_file

from torchrecipes.errors import UserError
from torchrecipes.planning.dry_run import STEPS, DryRun, contents, differing, message_of, run, size


def checkpoint(folder, state="{}", **files):
    for name, tensors in files.items():
        file = folder / f"{name.replace('__', '/')}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, file)
    (folder / "state.json").write_text(state)
    return contents(folder)


def test_one_changed_bit_is_found_and_named(tmp_path):
    tensors = {"a": torch.randn(4, 3), "b": torch.zeros(2, dtype=torch.int64), "step": torch.tensor(3.0)}
    first = checkpoint(tmp_path / "1", model=tensors, optimizer__shard={"exp_avg.a": torch.ones(3)})
    assert differing(first, first) == [] and len(first) == 5
    other = tensors["a"].clone()
    other.view(torch.int32)[1, 1] ^= 1
    second = checkpoint(tmp_path / "2", model=tensors | {"a": other}, optimizer__shard={"exp_avg.a": torch.ones(3)})
    assert differing(first, second) == ["a"]
    third = checkpoint(tmp_path / "3", model=tensors | {"step": torch.tensor(4.0)})
    assert differing(first, third) == differing(third, first) == ["exp_avg.a", "step"]


def test_tensors_are_compared_bit_for_bit(tmp_path):
    first = checkpoint(tmp_path / "1", model={"a": torch.tensor([float("nan"), 0.0])})
    same = checkpoint(tmp_path / "2", model={"a": torch.tensor([float("nan"), 0.0])})
    minus = checkpoint(tmp_path / "3", model={"a": torch.tensor([float("nan"), -0.0])})
    ints = checkpoint(tmp_path / "4", model={"a": torch.tensor([float("nan"), 0.0]).view(torch.int32)})
    assert differing(first, same) == [] and differing(first, minus) == differing(first, ints) == ["a"]


def test_the_rank_that_wrote_a_tensor_does_not_matter(tmp_path):
    a, b, step = torch.randn(2, 3), torch.randn(2, 3), torch.ones(1)
    first = checkpoint(tmp_path / "1", optimizer__1={"w": a, "step": step}, optimizer__2={"w": b})
    second = checkpoint(tmp_path / "2", optimizer__1={"w": a}, optimizer__2={"w": b, "step": step})
    third = checkpoint(tmp_path / "3", optimizer__1={"w": a, "step": step}, optimizer__2={"w": a})
    fourth = checkpoint(tmp_path / "4", '{"rng": 1}', optimizer__1={"w": a, "step": step}, optimizer__2={"w": b})
    assert differing(first, second) == [] and differing(first, third) == ["w"]
    assert differing(first, fourth) == ["state.json"]


# A run in four lines: `weight` is its model, "lost" is what it keeps in memory and no checkpoint has.
SCRIPT = """
import json, pathlib, sys, torch
from safetensors.torch import load_file, save_file
given = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
out, end, kind = pathlib.Path(given["output_dir"]), int(given["max_steps"]), given["kind"]
saved = sorted(out.glob("checkpoints/step-*"))
weight, start, lost = torch.zeros(1), 0, 0
if saved:
    weight, start = load_file(saved[-1] / "model.safetensors")["w"], int(saved[-1].name[5:])
out.mkdir(parents=True, exist_ok=True)
lines = (out / "metrics.jsonl").read_text().splitlines()[:start] if start else []
for step in range(start + 1, end + 1):
    lost += 1
    weight += lost if kind == "forgets" else step
    lines.append(json.dumps({"step": step, "loss": 1.0 if kind != "forgets" else float(lost), "grad_norm": 1.0}))
    if step % int(given["checkpoint.save_every"]) == 0 or step == end:
        folder = out / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        save_file({"w": weight}, folder / "model.safetensors")
(out / "metrics.jsonl").write_text("\\n".join(lines) + "\\n")
"""


@pytest.mark.parametrize(("kind", "differs"), [("whole", []), ("forgets", ["loss", "w"])])
def test_a_run_is_repeated_and_a_gap_in_its_checkpoint_shows(tmp_path, kind, differs):
    command = [sys.executable, "-c", SCRIPT, f"kind={kind}"]
    dry_run = DryRun(command, tmp_path / "run", tmp_path / "corpus")
    assert [line["step"] for line in dry_run.steps()] == list(range(1, STEPS + 1))
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved == [f"step-{STEPS - 1:08d}", f"step-{STEPS:08d}"]
    assert dry_run.repeat() == differs
    assert dry_run.checkpoint_bytes() == size(tmp_path / "run" / "checkpoints" / saved[-1]) > 0


def test_a_run_that_saves_nothing_cannot_be_repeated(tmp_path):
    dry_run = DryRun([sys.executable, "-c", SCRIPT, "kind=whole"], tmp_path / "run", tmp_path / "corpus")
    with pytest.raises(UserError) as error:
        dry_run.repeat()
    assert error.value.code == "no_checkpoint" and "step-00000005" in str(error.value)


def test_the_message_of_a_mistake_has_no_warnings():
    stderr = "/lib/torch/x.py:7: UserWarning: old\n  warn(x)\nseq_len: too long\n  lower it\n"
    assert message_of(2, stderr) == "seq_len: too long\n  lower it"
    assert "3" in message_of(3, "")


def test_the_message_of_a_bug_is_its_exception():
    with pytest.raises(UserError) as caught:
        run(
            [
                sys.executable,
                "-c",
                "def f():\n    raise ValueError('seven')\ntry:\n    1/0\nexcept ValueError: pass\nfinally: f()",
            ]
        )
    message = str(caught.value)
    assert caught.value.code == "dry_run_failed"
    assert message.startswith("ValueError: seven") and "File" not in message


def test_a_killed_run_may_have_run_out_of_memory():
    with pytest.raises(UserError) as error:
        run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    assert "SIGKILL" in str(error.value) and "micro_batch_size" in str(error.value)
    run([sys.executable, "-c", "import sys; print('x' * 10**6, file=sys.stderr)"])  # no pipe that fills up


def test_an_interruption_ends_the_dry_run_first(tmp_path, monkeypatch):
    code = "import os, signal; open('pid', 'w').write(str(os.getpid())); os.kill(os.getppid(), 2); signal.pause()"
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            run([sys.executable, "-c", code])
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
