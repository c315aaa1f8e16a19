"""Components of a config: what is built for a check, what is never called, and what is wrong with them."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from torchrecipes import optim
from torchrecipes.cli.main import main
from torchrecipes.cli.run import load_recipe
from torchrecipes.config import Component, load
from torchrecipes.config.catalog import find_recipe
from torchrecipes.models import neobert, save_hf
from torchrecipes.planning import check_components
from torchrecipes.planning.component_checks import declared_type

MLM = load_recipe(find_recipe("mlm_pretrain"))
CAUSAL = load_recipe(find_recipe("causal_pretrain"))
HERE = __name__
called = []


def problems(tmp_path, *settings, recipe=MLM):
    """Key and code of every problem."""
    overrides = [f"output_dir={tmp_path / 'run'}", "data.source.path=x", "max_steps=10", *settings]
    config = load(recipe.Config, None, overrides)
    return [(error.key, error.code) for error in check_components(recipe, config)]


def undeclared(**arguments):
    called.append(arguments)


def declared_model(vocab_size: int, width: int = 8, inner: object = None) -> nn.Module:
    called.append("declared_model")
    return nn.Sequential(nn.Embedding(vocab_size, width))


def declared_scheduler(optimizer: torch.optim.Optimizer, step_size: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size)


def failing_model(vocab_size: int) -> nn.Module:
    raise RuntimeError("no such device")


def number() -> int:
    return 1


@pytest.fixture(autouse=True)
def forget():
    called.clear()


def test_defaults_have_no_problem(tmp_path):
    assert problems(tmp_path) == []
    assert problems(tmp_path, recipe=CAUSAL) == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["model", "optimizer", "lr_scheduler", "guard"])
def test_what_does_not_declare_what_it_makes_is_not_called(tmp_path, key):
    marker = tmp_path / "marker"
    assert problems(tmp_path, f"{key}={{_component_: os.system, command: 'touch {marker}'}}") == []
    assert problems(tmp_path, f"{key}={{_component_: {HERE}.undeclared, command: x}}") == []
    assert not called and not marker.exists()


def test_nested_components_have_to_declare_it_too(tmp_path):
    marker = tmp_path / "marker"
    nested = f"{{_component_: os.system, command: 'touch {marker}'}}"
    assert problems(tmp_path, f"model={{_component_: {HERE}.declared_model, inner: {nested}}}") == []
    assert not called and not marker.exists()
    nested = "{_component_: torch.nn.Linear, in_features: 2, out_features: 2}"
    assert problems(tmp_path, f"model={{_component_: {HERE}.declared_model, inner: {nested}}}") == []
    assert called


def test_schedulers_of_torch_and_annotated_functions_are_built(tmp_path):
    of_torch = "lr_scheduler={_component_: torch.optim.lr_scheduler.StepLR, step_size: 0.5}"
    assert problems(tmp_path, of_torch.replace("0.5", "5")) == []
    assert problems(tmp_path, f"lr_scheduler={{_component_: {HERE}.declared_scheduler, step_size: 5}}") == []
    assert problems(tmp_path, "lr_scheduler.warmup_steps=20") == [("lr_scheduler.warmup_steps", "out_of_range")]


@pytest.mark.parametrize(
    "key, path, code",
    [
        ("model", "torch.optim.SGD", "not_a_model"),
        ("model", f"{HERE}.number", "not_a_model"),
        ("optimizer", "torch.nn.ReLU", "not_an_optimizer"),
        ("lr_scheduler", "torch.nn.ReLU", "not_a_scheduler"),
    ],
)
def test_another_kind_of_object_is_a_problem(tmp_path, key, path, code):
    config = load(MLM.Config, None, [f"output_dir={tmp_path}", "data.source.path=x", "max_steps=1"])
    setattr(config, key, Component(path))
    (error,) = check_components(MLM, config)
    assert (error.key, error.code) == (f"{key}._component_", code)


def test_encoders_and_decoders_are_not_mixed_up(tmp_path):
    decoder = "model={_component_: torchrecipes.models.qwen3, size: tiny}"
    assert problems(tmp_path, decoder) == [("model", "wrong_direction")]
    encoder = "model={_component_: torchrecipes.models.neobert, size: tiny}"
    assert problems(tmp_path, encoder, recipe=CAUSAL) == [("model", "wrong_direction")]


def test_a_component_that_fails_is_named_with_its_line(tmp_path):
    config = load(
        MLM.Config, None, [f"output_dir={tmp_path}", "data.source.path=x", "max_steps=1", f"model={HERE}.failing_model"]
    )
    (error,) = check_components(MLM, config)
    assert (error.key, error.code) == ("model", "component_failed")
    assert "no such device" in str(error) and Path(__file__).name in str(error)


def test_seq_len_beyond_the_positions_of_a_model_or_a_folder(tmp_path):
    sizes = "hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, max_position_embeddings: 64"
    model = f"model={{_component_: torchrecipes.models.neobert, {sizes}}}"
    assert problems(tmp_path, model, "seq_len=64") == []
    assert problems(tmp_path, model, "seq_len=65") == [("seq_len", "seq_len_too_long")]


def test_a_residual_dtype_that_a_model_does_not_read(tmp_path):
    settings = [f"model._component_={HERE}.declared_model", "compute.residual=fp32"]
    assert ("compute.residual", "no_residual_dtype") in problems(tmp_path, *settings)


def test_problems_of_arguments_have_the_components_key(tmp_path):
    ((key, _),) = problems(tmp_path, "optimizer.lr=-1")
    assert key.startswith("optimizer")
    wrong = ("guard.max_skips=0", "guard.spike_window=1")
    assert problems(tmp_path, *wrong) == [("guard.max_skips", "out_of_range"), ("guard.spike_window", "out_of_range")]
    assert problems(tmp_path, "freeze=[no.such.*]") == [("freeze", "no_such_parameter")]


def test_a_name_on_the_hub_is_not_a_folder(tmp_path):
    assert problems(tmp_path, "init_from=bert-base-uncased") == [("init_from", "not_found")]
    assert problems(tmp_path, "init_from=/a/folder/of/another/machine") == []


def test_a_misspelt_run_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "names").mkdir(parents=True)
    command = ["validate", "classify_finetune", "--config", "domain_bert/dga_detection", "data.source.path=x.csv"]
    assert main([*command, "init_from=runs/nmaes"]) == 2
    err = capsys.readouterr().err
    assert "Did you mean runs/names?" in err and "hf download" not in err


def test_shares_of_a_collator_are_checked_before_the_names_are_read(capsys):
    command = ["validate", "mlm_pretrain", "--config", "domain_bert/quickstart"]
    assert main(command) == 0
    assert main([*command, "collator.mask_labels=2"]) == 2
    assert "collator.mask_labels: 2.0 is not a share" in capsys.readouterr().err


def test_a_corpus_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert problems(tmp_path, "data.corpus_dir=/a/folder/of/another/machine") == []
    for folder in (tmp_path / "file", tmp_path / "file" / "corpus"):
        assert problems(tmp_path, f"data.corpus_dir={folder}") == [("data.corpus_dir", "not_writable")]
    if os.getuid() != 0:  # root may write anywhere
        (tmp_path / "read_only").mkdir(mode=0o555)
        assert problems(tmp_path, f"data.corpus_dir={tmp_path / 'read_only'}") == [("data.corpus_dir", "not_writable")]


class Logger:
    """Needs a package that nobody has."""

    requires = "no_such_package"


def test_a_logger_whose_package_is_missing(tmp_path):
    assert problems(tmp_path, f"log.loggers=[{HERE}.Logger]") == [("log.loggers.0", "missing_package")]


def test_experts_are_not_trained_on_padding(tmp_path):
    moe = "model={_component_: torchrecipes.models.qwen3_moe, size: tiny}"
    assert problems(tmp_path, moe, "data.packing=none", recipe=CAUSAL) == [("data.packing", "padded_experts")]


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "adamw_4bit", "adamw_cpu_offload", "muon"])
def test_our_optimizers_declare_what_they_make(name):
    assert issubclass(declared_type(f"torchrecipes.optim.{name}"), torch.optim.Optimizer)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "warmup_stable_decay"])
def test_our_schedulers_declare_what_they_make(name):
    assert issubclass(declared_type(f"torchrecipes.optim.{name}"), torch.optim.lr_scheduler.LRScheduler)
    assert hasattr(optim, name)


@pytest.mark.parametrize("name", ["neobert", "bert", "gpt2", "llama", "qwen3", "qwen3_moe", "olmoe", "moe"])
def test_our_models_declare_what_they_make(name):
    assert issubclass(declared_type(f"torchrecipes.models.{name}"), nn.Module)


def test_the_model_of_a_folder_is_checked(tmp_path):
    model = neobert(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64
    )
    save_hf(model, tmp_path / "model")
    folder = f"init_from={tmp_path / 'model'}"
    assert ("tokenizer", "not_found") not in problems(tmp_path, folder, "seq_len=64")


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("optimizer=torch.optim.LBFGS", "optimizer"),
        ("lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau", "lr_scheduler"),
    ],
)
def test_what_the_loop_cannot_step_is_refused(tmp_path, setting, key):
    assert problems(tmp_path, setting) == [(key, "step_needs_arguments")]
