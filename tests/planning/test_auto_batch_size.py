import gc
import math
import threading
import weakref
from pathlib import Path

import pytest
import torch

from torchrecipes.cli.run import load_recipe
from torchrecipes.config import load
from torchrecipes.config.catalog import find_recipe
from torchrecipes.errors import UserError
from torchrecipes.planning import auto_batch_size, auto_micro_batch_size
from torchrecipes.planning.auto_batch_size import find_micro_batch_size, free_memory
from torchrecipes.planning.fake_model import TokenizerStandIn
from torchrecipes.planning.run_estimate import estimate_run
from torchrecipes.training.run import Run


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


def find(device, fits=lambda rows: True, *, rows_per_rank, **options):
    functions = {"try_step": device.try_step, "clean_up": device.clean_up}
    return find_micro_batch_size(fits, rows_per_rank=rows_per_rank, **functions, **options)


def out_of_memory_of_the_cpu():
    """What the CPU's allocator says."""
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**60, dtype=torch.uint8)
    return found.value


def test_the_largest_divisor_that_is_estimated_to_fit_is_tried_once():
    device = Device(most=16)
    assert find(device, lambda rows: rows <= 13, rows_per_rank=24) == 12
    assert device.tried == [12]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, lambda _: out_of_memory_of_the_cpu()])
def test_after_a_failure_the_next_smaller_divisor_is_tried_and_reported(error, capsys):
    device = Device(most=5, error=error)
    assert find(device, rows_per_rank=24) == 4
    assert device.tried == [24, 12, 8, 6, 4]
    assert device.cleaned == 5
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_one_row_is_tried_even_if_the_estimate_is_against_it():
    device = Device(most=1)
    assert find(device, lambda rows: False, rows_per_rank=8) == 1
    assert device.tried == [1]


@pytest.mark.parametrize("estimate", [True, False])
def test_one_row_that_does_not_fit_is_an_error(estimate):
    device = Device(most=0)
    with pytest.raises(UserError) as error:
        find(device, lambda rows: estimate, rows_per_rank=4)
    assert (error.value.code, error.value.key) == ("out_of_memory", "micro_batch_size")
    assert "activation_checkpointing=selective" in error.value.hint
    assert device.tried == ([4, 2, 1] if estimate else [1])


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    device = Device(most=0, error=RuntimeError)
    with pytest.raises(RuntimeError):
        find(device, rows_per_rank=4)
    assert device.tried == [4]


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

        chosen[number] = find(devices[number], lambda rows: rows <= room[number], rows_per_rank=32, agree=agree)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert chosen == {0: 4, 1: 4}
    assert devices[0].tried == devices[1].tried == [4]


def test_with_several_processes_a_failed_trial_names_the_number_to_set(monkeypatch):
    """A sharded model does not survive it: measured with `fully_shard`, the next gradients are wrong."""
    monkeypatch.setattr(auto_batch_size, "world_size", lambda: 2)
    device, agreed = Device(most=5), []

    def agree(value):  # a rank that fails alone must not wait for the others here
        agreed.append(value)
        return value

    with pytest.raises(UserError) as error:
        find(device, lambda rows: rows <= 12, rows_per_rank=24, agree=agree)
    assert error.value.code == "out_of_memory" and "micro_batch_size=8" in error.value.hint
    assert device.tried == [12]
    assert agreed == [12]


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


MLM = load_recipe(find_recipe("mlm_pretrain"))
SETTINGS = """
output_dir=nowhere data.source.path=nowhere model._component_=torchrecipes.models.bert
model.hidden_size=32 model.num_hidden_layers=2 model.num_attention_heads=2 model.intermediate_size=64
seq_len=32 global_batch_size=16 max_steps=1 compute.precision=fp32 micro_batch_size=auto checkpoint.async_save=false
"""


def auto(monkeypatch, free, *settings, build_model=MLM.build_model, compute_loss=MLM.compute_loss):
    """The number of rows that is found with so many free bytes, and the model that was tried."""
    config = load(MLM.Config, None, [*SETTINGS.split(), *settings])
    monkeypatch.setattr(auto_batch_size, "free_memory", lambda *_: free)
    tokenizer = TokenizerStandIn(512)
    model = build_model(config, tokenizer)
    functions = (build_model, MLM.build_collator, compute_loss)
    run = Run(Path("nowhere"), torch.device("cpu"))
    return auto_micro_batch_size(config, tokenizer, *functions, run, model), model


def test_auto_takes_what_fits_beside_the_model(monkeypatch):
    config = load(MLM.Config, None, [*SETTINGS.split(), "tokenizer.vocab_size=512", "micro_batch_size=16"])
    memory = estimate_run(MLM, config, device="cpu")["memory"]
    needed = (memory["total"] - memory["weights"] - memory["process"]) / 0.9
    assert auto(monkeypatch, 1.001 * needed)[0] == 16
    assert auto(monkeypatch, 0.999 * needed)[0] == 8
    assert auto(monkeypatch, 0)[0] == 1
    assert auto(monkeypatch, 0, "micro_batch_size=4")[0] == 4


def test_auto_draws_no_random_number_and_leaves_no_gradient(monkeypatch):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    _, model = auto(monkeypatch, 2**40, "model.hidden_dropout_prob=0.1")
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    config = load(MLM.Config, None, [*SETTINGS.split(), "model.hidden_dropout_prob=0.1"])
    MLM.build_model(config, TokenizerStandIn(512))  # draws what building the model above has drawn
    assert torch.equal(torch.get_rng_state(), after)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_that_reads_values_trains_with_one_row(monkeypatch):
    def compute_loss(model, batch, config):
        loss, logged = MLM.compute_loss(model, batch, config)
        return (loss if loss.item() > 0 else -loss), logged

    assert auto(monkeypatch, 2**40, compute_loss=compute_loss)[0] == 1


def test_a_trial_changes_no_buffer_and_leaves_no_recorded_logits(monkeypatch):
    def compute_loss(model, batch, config):
        model.count += 1
        model.blocks[0].self_attn.max_logits += 1000
        return MLM.compute_loss(model, batch, config)

    def build_model(config, tokenizer):
        model = MLM.build_model(config, tokenizer)
        model.register_buffer("count", torch.zeros(()))
        model.blocks[0].self_attn.max_logits = torch.full((2,), -math.inf)
        return model

    _, model = auto(monkeypatch, 2**40, build_model=build_model, compute_loss=compute_loss)
    assert model.count == 0
    assert model.blocks[0].self_attn.max_logits.max() == -math.inf
