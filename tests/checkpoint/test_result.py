import pytest
import torch
from torch import nn

from torchrecipes.checkpoint import CheckpointConfig, Checkpointer, KeepBest, run_result, verify
from torchrecipes.model_folder import resolve_model_folder


class Counter:
    """State beside the model."""

    value = 0

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


@pytest.fixture
def run(tmp_path):
    """A run of three steps, the second of which is the best; the weight is the step."""
    model, counter = nn.Linear(2, 1, bias=False), Counter()
    checkpointer = Checkpointer(
        tmp_path,
        CheckpointConfig(keep_best=KeepBest("eval/a/loss"), async_save=False),
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        state={"counter": counter},
    )
    for step, loss in enumerate([3.0, 1.0, 2.0], 1):
        nn.init.constant_(model.weight, step)
        counter.value = step
        checkpointer.save(step)
        checkpointer.record_metrics(step, {"eval/a/loss": loss})
    return checkpointer, model, counter


def test_the_best_checkpoint_is_restored(run):
    checkpointer, model, counter = run
    assert checkpointer.restore_best() == 2
    assert model.weight.tolist() == [[2.0, 2.0]] and counter.value == 2
    assert checkpointer.saved == checkpointer.best


def test_a_corrupt_best_checkpoint_is_not_restored(run, capsys):
    checkpointer, model, _ = run
    file = checkpointer.best / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert checkpointer.restore_best() is None
    assert model.weight.tolist() == [[3.0, 3.0]]
    assert "corrupt" in capsys.readouterr().out


def test_the_result_is_a_valid_folder_without_what_resumes(run, tmp_path):
    checkpointer, _, _ = run
    with run_result(checkpointer.best, tmp_path) as folder:
        (folder / "README.md").write_text("a card")
    result = tmp_path / "model"
    assert verify(result) == []
    names = {file.name for file in result.iterdir()}
    assert {"model.safetensors", "README.md", "manifest.json"} <= names
    assert not names & {"optimizer", "state.json", "rng.safetensors", "state"}
    assert resolve_model_folder(tmp_path) == result


def test_an_error_leaves_the_earlier_result(run, tmp_path):
    checkpointer, _, _ = run
    with run_result(checkpointer.best, tmp_path) as folder:
        (folder / "README.md").write_text("first")
    with pytest.raises(RuntimeError), run_result(checkpointer.best, tmp_path) as folder:
        (folder / "README.md").write_text("second")
        raise RuntimeError
    assert (tmp_path / "model" / "README.md").read_text() == "first" and verify(tmp_path / "model") == []
    with run_result(checkpointer.best, tmp_path) as folder:
        (folder / "README.md").write_text("third")
    assert (tmp_path / "model" / "README.md").read_text() == "third"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_without_a_result_the_newest_checkpoint_is_the_model(run, tmp_path):
    assert resolve_model_folder(tmp_path).name == "step-00000003"
    (tmp_path / "model").mkdir()  # unfinished
    (tmp_path / "model" / "manifest.json").write_text("{}")
    assert resolve_model_folder(tmp_path).name == "step-00000003"
