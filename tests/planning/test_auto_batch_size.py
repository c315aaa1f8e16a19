import gc
import threading
import weakref

import pytest
import torch

from torchrecipes.errors import UserError
from torchrecipes.planning import auto_batch_size
from torchrecipes.planning.auto_batch_size import find_micro_batch_size, free_memory


class Device:
    """Fakes a device: a step with more than `most` rows runs out of memory."""

    def __init__(self, most, error=torch.OutOfMemoryError):
        self.most, self.error, self.tried, self.cleaned = most, error, [], 0

    def try_step(self, rows):
        self.tried.append(rows)
        if rows > self.most:
            raise self.error("CUDA out of memory. Tried to allocate 20.00 GiB.")

    def clean_up(self):
        self.cleaned += 1


def out_of_memory_of_the_cpu():
    """What the CPU's allocator says."""
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**60, dtype=torch.uint8)
    return found.value


def test_what_the_estimate_lets_pass_is_tried_once(capsys):
    device = Device(most=16)
    assert (
        find_micro_batch_size(
            lambda rows: rows <= 13, rows_per_rank=24, try_step=device.try_step, clean_up=device.clean_up
        )
        == 12
    )
    assert device.tried == [12]
    assert capsys.readouterr().out == "micro_batch_size=auto: 12 of a rank's 24 rows per step\n"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, lambda _: out_of_memory_of_the_cpu()])
def test_after_a_failure_the_next_smaller_divisor_is_tried_and_told(error, capsys):
    device = Device(most=5, error=error)
    assert (
        find_micro_batch_size(lambda rows: True, rows_per_rank=24, try_step=device.try_step, clean_up=device.clean_up)
        == 4
    )
    assert device.tried == [24, 12, 8, 6, 4]
    assert device.cleaned == 5
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[0] == "micro_batch_size=auto: memory runs out with 24"
    assert lines[-1] == "micro_batch_size=auto: 4 of a rank's 24 rows per step"


def test_one_row_is_tried_even_if_the_estimate_is_against_it():
    device = Device(most=1)
    assert (
        find_micro_batch_size(lambda rows: False, rows_per_rank=8, try_step=device.try_step, clean_up=device.clean_up)
        == 1
    )
    assert device.tried == [1]


@pytest.mark.parametrize("estimate", [True, False])
def test_when_one_row_does_not_fit_the_message_has_remedies(estimate):
    device = Device(most=0)
    with pytest.raises(UserError, match=r"single row\. Use activation_checkpointing=selective, or full"):
        find_micro_batch_size(
            lambda rows: estimate, rows_per_rank=4, try_step=device.try_step, clean_up=device.clean_up
        )
    assert device.tried == ([4, 2, 1] if estimate else [1])


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    device = Device(most=0, error=RuntimeError)
    with pytest.raises(RuntimeError, match="Tried to allocate"):
        find_micro_batch_size(lambda rows: True, rows_per_rank=4, try_step=device.try_step, clean_up=device.clean_up)


def test_all_ranks_take_what_is_estimated_to_fit_on_each():
    """Two ranks as threads, of which one has less free memory."""
    barrier, said, chosen = threading.Barrier(2), {}, {}
    devices = [Device(most=64), Device(most=64)]
    room = [16, 5]

    def rank(number):
        def agree(value):
            said[number] = value
            barrier.wait(5)
            return min(said.values())

        fits, device = (lambda rows: rows <= room[number]), devices[number]
        chosen[number] = find_micro_batch_size(
            fits, rows_per_rank=32, try_step=device.try_step, clean_up=device.clean_up, agree=agree
        )

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert chosen == {0: 4, 1: 4}
    assert devices[0].tried == devices[1].tried == [4]


def test_with_several_processes_a_failed_trial_ends_the_run_and_says_what_to_set(monkeypatch):
    """A sharded model does not survive it: measured with `fully_shard`, the next gradients are wrong."""
    monkeypatch.setattr(auto_batch_size.collectives, "world_size", lambda: 2)
    device, told = Device(most=5), []

    def agree(value):  # a rank that fails alone must not wait for the others here
        told.append(value)
        return value

    with pytest.raises(UserError, match=r"memory runs out with 12, which was .* Set micro_batch_size=8\."):
        find_micro_batch_size(
            lambda rows: rows <= 12, rows_per_rank=24, try_step=device.try_step, clean_up=device.clean_up, agree=agree
        )
    assert device.tried == [12]
    assert told == [12]


def test_trials_draw_no_random_numbers_of_the_run():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)

    def try_step(rows):
        torch.rand(rows)
        if rows > 2:
            raise torch.OutOfMemoryError

    assert find_micro_batch_size(lambda rows: True, rows_per_rank=4, try_step=try_step, clean_up=lambda: None) == 2
    assert torch.equal(torch.rand(3), expected)


def test_a_failed_trial_leaves_nothing_in_memory():
    seen = []

    def try_step(rows):
        assert not any(tensor() is not None for tensor in seen), "tensors of the trial before are still there"
        tensor = torch.ones(rows)
        seen.append(weakref.ref(tensor))
        if rows > 1:
            raise torch.OutOfMemoryError

    gc.disable()
    try:
        assert find_micro_batch_size(lambda rows: True, rows_per_rank=8, try_step=try_step, clean_up=lambda: None) == 1
    finally:
        gc.enable()


def test_free_memory_of_the_cpu(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    whole = free_memory(cpu)
    assert 2**20 < whole < 2**50
    limit, used = tmp_path / "limit", tmp_path / "used"
    monkeypatch.setattr(auto_batch_size, "_LIMITS", ((str(limit), str(used)),))
    limit.write_text("3000000\n")
    used.write_text("1000000\n")
    assert free_memory(cpu) == 2_000_000, "a container's limit counts"
    assert free_memory(cpu, processes=4) == 500_000
    limit.write_text("max\n")
    assert free_memory(cpu) > 2**20
