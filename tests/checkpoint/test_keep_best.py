import json
import math
import os

import pytest
import torch
from torch import nn

from torchrecipes.checkpoint import CheckpointConfig, Checkpointer, KeepBest, verify
from torchrecipes.errors import UserError
from torchrecipes.models import load_hf_weights


class Training:
    """A model of two weights, the first of which is the last evaluation's loss."""

    def __init__(self, folder, mode="min", keep_last=1, resume="auto", metric="eval/validation/loss", **options):
        self.model = nn.Linear(2, 1, bias=False)
        keep_best = mode and KeepBest(metric, mode)
        self.checkpointer = Checkpointer(
            folder,
            CheckpointConfig(keep_last=keep_last, keep_best=keep_best, resume=resume, **options),
            model=self.model,
            optimizer=torch.optim.SGD(self.model.parameters(), lr=0.1),
        )
        self.step = self.checkpointer.resume()

    def evaluate(self, *losses):
        """A step for each loss: saved, then evaluated."""
        for loss in losses:
            self.step += 1
            with torch.no_grad():
                self.model.weight[0, 0] = loss
            self.checkpointer.save(self.step)
            self.checkpointer.record_metrics(self.step, {"eval/validation/loss": loss, "eval/validation/other": 0.0})
        self.checkpointer.wait()
        return self

    @property
    def kept(self):
        return [int(path.name[5:]) for path in sorted(self.checkpointer.folder.glob("step-*"))]

    @property
    def best(self):
        link = self.checkpointer.folder / "best"
        assert os.path.lexists(link) == link.exists()  # never to a checkpoint that is gone
        return int(os.readlink(link)[5:]) if link.exists() else None


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize(("mode", "best"), [("min", 2), ("max", 3)])
def test_the_best_checkpoint_stays_beside_the_newest(tmp_path, mode, best, async_save):
    training = Training(tmp_path, mode, async_save=async_save).evaluate(3.0, 1.0, 5.0, 2.0, 4.0)
    assert training.best == best and training.kept == [best, 5]
    assert Training(tmp_path / "other", mode, keep_last=2).evaluate(3.0, 1.0, 5.0, 2.0, 4.0).kept == [best, 4, 5]


def test_the_first_of_equals_is_best(tmp_path):
    assert Training(tmp_path).evaluate(1.0, 1.0, 1.0).best == 1


def test_it_survives_a_restart(tmp_path):
    Training(tmp_path).evaluate(3.0, 1.0, 5.0)
    training = Training(tmp_path)
    assert training.step == 3
    assert training.evaluate(2.0, 4.0).best == 2 and training.kept == [2, 5]
    assert Training(tmp_path).evaluate(0.5).best == 6


def test_nan_is_never_best(tmp_path):
    training = Training(tmp_path).evaluate(math.nan, math.nan)
    assert training.best is None and training.kept == [2]
    assert training.evaluate(7.0, math.nan).best == 3 and training.kept == [3, 4]
    assert training.evaluate(math.inf, -math.inf).best == 6


def test_an_unknown_metric_is_refused_with_those_there_are(tmp_path):
    training = Training(tmp_path, metric="eval/loss")
    with pytest.raises(UserError) as error:
        training.evaluate(1.0)
    assert (error.value.code, error.value.key) == ("unknown_metric", "checkpoint.keep_best.metric")
    assert "eval/validation/other" in str(error.value)
    with pytest.raises(UserError):  # before anything was saved, too
        training.checkpointer.record_metrics(0, {"eval/validation/loss": 1.0})


def test_an_evaluation_without_a_checkpoint_is_not_recorded(tmp_path):
    training = Training(tmp_path).evaluate(2.0)
    training.checkpointer.record_metrics(0, {"eval/validation/loss": 1.0})
    training.checkpointer.record_metrics(2, {"eval/validation/loss": 1.0})
    assert training.best == 1


def test_another_run_resumes_or_starts_from_the_link(tmp_path):
    Training(tmp_path / "run").evaluate(3.0, 1.0, 5.0)
    best = tmp_path / "run" / "checkpoints" / "best"
    assert verify(best) == []
    other = Training(tmp_path / "other", resume=str(best))
    assert other.step == 2 and other.model.weight[0, 0] == 1.0
    fresh = nn.Linear(2, 1, bias=False)
    load_hf_weights(fresh, best)  # as init_from does
    assert fresh.weight[0, 0] == 1.0
    with pytest.raises(UserError) as error:  # in the same folder it would mix two runs
        Training(tmp_path / "run", resume=str(best))
    assert error.value.code == "newer_checkpoints"


