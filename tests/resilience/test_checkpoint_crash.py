"""A save that dies at any moment: the checkpoint before it is valid, and nothing incomplete is ever visible."""

import builtins
import io
import json
import os
import random
import resource
import shutil
import signal
import time

import pytest
import torch

from torchrecipes.checkpoint import CheckpointConfig, Checkpointer, KeepBest, find_checkpoint, verify
from torchrecipes.data.sources.records import Document
from torchrecipes.data.tokenizers.load import train_wordpiece
from torchrecipes.errors import UserError
from torchrecipes.models import hub, neobert
from torchrecipes.optim import adamw


@pytest.fixture(scope="module")
def parts():
    tokenizer = train_wordpiece([Document("a small text for a small tokenizer, " * 3, "here")], vocab_size=60)
    model = neobert(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    optimizer = adamw(model)
    model.head(model(torch.arange(24).view(2, 12))).square().mean().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer, "tokenizer": tokenizer}


class Held:
    """State with a tensor."""

    def state_dict(self):
        return {"step": 1, "tensor": torch.arange(3.0)}

    def load_state_dict(self, state):
        pass


def make(output_dir, parts, **options):
    options = CheckpointConfig(**({"async_save": False} | options))
    return Checkpointer(output_dir, options, **parts, state={"held": Held()})


def visible(checkpointer):
    return sorted(checkpointer.folder.glob("step-*"))


def files(path):
    return sorted(file for file in path.rglob("*") if file.is_file())


class Fault:
    """Fails the k-th call of what a save does to the disk."""

    def __init__(self, monkeypatch, at):
        self.at, self.calls = at, 0
        for name in ("fsync", "rename", "replace", "open", "mkdir", "chmod"):
            monkeypatch.setattr(os, name, self.counting(getattr(os, name)))
        monkeypatch.setattr(hub, "save_file", self.counting(hub.save_file))
        for where in (builtins, io):  # io.open is what pathlib calls
            monkeypatch.setattr(where, "open", self.counting(where.open))

    def counting(self, function):
        def call(*args, **kwargs):
            self.calls += 1
            if self.calls == self.at:
                raise OSError(28, "No space left on device")
            return function(*args, **kwargs)

        return call


def test_a_full_disk_at_every_call_leaves_the_last_checkpoint(parts, tmp_path):
    finished = False
    checkpointer = make(tmp_path, parts, keep_last=1)
    before = checkpointer.save(1)
    for at in range(1, 200):
        with pytest.MonkeyPatch.context() as monkeypatch:
            fault = Fault(monkeypatch, at)
            try:
                checkpointer.save(2 * at)
            except UserError as error:
                assert error.code == "cannot_save" and "No space left" in str(error)
            else:
                finished = fault.calls < at
        checkpoints = visible(checkpointer)
        assert checkpoints and all(verify(path) == [] for path in checkpoints), at
        assert find_checkpoint(tmp_path) == (checkpoints[-1], {})
        assert before in checkpoints or int(checkpoints[-1].name[-8:]) == 2 * at
        before = checkpointer.save(2 * at + 1)  # there is room again
        assert before in visible(checkpointer)
        if finished:
            break
    assert finished and at > 40


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_file_that_cannot_be_written_to_its_end_leaves_the_last_checkpoint(parts, tmp_path):
    """The kernel refuses to let a file grow beyond a limit, in the middle of a write, in Python and in safetensors."""
    checkpointer = make(tmp_path, parts, keep_last=1)
    sizes = sorted({file.stat().st_size for file in files(checkpointer.save(1))})
    outcomes = []
    for limit in [size + more for size in sizes if size for more in (-1, 0)]:
        report, write = os.pipe()
        child = os.fork()
        if child == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                checkpointer.save(2)
                outcome = "saved"
            except UserError as error:
                outcome = f"{error.code} {error}"
            except BaseException as error:
                outcome = f"not a message: {error!r}"
            os.write(write, outcome.encode())
            os._exit(0)
        os.close(write)
        with open(report, "rb") as stream:
            outcomes.append(stream.read().decode())
        os.waitpid(child, 0)
        reported = outcomes[-1].startswith("cannot_save") and "File too large" in outcomes[-1]
        assert outcomes[-1] == "saved" or reported, (limit, outcomes[-1])
        (visible_one,) = visible(checkpointer)
        assert verify(visible_one) == [] and visible_one.name[-1] == ("2" if outcomes[-1] == "saved" else "1"), limit
        assert outcomes[-1] == "saved" or os.listdir(checkpointer.folder) == [visible_one.name]
    assert outcomes[-1] == "saved" and "saved" not in outcomes[:-1]


def test_a_power_cut_finds_everything_on_the_disk_before_it_can_be_seen(parts, tmp_path, monkeypatch):
    """By the order of calls: each file's last byte is flushed, then the folder, then it gets its name, then that is."""
    events = []

    def recorded(name, function):
        def call(*args):
            result = function(*args)
            status = os.fstat(args[0]) if name == "fsync" else os.stat(args[1])
            events.append((name, status.st_ino, status.st_size))
            return result

        return call

    monkeypatch.setattr(os, "fsync", recorded("fsync", os.fsync))
    monkeypatch.setattr(os, "rename", recorded("rename", os.rename))
    checkpointer = make(tmp_path, parts, keep_last=1)
    checkpointer.save(1)
    events.clear()
    path = checkpointer.save(2)

    def of(name, place):
        return name, place.stat().st_ino, place.stat().st_size

    appears = events.index(of("rename", path))
    flushed = [events.index(of("fsync", file)) for file in files(path) if file.name != "manifest.json"]
    manifest = events.index(of("fsync", path / "manifest.json"))
    assert set(json.loads((path / "manifest.json").read_text())["files"]) == {
        str(file.relative_to(path)) for file in files(path) if file.name != "manifest.json"
    }
    folder = max(i for i, event in enumerate(events[:appears]) if event[:2] == of("fsync", path)[:2])
    assert max(flushed) < manifest < folder < appears
    named = [i for i, event in enumerate(events) if event[:2] == of("fsync", checkpointer.folder)[:2] and i > appears]
    parent = [i for i, event in enumerate(events) if event[:2] == of("fsync", tmp_path)[:2] and i > appears]
    pruned = [i for i, event in enumerate(events) if event[0] == "rename" and i > appears]
    assert named and parent and pruned and max(named[0], parent[0]) < pruned[0]


def test_too_little_room_is_reported_before_anything_is_written(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    checkpointer = make(tmp_path, parts)
    with pytest.raises(UserError) as error:
        checkpointer.save(1)
    assert error.value.code == "cannot_save" and "0 MiB" in str(error.value)
    assert list(checkpointer.folder.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_kill_at_random_instants_of_repeated_saves(parts, tmp_path):
    rng = random.Random(0)
    checkpointer = make(tmp_path, parts, keep_last=2, keep_best=KeepBest("loss"))
    start = time.perf_counter()
    checkpointer.save(1)
    one_save = time.perf_counter() - start
    step = 1
    for _ in range(30):
        progress, report = os.pipe()
        child = os.fork()
        if child == 0:
            for next_step in range(step + 1, step + 1000):
                checkpointer.save(next_step)
                checkpointer.record_metrics(next_step, {"loss": float(next_step % 3)})
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
        found, corrupt = find_checkpoint(tmp_path)
        step = int(found.name[-8:])
        assert step >= promised and found == checkpoints[-1] and not corrupt
        checkpointer._ours.add(found)  # as after resuming
        if step > 4:
            best = checkpointer.folder / "best"
            assert verify(best) == [] and int(os.readlink(best)[-8:]) % 3 == 0
