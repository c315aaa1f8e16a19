"""The pretraining recipes on a GPU: compiled, in bf16, with selective activation checkpointing."""

import json
import math
import random
import shutil
from functools import partial

import pytest
import torch
import torch._dynamo
from safetensors.torch import load_file

from torchrecipes.cli.run import load_recipe
from torchrecipes.config import load
from torchrecipes.config.catalog import find_recipe
from torchrecipes.data import Loader
from torchrecipes.planning import check_components

pytestmark = pytest.mark.gpu

STEPS = 8
SETTINGS = f"""
data:
  source: {{_component_: torchrecipes.data.sources.files, path: TEXT}}
  validation_fraction: 0.1
  tokenizer_threads: 0
seq_len: 256
global_batch_size: 8
micro_batch_size: 4
max_steps: {STEPS}
optimizer: {{lr: 2e-3}}
eval_every: {STEPS}
log: {{log_every: 1}}
checkpoint: {{save_every: 4}}
compute:
  precision: bf16
  compile: true
  activation_checkpointing: selective
"""
SIZES = "num_hidden_layers: 2, num_attention_heads: 4, intermediate_size: 256, max_position_embeddings: 256"
DECODER = f"{SIZES}, hidden_size: 128, num_key_value_heads: 2, head_dim: 64"
MODELS = {
    "neobert": ("mlm_pretrain", "train_wordpiece", f"{SIZES}, hidden_size: 256"),
    "qwen3": ("causal_pretrain", "train_bpe", DECODER),
    "qwen3_moe": (
        "causal_pretrain",
        "train_bpe",
        f"{DECODER}, moe_intermediate_size: 128, num_experts: 4, num_experts_per_tok: 2",
    ),
}
ALL = pytest.mark.parametrize("model", MODELS)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Documents of 5 to 70 words with a grammar: every row holds several, or its attention would be another kernel."""
    rng = random.Random(0)
    nouns, verbs = ["cat", "dog", "fox", "owl", "bee", "ant", "cow", "hen"], ["sees", "hears", "finds", "likes"]
    path = tmp_path_factory.mktemp("text") / "animals.jsonl"
    with path.open("w") as file:
        for _ in range(3000):
            sentences = [f"the {rng.choice(nouns)} {rng.choice(verbs)} a {rng.choice(nouns)}"] * rng.randint(1, 12)
            file.write(json.dumps({"text": " and ".join(sentences)}) + "\n")
    return path


@pytest.fixture
def train(text, tmp_path, tmp_path_factory):
    """train("qwen3", "name", "key=value", ...) runs a recipe into a folder of that name, which it returns."""

    def run(model, name, *overrides):
        recipe_name, tokenizer, sizes = MODELS[model]
        config = tmp_path / f"{model}.yaml"
        components = (
            f"tokenizer: {{_component_: torchrecipes.data.tokenizers.{tokenizer}, vocab_size: 512}}\n"
            f"model: {{_component_: torchrecipes.models.{model}, {sizes}}}\n"
        )
        config.write_text(SETTINGS.replace("TEXT", str(text)) + components)
        path = find_recipe(recipe_name)
        recipe = load_recipe(path)
        corpus = tmp_path_factory.getbasetemp() / f"corpus-{tokenizer}"
        settings = [f"output_dir={tmp_path / name}", f"data.corpus_dir={corpus}", *overrides]
        recipe.main(load(recipe.Config, config, settings, recipe=path, check=partial(check_components, recipe)))
        return tmp_path / name

    yield run
    torch.use_deterministic_algorithms(False)
    torch.cuda.set_sync_debug_mode("default")


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@ALL
def test_losses_are_those_of_a_cpu_in_fp32(train, monkeypatch, model):
    found = losses(train(model, "gpu"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    expected = losses(train(model, "cpu", "compute.precision=fp32", "compute.compile=false"))
    assert len(found) == STEPS and found == pytest.approx(expected, abs=0.1)
    assert found[-1] < found[0] - 0.5 < math.log(512)


@ALL
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(train, tmp_path, model):
    whole = train(model, "whole", "compute.deterministic=true")
    last = f"checkpoints/step-{STEPS:08d}"
    shutil.copytree(whole, tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / last)
    resumed = train(model, "stopped", "compute.deterministic=true")
    assert losses(resumed) == losses(whole)
    ours, theirs = (load_file(run / last / "model.safetensors") for run in (resumed, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@ALL
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_between_logs_nothing_waits_for_the_gpu_and_nothing_is_compiled(train, monkeypatch, model, optimizer):
    next_step, graphs = Loader.next_step, []

    def watched(loader):
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        torch.cuda.set_sync_debug_mode("error" if len(graphs) > 5 and len(graphs) % 20 else "default")
        return next_step(loader)

    monkeypatch.setattr(Loader, "next_step", watched)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    settings = ["max_steps=60", "log.log_every=20", "checkpoint.save_every=null", "eval_every=null"]
    train(model, "run", f"optimizer._component_=torchrecipes.optim.{optimizer}", *settings)
    assert len(graphs) == 60 and graphs[5] == graphs[-1] > 0


@pytest.mark.parametrize("precision", ["float8", "float8_rowwise"])
def test_losses_in_float8_are_near_those_in_bf16(train, precision):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0 or higher")
    sizes = ["max_steps=4", "model.hidden_size=1040", "model.intermediate_size=4112", "checkpoint.save_every=null"]
    expected = losses(train("qwen3", "bf16", *sizes))
    found = losses(train("qwen3", "float8", *sizes, f"compute.precision={precision}"))
    assert found == pytest.approx(expected, abs=0.1) and found != expected
