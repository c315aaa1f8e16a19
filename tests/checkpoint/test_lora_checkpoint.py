"""Checkpoints of models with LoRA: merged weights, a folder for peft, and an exact resume."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests import ranks
from torchrecipes.checkpoint import CheckpointConfig, Checkpointer, verify
from torchrecipes.distributed.fsdp import init_on_device, parallelize
from torchrecipes.errors import UserError
from torchrecipes.models import bert, load_hf, load_lora
from torchrecipes.modules import apply_lora
from torchrecipes.modules.lora import lora_layers
from torchrecipes.optim import adamw
from torchrecipes.training.ema import EMA

LAYERS = 2 * 4


class Training:
    """A small model with LoRA that trains into a folder; its base comes from a seed."""

    def __init__(self, folder, seed=0, strategy="none", ema=False, **options):
        with torch.device("meta"):
            self.model = bert(
                vocab_size=62, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=47
            )
            apply_lora(self.model, **{"rank": 3, "targets": "all_linear", "modules_to_save": ["head.bias"]} | options)
        parallelize(self.model, strategy, torch.device("cpu"), torch.float32)
        init_on_device(self.model, torch.device("cpu"), seed)
        self.optimizer = adamw(self.model, lr=1e-2)
        self.ema = EMA(self.model, 0.5) if ema else None
        self.checkpointer = Checkpointer(
            folder,
            CheckpointConfig(),
            model=self.model,
            optimizer=self.optimizer,
            state={"ema": self.ema} if ema else None,
        )

    def train(self, steps):
        for step in range(steps):
            ids = torch.arange(step, step + 24).view(2, 12) % 60
            self.model.head(self.model(ids)).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.ema:
                self.ema.update()

    def save(self, step):
        with self.checkpointer as checkpointer:
            return checkpointer.save(step)


def ids():
    return torch.arange(24).view(2, 12)


def logits(model):
    return model.head(model.eval()(ids()))


def test_resuming_is_exact_to_the_last_bit(tmp_path):
    first = Training(tmp_path)
    first.train(3)
    path = first.save(3)
    first.train(3)
    second = Training(tmp_path, seed=7)  # everything comes from the checkpoint, the frozen base too
    assert second.checkpointer.resume() == 3 and verify(path) == []
    second.train(3)
    left, right = first.model.state_dict(), second.model.state_dict()
    assert left.keys() == right.keys() and len(lora_layers(first.model)) == LAYERS
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def test_the_folder_is_a_merged_model_and_has_an_adapter(tmp_path):
    training = Training(tmp_path)
    training.train(3)
    path = training.save(3)
    plain = load_hf(path, report=lambda _: None)
    assert not lora_layers(plain) and (logits(plain) - logits(training.model)).abs().max() < 1e-5
    base = bert(vocab_size=62, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=47)
    assert (logits(base) - logits(training.model)).abs().max() > 1e-3
    assert torch.equal(logits(load_lora(base, path)), logits(training.model))
    assert json.loads((path / "adapter" / "adapter_config.json").read_text())["r"] == 3


def test_averaged_weights_are_merged_too(tmp_path):
    training = Training(tmp_path, ema=True)
    training.train(3)
    path = training.save(3)
    with training.ema.averaged():
        expected = logits(training.model)
    assert (logits(load_hf(path / "ema", report=lambda _: None)) - expected).abs().max() < 1e-5
    assert (logits(training.model) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("options", [{"alpha": 3}, {"rank": 4}, {"targets": "attention"}])
def test_other_settings_are_refused(tmp_path, options):
    Training(tmp_path).save(3)
    with pytest.raises(UserError) as error:
        Training(tmp_path, **options).checkpointer.resume()
    assert error.value.code in ("other_model", "other_optimizer", "other_state")


def test_a_run_without_lora_does_not_resume_one_with_it(tmp_path):
    Training(tmp_path).save(3)
    model = bert(vocab_size=62, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=47)
    with pytest.raises(UserError) as error:
        Checkpointer(tmp_path, model=model, optimizer=adamw(model)).resume()
    assert error.value.code == "other_state"


def on_ranks(folder, strategy, resume):
    """What a rank sees of a run that trains, or resumes after another number of ranks."""
    training = Training(folder, seed=7 if resume else 0, strategy=strategy)
    if resume:
        assert training.checkpointer.resume() == 3
    else:
        training.train(3)
        training.save(3)
    out = training.model.head(training.model(ids())).double()
    return {"sum": out.abs().sum().item(), "logits": out[0, 0, :4].tolist()}


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_ranks_write_what_one_process_writes(tmp_path, strategy):
    one = Training(tmp_path / "one")
    one.train(3)
    path = one.save(3)
    expected = one.model.head(one.model(ids())).double()[0, 0, :4]
    first = ranks.call(on_ranks, str(tmp_path / "two"), strategy, False)
    other = tmp_path / "two" / "checkpoints" / path.name
    assert verify(other) == []
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        ours, theirs = load_file(path / name), load_file(other / name)
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert (value - theirs[key]).abs().max() < 1e-5, key
    assert ranks.call(on_ranks, str(tmp_path / "two"), strategy, True) == first
    resumed = Training(tmp_path / "two", seed=7)  # on one process
    assert resumed.checkpointer.resume() == 3
    assert (resumed.model.head(resumed.model(ids())).double()[0, 0, :4] - expected).abs().max() < 1e-4
