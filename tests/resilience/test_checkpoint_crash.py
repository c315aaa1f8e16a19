"""A save that dies at any moment: the checkpoint before it is whole, and nothing half is ever visible."""

import builtins
import os
import random
import signal
import time

import pytest
import torch

from torchrecipes.data.documents import Document
from torchrecipes.data.tokenizers import train_wordpiece
from torchrecipes.errors import UserError
from torchrecipes.models import neobert
from torchrecipes.optim import adamw
from torchrecipes.training import checkpoint as module
from torchrecipes.training.checkpoint import Checkpointer, verify


@pytest.fixture(scope="module")
def parts():
    tokenizer = train_wordpiece([Document("a small text for a small tokenizer, " * 3, "here")], vocab_size=60)
    model = neobert(64, 16, 2, 2, 32)
    optimizer = adamw(model)
    model.head(model(torch.arange(24).view(2, 12))).square().mean().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer, "tokenizer": tokenizer}


def save(checkpointer, step, parts):
    return checkpointer.save(step, **parts, state={}, config_yaml="", recipe_text="")


def visible(checkpointer):
    return sorted(path for path in checkpointer.folder.iterdir() if not path.name.startswith("."))


class Fault:
    """Fails the k-th call of what a save does to the disk."""

    def __init__(self, monkeypatch, at):
        self.at, self.calls = at, 0
        for name in ("fsync", "rename", "replace", "open", "mkdir"):
            monkeypatch.setattr(os, name, self.counting(getattr(os, name)))
        monkeypatch.setattr(module, "save_file", self.counting(module.save_file))
        monkeypatch.setattr(builtins, "open", self.counting(builtins.open))

    def counting(self, function):
        def call(*args, **kwargs):
            self.calls += 1
            if self.calls == self.at:
                raise OSError(28, "No space left on device")
            return function(*args, **kwargs)

        return call


def test_a_full_disk_at_every_call_leaves_the_last_checkpoint(parts, tmp_path):
    finished = False
    for at in range(1, 200):
        checkpointer = Checkpointer(tmp_path / str(at), keep_last=1)
        first = save(checkpointer, 1, parts)
        with pytest.MonkeyPatch.context() as monkeypatch:
            fault = Fault(monkeypatch, at)
            try:
                save(checkpointer, 2, parts)
            except UserError as error:
                assert "No space left" in str(error) and "MiB are free" in str(error)
            else:
                finished = fault.calls < at
        checkpoints = visible(checkpointer)
        assert checkpoints and all(verify(path) == [] for path in checkpoints), at
        assert checkpointer.resume("auto").step == int(checkpoints[-1].name[-8:])
        assert first in checkpoints or checkpoints[-1].name.endswith("2")
        assert save(checkpointer, 3, parts) in visible(checkpointer)  # there is room again
        if finished:
            break
    assert finished and at > 15


def test_too_little_room_is_told_before_anything_is_written(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: module.shutil._ntuple_diskusage(100, 90, 10))
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(UserError, match=r"A checkpoint takes about .* MiB, and 0 MiB are free"):
        save(checkpointer, 1, parts)
    assert list(checkpointer.folder.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_kill_at_random_instants_of_repeated_saves(parts, tmp_path):
    rng = random.Random(0)
    checkpointer = Checkpointer(tmp_path, keep_last=2)
    start = time.perf_counter()
    save(checkpointer, 1, parts)
    one_save = time.perf_counter() - start
    step = 1
    for _ in range(30):
        progress, report = os.pipe()
        child = os.fork()
        if child == 0:
            for next_step in range(step + 1, step + 1000):
                save(checkpointer, next_step, parts)
                os.write(report, b"x")
            os._exit(0)
        os.close(report)  # so that reading ends if the child does
        finished = rng.randrange(3)
        for _ in range(finished):
            assert os.read(progress, 1)
        promised = step + finished
        deadline = time.perf_counter() + rng.uniform(0, 1.5 * one_save)  # any moment of the next save
        while time.perf_counter() < deadline:
            pass
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        os.close(progress)
        checkpoints = visible(checkpointer)
        assert all(verify(path) == [] for path in checkpoints)
        resumed = Checkpointer(tmp_path).resume("auto")
        assert resumed.step >= promised and resumed.path == checkpoints[-1]
        step = resumed.step
