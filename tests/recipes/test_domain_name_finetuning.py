"""The shipped config of look-alikes through `contrastive_finetune`, on names that are made up."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("confusable_homoglyphs")

from torchrecipes.cli.run import load_recipe
from torchrecipes.config import load
from torchrecipes.config.catalog import find_config, find_recipe

RECIPE = find_recipe("contrastive_finetune")
MODEL = "hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 1, intermediate_size: 16"
OVERRIDES = (
    "init_from=null",
    "tokenizer={_component_: torchrecipes.data.domains.domain_tokenizer}",
    f"model={{_component_: torchrecipes.models.domain_bert, {MODEL}}}",
    "data.source.names={_component_: torchrecipes.data.domains.synthetic_names, num_names: 400}",
    "epochs=null",
    "max_steps=16",  # of 7 in an epoch
    "global_batch_size=64",
    "micro_batch_size=64",
    "eval_every=16",
    "checkpoint.save_every=8",
    "log.log_every=1",
)


def train(folder):
    module = load_recipe(RECIPE)
    given = [*OVERRIDES, f"output_dir={folder}"]
    module.main(load(module.Config, find_config("domain_bert/lookalikes"), given, recipe=RECIPE))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_from_lookalikes_and_resumes_with_the_same_ones(tmp_path):
    logged = train(tmp_path / "run")
    losses = [line["loss"] for line in logged if "loss" in line]
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])  # of look-alikes that it has not seen before
    assert all(f"eval/{kind}/recall@10" in logged[-1] for kind in ("homoglyph", "typo", "combo"))
    shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-00000016")
    train(tmp_path / "resumed")
    one, two = (
        load_file(tmp_path / name / "checkpoints" / "step-00000016" / "model.safetensors")
        for name in ("run", "resumed")
    )
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
