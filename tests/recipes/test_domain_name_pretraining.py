"""The shipped configs of domain names: `mlm_pretrain`, then `classify_finetune` from its run; names are made up."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("publicsuffixlist")

from torchrecipes.cli.run import load_recipe
from torchrecipes.config import load
from torchrecipes.config.catalog import find_config, find_recipe
from torchrecipes.data.domains import synthetic_names
from torchrecipes.models import load_hf

PRETRAINING = (
    "model={_component_: torchrecipes.models.domain_bert, hidden_size: 16, num_hidden_layers: 1, "
    "num_attention_heads: 1, intermediate_size: 16}",
    "data.source.num_names=800",
    "data.validation_fraction=0.05",
    "seq_len=128",
    "max_minutes=null",
    "max_steps=8",
    "eval_every=8",
    "checkpoint.save_every=4",
    "log.log_every=1",
)


def train(recipe, config, folder, *overrides):
    path = find_recipe(recipe)
    module = load_recipe(path)
    module.main(load(module.Config, find_config(config), [*overrides, f"output_dir={folder}"], recipe=path))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("names") / "run"
    return folder, train("mlm_pretrain", "domain_bert/quickstart", folder, *PRETRAINING)


def test_characters_and_suffixes_are_learned_and_logged(pretrained):
    _, logged = pretrained
    losses = [line["loss"] for line in logged if "loss" in line]
    assert losses[-1] < losses[0] - 0.2
    steps = [line for line in logged if "loss" in line]
    assert all({"class_loss", "class_accuracy"} <= line.keys() for line in steps)
    measured = {"loss", "accuracy", "accuracy/letter", "trigram_accuracy/letter", "fivegram_loss", "class_accuracy"}
    assert {f"eval/validation/{name}" for name in measured} <= logged[-1].keys()


def test_a_resumed_run_has_the_same_weights_in_both_files(pretrained, tmp_path):
    folder, _ = pretrained
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")
    train("mlm_pretrain", "domain_bert/quickstart", tmp_path / "run", *PRETRAINING)
    for file in ("model.safetensors", "domain_bert/model.safetensors"):
        one, two = (load_file(run / "checkpoints/step-00000008" / file) for run in (folder, tmp_path / "run"))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_a_classifier_starts_from_the_run(pretrained, tmp_path):
    folder, _ = pretrained
    names = [document.text for document in synthetic_names(40, seed=1)]
    rows = [f"{name},{'short' if len(name) < 14 else 'long'}" for name in names]
    (tmp_path / "labeled.csv").write_text("\n".join(["domain,family", *rows]) + "\n")
    given = (f"init_from={folder}", f"data.source.path={tmp_path / 'labeled.csv'}", "data.validation_fraction=0.2")
    given += ("epochs=null", "max_steps=1", "eval_every=1", "optimizer.lr=1e-9", "optimizer.adamw_lr=1e-9")
    logged = train("classify_finetune", "domain_bert/dga_detection", tmp_path / "run", *given)
    assert "eval/validation/accuracy" in logged[-1]
    start, end = (load_hf(run, head=False).state_dict() for run in (folder, tmp_path / "run" / "model"))
    assert start.keys() == end.keys()
    assert all(torch.allclose(start[key], end[key], atol=1e-6) for key in start)
