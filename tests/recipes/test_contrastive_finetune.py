"""The recipe that makes embedding models, on small texts that each test run makes itself."""

import json
import random
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests import ranks
from torchrecipes.cli.main import main
from torchrecipes.cli.run import load_recipe
from torchrecipes.config import load
from torchrecipes.config.catalog import find_recipe
from torchrecipes.errors import UserError
from torchrecipes.models import load_embedding_model
from torchrecipes.planning import check_components

RECIPE = find_recipe("contrastive_finetune")
ENCODER = """
  _component_: torchrecipes.models.bert
  hidden_size: 32
  num_hidden_layers: 2
  num_attention_heads: 2
  intermediate_size: 64
  max_position_embeddings: 64
  hidden_dropout_prob: 0.1
"""
SETTINGS = f"""
tokenizer: {{_component_: torchrecipes.data.tokenizers.train_wordpiece, vocab_size: 300}}
data:
  source: {{_component_: torchrecipes.data.examples.pairs, path: FOLDER/pairs.jsonl, negatives: negatives}}
model: {ENCODER}
seq_len: 32
global_batch_size: 8
micro_batch_size: 8
max_steps: 12
optimizer: {{_component_: torchrecipes.optim.adamw, lr: 3e-3}}
evaluators:
  held_out:
    _component_: torchrecipes.evaluation.Retrieval
    data: {{_component_: torchrecipes.data.examples.pairs, path: FOLDER/test.jsonl}}
eval_every: 4
compute: {{precision: fp32}}
checkpoint: {{save_every: 4, keep_last: 20}}
log: {{log_every: 1}}
"""
ANIMALS = ["cat", "dog", "fox", "owl", "bee", "ant", "cow", "hen"]
SOUNDS = ["meow", "woof", "yip", "hoot", "buzz", "tick", "moo", "cluck"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Questions about animals, and the sounds that answer them; an example has a wrong sound, or none."""
    folder, rng = tmp_path_factory.mktemp("contrastive"), random.Random(0)
    for name, count in (("pairs", 80), ("test", 16)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for number in range(count):
                one = rng.randrange(8)
                query = f"what does the {ANIMALS[one]} number {number} say in the {rng.choice(ANIMALS)} house ?"
                positive = f"it goes {SOUNDS[one]} {' '.join(rng.choices(['and', 'loud', 'very'], k=one))} {number}"
                negatives = [f"it goes {SOUNDS[one - 1]}"] if number % 3 else []
                file.write(json.dumps({"query": query, "positive": positive, "negatives": negatives}) + "\n")
    with (folder / "scores.csv").open("w") as file:
        file.write("sentence1,sentence2,score\n")
        for _ in range(60):
            one, two = rng.randrange(8), rng.randrange(8)
            file.write(f"the {ANIMALS[one]},the {SOUNDS[two]},{5 if one == two else abs(one - two) / 2}\n")
    with (folder / "labels.jsonl").open("w") as file:
        for number in range(64):
            file.write(json.dumps({"text": f"the {ANIMALS[number % 8]} {number}", "label": number % 8}) + "\n")
    return folder


@pytest.fixture
def train(folder, tmp_path):
    """train("name", "key=value", ...) runs the recipe into a folder of that name, which it returns."""

    def run(name, *overrides, recipe=RECIPE, settings=SETTINGS):
        config = tmp_path / "config.yaml"
        config.write_text(settings.replace("FOLDER", str(folder)))
        module = load_recipe(recipe)
        module.main(load(module.Config, config, [f"output_dir={tmp_path / name}", *overrides], recipe=recipe))
        return tmp_path / name

    return run


def lines(run, key="loss"):
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[key] for line in found if key in line}


def weights(run, step):
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_learns_and_ends_in_its_best_model(train):
    metric = "eval/held_out/mrr@10"
    run = train("run", "max_steps=32", "eval_every=8", f"checkpoint.keep_best={{metric: {metric}, mode: max}}")
    scores = lines(run, metric)
    assert sorted(scores) == [0, 8, 16, 24, 32] and max(scores.values()) > scores[0] + 0.2
    best = max((step for step in scores if step), key=lambda step: (scores[step], -step))
    assert_equal(load_file(run / "model" / "model.safetensors"), weights(run, best))
    assert load_embedding_model(run).embedding_size == 32  # the result is what a run's folder stands for
    assert json.loads((run / "model" / "modules.json").read_text())[1]["path"] == "1_Pooling"


def test_a_resumed_run_repeats_every_bit(train):
    whole = train("whole", "micro_batch_size=4")
    part = train("part", "micro_batch_size=4", "max_steps=12")
    for step in (8, 12):
        shutil.rmtree(part / "checkpoints" / f"step-{step:08d}")
    shutil.rmtree(part / "model")
    train("part", "micro_batch_size=4")
    assert lines(part) == lines(whole)
    assert lines(part, "eval/held_out/mrr@10") == lines(whole, "eval/held_out/mrr@10")
    assert_equal(weights(part, 12), weights(whole, 12))


def test_micro_batches_give_the_gradients_of_one_batch(train):
    """With dropout off: the pieces of a step draw their dropout in another order."""
    no_dropout = "model.hidden_dropout_prob=0"
    one, several = (
        train("one", no_dropout, "max_steps=4"),
        train("several", no_dropout, "max_steps=4", "micro_batch_size=2"),
    )
    for key in ("loss", "grad_norm"):
        assert lines(several, key) == pytest.approx(lines(one, key), rel=1e-5)
    for name, value in weights(one, 4).items():
        torch.testing.assert_close(weights(several, 4)[name], value, rtol=1e-4, atol=1e-5)


def test_two_ranks_equal_one(train, folder, tmp_path):
    options = ["model.hidden_dropout_prob=0", "max_steps=6", "eval_every=3", "micro_batch_size=2"]
    one = train("one", *options)
    config = tmp_path / "config.yaml"
    script = tmp_path / "main.py"
    script.write_text("from torchrecipes.cli.main import _as_process\n_as_process()\n")
    command = ["run", "contrastive_finetune", "--config", str(config), f"output_dir={tmp_path / 'two'}", *options]
    ranks.run(script, 2, *command)
    for key in ("loss", "grad_norm", "eval/held_out/mrr@10"):
        assert lines(tmp_path / "two", key) == pytest.approx(lines(one, key), rel=1e-5)
    for name, value in weights(one, 6).items():
        torch.testing.assert_close(weights(tmp_path / "two", 6)[name], value, rtol=1e-4, atol=1e-5)


SCORED = "{_component_: torchrecipes.data.examples.scored_pairs, path: FOLDER/scores.csv, low: 0, high: 5}"
RAW = "{_component_: torchrecipes.data.examples.raw_texts, path: FOLDER/labels.jsonl}"
LABELED = "{_component_: torchrecipes.data.examples.labeled_texts, path: FOLDER/labels.jsonl}"
PAIRS = "{_component_: torchrecipes.data.examples.pairs, path: FOLDER/pairs.jsonl, negatives: negatives}"


@pytest.mark.parametrize(
    ("source", "loss", "overrides"),
    [
        (SCORED, "{_component_: torchrecipes.losses.CoSENT}", []),
        (RAW, "{_component_: torchrecipes.losses.InfoNCE}", ["collator.repeat_texts=true"]),
        (LABELED, "{_component_: torchrecipes.losses.BatchHardTriplet}", ["data.per_label=4"]),
        (PAIRS, "{_component_: torchrecipes.losses.InfoNCE, similarity: dot, temperature: 1}",
         ["embedding.learnable_temperature=0.05", "embedding.projection=16", "embedding.pooling=cls"]),
        (PAIRS, "{_component_: torchrecipes.losses.Matryoshka, dims: [32, 8], "
         "loss: {_component_: torchrecipes.losses.InfoNCE}}", ["eval_dims=[8]", "eval_every=3"]),
        (PAIRS, "{_component_: torchrecipes.losses.InfoNCE}",
         ["lora={_component_: torchrecipes.modules.apply_lora, rank: 2}", "micro_batch_size=4"]),
    ],
    ids=["scores", "simcse", "labels", "learnable_temperature", "matryoshka", "lora"],
)  # fmt: skip
def test_every_kind_of_examples_and_losses_trains(train, folder, source, loss, overrides):
    settings = re.sub(r"source: .*", f"source: {source}", SETTINGS, count=1) + f"loss: {loss}\n"
    run = train("run", "max_steps=3", "eval_every=null", *overrides, settings=settings)
    assert len(lines(run)) == 3 and (run / "model" / "model.safetensors").is_file()
    assert load_embedding_model(run).embedding_size == (16 if "embedding.projection=16" in overrides else 32)
    if "eval_every=3" in overrides:
        assert sorted(lines(run, "eval/held_out/ndcg@10_dim8")) == [0, 3]


def test_a_guide_has_to_have_the_same_tokenizer(train, tmp_path):
    guide = train("guide", "max_steps=1", "eval_every=null")
    loss = "loss={_component_: torchrecipes.losses.InfoNCE, guide_margin: 0.0}"
    run = train("run", "max_steps=2", "eval_every=null", f"guide={guide}", loss)
    assert len(lines(run)) == 2
    train("auto", "max_steps=1", "eval_every=null", f"guide={guide}", loss, "micro_batch_size=auto")
    with pytest.raises(UserError) as error:
        train("other", "max_steps=2", "eval_every=null", f"guide={guide}", loss, "tokenizer.vocab_size=200")
    assert (error.value.key, error.value.code) == ("guide", "other_tokenizer")


@pytest.mark.parametrize(
    ("overrides", "key", "code"),
    [
        (["collator.repeat_texts=true"], "collator.repeat_texts", "several_texts"),
        (["loss={_component_: torchrecipes.losses.CrossEntropy}"], "loss", "not_a_loss_of_embeddings"),
    ],
)
def test_what_does_not_go_together_is_refused(train, overrides, key, code):
    with pytest.raises(UserError) as error:
        train("run", *overrides)
    assert (error.value.key, error.value.code) == (key, code)


def test_several_datasets_come_in_turns(train, folder):
    several = f"source: null\n  sources: {{one: {PAIRS}, two: {PAIRS}}}\n  weights: round_robin"
    settings = re.sub(r"source: .*", several, SETTINGS, count=1)
    run = train("run", "max_steps=4", "eval_every=null", settings=settings)
    one, two = lines(run, "loss/one"), lines(run, "loss/two")
    assert len(one) == len(two) == 2 and one.keys() | two.keys() == {1, 2, 3, 4}


def test_it_starts_from_a_pretrained_encoder(train, folder, tmp_path, capsys):
    config = tmp_path / "mlm.yaml"
    config.write_text(
        f"output_dir: {tmp_path}/mlm\nmodel: {ENCODER}\nseq_len: 32\nmax_steps: 2\neval_every: null\n"
        "tokenizer: {_component_: torchrecipes.data.tokenizers.train_wordpiece, vocab_size: 300}\n"
        f"data: {{source: {{_component_: torchrecipes.data.sources.files, path: {folder}/pairs.jsonl, "
        "text_column: query}, tokenizer_threads: 0}\n"
    )
    assert main(["run", "mlm_pretrain", "--config", str(config)]) == 0
    before = weights(tmp_path / "mlm", 2)
    capsys.readouterr()
    settings = SETTINGS.replace(f"model: {ENCODER}", "").replace("tokenizer: {", "unused: {").split("\n")
    settings = "\n".join(line for line in settings if not line.startswith("unused"))
    frozen = "freeze=['encoder.embedding.*']"
    run = train("run", f"init_from={tmp_path}/mlm", frozen, "max_steps=2", "eval_every=null", settings=settings)
    name = "embeddings.word_embeddings.weight"
    assert torch.equal(weights(run, 2)[name], before[f"bert.{name}"])
    changed = "encoder.layer.0.output.dense.weight"
    assert not torch.equal(weights(run, 2)[changed], before[f"bert.{changed}"])
    assert "cls.predictions.bias" in capsys.readouterr().out  # what is not used is named


def test_a_decoder_is_refused(train, folder, tmp_path):
    settings = SETTINGS.replace("models.bert", "models.gpt2").replace("  hidden_dropout_prob: 0.1\n", "")
    settings = settings.replace("  intermediate_size: 64\n", "")
    with pytest.raises(UserError) as error:
        train("run", settings=settings)
    assert error.value.code == "not_an_encoder"


def test_texts_longer_than_the_positions_are_refused_by_the_key_of_the_config(folder, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(SETTINGS.replace("FOLDER", str(folder)))
    module = load_recipe(RECIPE)
    problems = check_components(
        module, load(module.Config, config, ["seq_len=100000", "output_dir=run"], recipe=RECIPE)
    )
    assert [problem.key for problem in problems] == ["seq_len"]


def test_early_stopping_ends_the_run_with_its_best_model(train):
    metric = "eval/held_out/mrr@10"
    stopping = f"{{_component_: torchrecipes.training.EarlyStopping, metric: {metric}, patience: 2, min_delta: 2}}"
    best = f"checkpoint.keep_best={{metric: {metric}, mode: max}}"
    run = train("run", "max_steps=40", "eval_every=2", f"early_stopping={stopping}", best)
    assert max(lines(run)) == 4  # the value of step 0, then two without an improvement of 2
    assert (run / "model" / "model.safetensors").is_file()


def test_a_changed_loss_is_followed(train, tmp_path):
    source = RECIPE.read_text()
    call = "    return build(config.loss)(embeddings, examples, guide)\n"
    assert call in source
    copy = tmp_path / "my_recipe.py"
    copy.write_text(
        source.replace(
            call,
            "    loss, sums = build(config.loss)(embeddings, examples, guide)\n"
            "    spread = embeddings.pow(2).sum()\n"
            "    return loss + spread, {'loss': (loss + spread).detach(), 'spread': spread.detach()}\n",
        )
    )
    plain = train("plain", "max_steps=2", "eval_every=null", "model.hidden_dropout_prob=0")
    run = train("run", "max_steps=2", "eval_every=null", "model.hidden_dropout_prob=0", recipe=copy)
    spread = lines(run, "spread")
    assert lines(run)[1] == pytest.approx(lines(plain)[1] + spread[1], rel=1e-5) and spread[1] > 1


def test_a_learnable_temperature_that_the_loss_does_not_see_is_refused(train):
    with pytest.raises(UserError) as error:
        train("run", "embedding.learnable_temperature=0.05")
    assert (error.value.key, error.value.code) == ("embedding.learnable_temperature", "inert_temperature")


def test_the_card_has_the_figures_before_and_after(train):
    run = train("run", "max_steps=2", "eval_every=2")
    card = (run / "model" / "README.md").read_text()
    assert "80 examples" in card and "held_out/mrr@10" in card and card.startswith("---\nlibrary_name: ")
    assert "max_steps: 2" in card and "# override" in card  # where each setting comes from
