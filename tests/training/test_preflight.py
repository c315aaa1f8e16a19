from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from torchrecipes.training import preflight as module
from torchrecipes.training.preflight import differing_tensors


def checkpoint(folder, **files):
    for name, tensors in files.items():
        file = folder / f"{name.replace('__', '/')}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, file)
    return folder


def test_one_changed_bit_is_found_and_named(tmp_path):
    tensors = {"a": torch.randn(4, 3), "b": torch.zeros(2, dtype=torch.int64)}
    first = checkpoint(tmp_path / "1", model=tensors, optimizer__shard={"exp_avg.a": torch.ones(3)})
    assert differing_tensors(first, first) == []
    other = tensors["a"].clone()
    other.view(torch.int32)[1, 1] ^= 1
    second = checkpoint(tmp_path / "2", model=tensors | {"a": other}, optimizer__shard={"exp_avg.a": torch.ones(3)})
    assert differing_tensors(first, second) == ["a"]
    third = checkpoint(tmp_path / "3", model=tensors)
    assert differing_tensors(first, third) == ["exp_avg.a"]


def test_nan_is_equal_to_itself_and_another_dtype_is_not(tmp_path):
    first = checkpoint(tmp_path / "1", model={"a": torch.tensor([float("nan"), 0.0])})
    same = checkpoint(tmp_path / "2", model={"a": torch.tensor([float("nan"), 0.0])})
    ints = checkpoint(tmp_path / "3", model={"a": torch.tensor([float("nan"), 0.0]).view(torch.int32)})
    assert differing_tensors(first, same) == [] and differing_tensors(first, ints) == ["a"]


def test_which_rank_wrote_a_tensor_does_not_matter(tmp_path):
    a, b, step = torch.randn(2, 3), torch.randn(2, 3), torch.ones(1)
    first = checkpoint(tmp_path / "1", optimizer__1={"w": a, "step": step}, optimizer__2={"w": b})
    second = checkpoint(tmp_path / "2", optimizer__1={"w": a}, optimizer__2={"w": b, "step": step})
    third = checkpoint(tmp_path / "3", optimizer__1={"w": a, "step": step}, optimizer__2={"w": a})
    assert differing_tensors(first, second) == [] and differing_tensors(first, third) == ["w"]


@pytest.mark.parametrize(("free", "status"), [(100, "failed"), (101, "passed")])
def test_the_disk_needs_room_for_all_checkpoints_that_are_kept(tmp_path, monkeypatch, free, status):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    assert module._folder(tmp_path / "new" / "run", {"kept_bytes": 101}).status == status


@pytest.mark.parametrize(("tokens", "told"), [(1000, False), (400, False), (399, True)])
def test_more_than_four_epochs_are_told(tokens, told):
    config = SimpleNamespace(rows_per_step=4, seq_len=40)
    check = module._budget(config, tokens, {"steps": 10})
    assert check.status == "passed" and f"{1600 / tokens:.2f} times" in check.reason
    assert ("teach little" in check.reason) == told


def test_a_writer_that_fails_is_named():
    check = module._writer(1, SimpleNamespace(path="here.Writer", args={}))
    assert (check.name, check.status) == ("metrics.1", "failed") and "here.Writer" in check.reason
