"""A mixture of experts with Muon on several processes: the same run as on one, to rounding."""

import json
import random
import shutil

import pytest
from safetensors.torch import load_file

from tests import ranks
from torchrecipes.config.catalog import find_recipe

STEPS = 20
SETTINGS = f"""
tokenizer: {{_component_: torchrecipes.data.tokenizers.train_bpe, vocab_size: 300}}
data:
  source: {{_component_: torchrecipes.data.sources.files, path: TEXT, sample_by: line}}
  corpus_dir: CORPUS
  validation_fraction: 0.1
  tokenizer_threads: 0
model:
  _component_: torchrecipes.models.moe
  hidden_size: 32
  num_hidden_layers: 2
  num_attention_heads: 4
  num_key_value_heads: 2
  intermediate_size: 64
  moe_intermediate_size: 16
  num_experts: 5
  num_experts_per_tok: 2
  router_bias: true
  router_aux_loss_coef: 0.0
  max_position_embeddings: 64
seq_len: 32
global_batch_size: 12
micro_batch_size: 3
max_steps: {STEPS}
optimizer: {{_component_: torchrecipes.optim.muon, lr: 0.01, ns_dtype: fp32}}
router_bias_update_rate: 0.01
compute:
  precision: fp32
log:
  log_every: 1
checkpoint:
  save_every: 10
eval_every: 10
eval_sequences: 7
"""
MAIN = """
from torchrecipes.cli.main import _as_process
_as_process()
"""


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """train("name", world_size, "key=value", ...) runs the recipe into a folder, which it returns."""
    path = tmp_path_factory.mktemp("causal_ranks")
    sample = random.Random(0)
    words = "the cat dog fox owl sees hears finds likes a river house garden and goes home".split()
    with (path / "text.jsonl").open("w") as file:
        for _ in range(300):
            file.write(json.dumps({"text": " ".join(sample.choices(words, k=sample.randint(3, 40)))}) + "\n")
    config = SETTINGS.replace("TEXT", str(path / "text.jsonl")).replace("CORPUS", str(path / "corpus"))
    (path / "config.yaml").write_text(config)
    (path / "start.py").write_text(MAIN)

    def run(name, world_size, *overrides):
        settings = ["--config", path / "config.yaml", f"output_dir={path / name}", *overrides]
        ranks.run(path / "start.py", world_size, "run", find_recipe("causal_pretrain"), *settings)
        return path / name

    return run


@pytest.fixture(scope="module")
def alone(train):
    return train("alone", 1)


def logged(run, key):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def weights(run, step=STEPS):
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def assert_same(run, other):
    for key in ("loss", "grad_norm", "eval/validation/loss", "moe/max_violation"):
        assert logged(run, key) == pytest.approx(logged(other, key), abs=1e-4), key
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).abs().max() < 1e-3, name


@pytest.mark.parametrize(("world_size", "strategy"), [(2, "fsdp"), (3, "ddp")])
def test_losses_and_loads_are_those_of_one_process(train, alone, world_size, strategy):
    assert_same(train(strategy, world_size, f"compute.strategy={strategy}"), alone)


def test_a_checkpoint_of_two_ranks_goes_on_with_one_and_has_the_routers_biases(train, alone):
    run = train("two-then-one", 2, "compute.strategy=fsdp")
    half = weights(run, 10)
    biases = [tensor for name, tensor in half.items() if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2 and all(bias.abs().max() > 0.01 for bias in biases)
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}")
    assert_same(train("two-then-one", 1), alone)