def test_evaluations_are_saved_before_they_are_made(tmp_path):
    with_best, without = Training(tmp_path).checkpointer, Training(tmp_path, mode=None).checkpointer
    assert with_best.is_due(7, is_evaluated=True) and not without.is_due(7, is_evaluated=True)
    assert not with_best.is_due(7) and with_best.is_due(500) and with_best.is_due(7, is_last=True)


def test_another_metric_or_mode_begins_anew(tmp_path):
    Training(tmp_path).evaluate(1.0, 2.0)
    training = Training(tmp_path, mode="max").evaluate(0.5)
    assert training.best == 3
    assert training.evaluate(0.1).kept == [3, 4]


def test_without_keep_best_nothing_points_to_a_checkpoint_that_is_gone(tmp_path):
    Training(tmp_path).evaluate(1.0, 2.0)
    training = Training(tmp_path, mode=None).evaluate(3.0)
    assert training.kept == [3] and training.best is None


def test_a_best_checkpoint_that_was_replaced_does_not_keep_its_value(tmp_path):
    """The best one was corrupt, the run resumed from the one before it, and came to its step again."""
    training = Training(tmp_path, keep_last=3).evaluate(3.0, 2.0, 1.0)
    assert training.best == 3
    (training.checkpointer.folder / "step-00000003" / "model.safetensors").write_bytes(b"")
    training = Training(tmp_path, keep_last=3)
    assert training.step == 2
    assert training.evaluate(2.5).best == 3  # its weights are others now, and there is no better one that is known
    assert training.evaluate(2.6).best == 3


@pytest.mark.parametrize("content", [b"", b"[]", b'{"checkpoint": "step-00000009", "manifest": "x"}', b"\xff"])
def test_a_broken_record_is_no_record(tmp_path, content):
    training = Training(tmp_path).evaluate(1.0)
    (training.checkpointer.folder / "best.json").write_bytes(content)
    assert training.evaluate(2.0).best == 2


def test_a_power_cut_between_record_and_link_is_repaired(tmp_path):
    training = Training(tmp_path).evaluate(1.0, 2.0)
    (training.checkpointer.folder / "best").unlink()
    os.symlink("step-00000002", training.checkpointer.folder / "best")
    os.symlink("step-00000002", training.checkpointer.folder / ".incomplete-best")
    training = Training(tmp_path)
    training.step = 2
    assert training.evaluate(3.0).best == 1 and not os.path.lexists(training.checkpointer.folder / ".incomplete-best")


@pytest.mark.parametrize("on_save_error", ["stop", "continue"])
def test_a_disk_that_is_full_for_the_record_is_a_failed_save(tmp_path, monkeypatch, on_save_error):
    training = Training(tmp_path, on_save_error=on_save_error).evaluate(2.0)
    training.checkpointer.save(2)
    training.checkpointer.wait()

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torchrecipes.checkpoint.best.write_atomically", full)
    if on_save_error == "continue":
        training.checkpointer.record_metrics(2, {"eval/validation/loss": 1.0})
    else:
        with pytest.raises(UserError) as error:
            training.checkpointer.record_metrics(2, {"eval/validation/loss": 1.0})
        assert error.value.code == "cannot_save"
    assert training.best == 1 and training.checkpointer.saved.name == "step-00000002"


def test_a_file_system_without_links_has_the_record(tmp_path, monkeypatch):
    def unsupported(*_args):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("pathlib.Path.symlink_to", unsupported)
    training = Training(tmp_path).evaluate(1.0, 2.0)
    assert training.best is None and training.kept == [1, 2]
    assert json.loads((training.checkpointer.folder / "best.json").read_text())["checkpoint"] == "step-00000001"


def test_a_checkpoint_beyond_a_limit_is_not_the_best(tmp_path):
    keep = KeepBest("eval/domain/loss", at_most={"eval/general/change_percent": 3.0})
    training = Training(tmp_path)

    def evaluate(step, domain, change):
        training.checkpointer.save(step)
        training.checkpointer.record_metrics(step, {"eval/domain/loss": domain, "eval/general/change_percent": change})

    training.checkpointer.options.keep_best = keep
    evaluate(1, 2.0, 3.1)
    assert training.checkpointer.best is None
    evaluate(2, 3.0, 3.0)
    evaluate(3, 1.0, math.nan)
    evaluate(4, 2.5, -1.0)
    assert training.checkpointer.best.name == "step-00000004" and training.best == 4
    keep.at_most["eval/general/change_percent"] = 5.0  # another rule begins anew
    evaluate(5, 2.7, 4.0)
    assert training.best == 5 and training.kept == [4, 5]
    with pytest.raises(UserError) as error:
        training.checkpointer.record_metrics(5, {"eval/domain/loss": 1.0})
    assert (error.value.code, error.value.key) == ("unknown_metric", "checkpoint.keep_best.at_most")
